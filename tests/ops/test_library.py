"""The operators as PyTorch sees them: schema, fake tensors, autograd, FLOPs."""

import cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cce_inductor.ops import cpu
from cce_inductor.ops.library import vocab_reductions, vocab_reductions_backward
from cce_inductor.ops.problem import Reductions

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def leaves(case):
    """The operator's arguments, those that can have a gradient as leaves."""
    return [t.detach().clone().requires_grad_() if i < 3 and t is not None else t for i, t in enumerate(case.tensors)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strides", ["contiguous", "sliced", "expanded"])
def test_the_forward_passes_opcheck(dtype, strides):
    case = cases.Case(7, 40, 6, dtype, strides=strides, logit_map="5.0*tanh(z/5.0)", max=True, entropy=True)
    torch.library.opcheck(vocab_reductions, leaves(case), case.options)


@pytest.mark.parametrize("given", ["everything", "no bias", "no target", "nothing optional"])
def test_the_forward_passes_opcheck_without_optional_tensors(given):
    everything = given == "everything"
    case = cases.Case(
        7,
        40,
        6,
        bias=everything or given == "no target",
        target=everything or given == "no bias",
        class_weight=everything,
    )
    torch.library.opcheck(vocab_reductions, leaves(case), case.options)


def test_several_targets_of_a_row_pass_opcheck():
    case = cases.Case(7, 40, 6, picks=3, ignore_index=None)
    torch.library.opcheck(vocab_reductions, leaves(case), case.options)


@pytest.mark.parametrize("needs_grad", [[True, True, True], [True, False, False], [False, True, False]])
@pytest.mark.parametrize("bias_dtype", [None, torch.float64])
def test_the_backward_passes_opcheck(needs_grad, bias_dtype):
    case = cases.Case(7, 40, 6, bias=bias_dtype is not None, max=True, entropy=bias_dtype is None)
    if case.bias:
        case.bias_vector = case.bias_vector.to(bias_dtype)
    needs_grad = [*needs_grad[:2], needs_grad[2] and case.bias]
    case.hidden = case.hidden.bfloat16()
    results = Reductions(*vocab_reductions(*case.tensors, **case.options))
    grads = case.row_gradients(results)
    # the last of the fields is for those who call a backward without the operator
    arguments = (*grads[:-1], results.lse, *results.tiles, *case.tensors)
    torch.library.opcheck(vocab_reductions_backward, arguments, {**case.options, "needs_grad": needs_grad})


def test_autograd_gives_what_the_implementation_gives():
    case = cases.Case(7, 40, 6, max=True, entropy=True)
    arguments = leaves(case)
    given = Reductions(*vocab_reductions(*arguments, **case.options))
    results = given.lse, given.picked, given.total, given.maximum, given.entropy
    gradients = torch.autograd.grad(results, arguments[:3], case.grads)
    for mine, expected in zip((*results, *gradients), cases.ours(case, cpu), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("picks", [None, 3])
def test_float64_gradients_pass_gradcheck(picks):
    case = cases.Case(5, 9, 4, torch.float64, picks=picks, logit_map="5.0*tanh(z/5.0)", max=True, entropy=True)
    hidden, weight, bias, *others = leaves(case)

    def differentiable(*args):
        results = Reductions(*vocab_reductions(*args, *others, **case.options))
        return results.lse, results.picked, results.total, results.maximum, results.entropy

    assert torch.autograd.gradcheck(differentiable, (hidden, weight, bias))


def test_frozen_inputs_get_no_gradient():
    case = cases.Case(7, 40, 6)
    hidden, weight, bias, *others = leaves(case)
    weight.requires_grad_(False)
    vocab_reductions(hidden, weight, bias, *others, **case.options)[0].sum().backward()
    assert hidden.grad is not None
    assert bias.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_where_no_gradients_are_recorded(mode):
    case = cases.Case(7, 40, 6)
    with mode():
        results = vocab_reductions(*leaves(case), **case.options)
    assert not any(result.requires_grad for result in results)


def test_an_ambient_autocast_changes_nothing():
    case = cases.Case(7, 40, 6)
    expected = vocab_reductions(*case.tensors, **case.options)
    with torch.autocast("cpu", torch.bfloat16):
        results = vocab_reductions(*case.tensors, **case.options)
    assert all(map(torch.equal, results, expected))


def test_a_cast_weight_gets_its_gradient_in_its_own_dtype():
    case = cases.Case(7, 40, 6, torch.float32, compute_dtype=torch.bfloat16)
    arguments = leaves(case)
    vocab_reductions(*arguments, **case.options)[0].sum().backward()
    assert {argument.grad.dtype for argument in arguments[:3]} == {torch.float32}


def test_a_second_derivative_is_refused_in_words():
    case = cases.Case(7, 40, 6)
    arguments = leaves(case)
    loss = vocab_reductions(*arguments, **case.options)[0].sum()
    (gradient,) = torch.autograd.grad(loss, arguments[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize(("needs", "matmuls"), [((1, 1), 3), ((1, 0), 2), ((0, 1), 2)])
def test_flops_are_those_of_the_matmuls(needs, matmuls):
    case = cases.Case(7, 40, 6)
    arguments = leaves(case)
    for argument, needed in zip(arguments, needs, strict=False):
        argument.requires_grad_(bool(needed))
    one = 2 * 7 * 40 * 6
    with FlopCounterMode(display=False) as forward:
        loss = vocab_reductions(*arguments, **case.options)[0].sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert (forward.get_total_flops(), backward.get_total_flops()) == (one, matmuls * one)


def test_it_compiles_without_graph_breaks_for_dynamic_sizes():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def loss(hidden, weight, bias, target, class_weight):
        lse, picked, total, *_ = vocab_reductions(hidden, weight, bias, target, class_weight, **case.options)
        return (lse - picked + total).sum()

    for rows in (7, 12):
        case = cases.Case(rows, 40, 6)
        arguments = leaves(case)
        loss(*arguments).backward()
        for argument, expected in zip(arguments[:3], cases.eager(case)[3:], strict=True):
            assert argument.grad.shape == expected.shape


@pytest.mark.parametrize("used", ["lse", "maximum", "entropy"])
def test_the_backward_gets_gradients_of_what_was_differentiated_only(used):
    case = cases.Case(7, 40, 6, max=True, entropy=True)
    results = Reductions(*vocab_reductions(*leaves(case), **case.options))
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is vocab_reductions_backward:
                seen.append((args[3] is not None, args[4] is not None))
            return function(*args, **(kwargs or {}))

    with Spy():
        getattr(results, used).sum().backward()
    assert seen == [(used == "maximum", used == "entropy")]
