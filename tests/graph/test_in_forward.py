"""Losses whose gradients are computed in the forward: which they are, and that nothing is computed twice."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import EVERYTHING, OPTIONS, B, D, S, V, bias, check, hidden, labels, nodes_of, run_compiled, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cce_inductor.graph import in_forward as graph_in_forward
from cce_inductor.ops.library import pays_in_forward, scaled_loss, vocab_reductions

MATMUL = 2 * B * S * V * D
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def loss(h, w, t):
    return F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))


def operators(ours):
    return [node.target for module in ours.modules for node in nodes_of(module) if "cce_inductor" in str(node.target)]


def twice(h, w, t):
    x = F.linear(h, w).view(-1, V)
    return F.cross_entropy(x, t.view(-1)) + F.cross_entropy(x, t.view(-1).flip(0))


def without_gradient(h, w, t):
    with torch.no_grad():
        return loss(h, w, t)


def a_third(h, w, t):
    return loss(h, w, t) / 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weighted_sum_of_log_probabilities_gets_its_gradients_in_the_forward(dtype):
    ours = check(loss, hidden(dtype=dtype), weight(dtype=dtype), labels())
    assert operators(ours) == [scaled_loss]


def test_sizes_may_be_dynamic():
    ours = check(loss, hidden(), weight(), labels(), dynamic=True)
    assert operators(ours) == [scaled_loss]


OTHERS = {
    "label_smoothing": lambda h, w, t: F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1), label_smoothing=0.1),
    "per_token": lambda h, w, t: F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1), reduction="none").sum(),
    "z_loss": lambda h, w, t: loss(h, w, t) + F.linear(h, w).logsumexp(-1).square().mean(),
    "no_gradient": without_gradient,
    "checkpoint": lambda h, w, t: checkpoint(loss, h * 2, w, t, use_reentrant=False),
    "two_losses": twice,
}


@pytest.mark.parametrize("program", OTHERS.values(), ids=OTHERS)
def test_other_losses_wait_for_the_backward(program):
    ours = run_compiled(program, hidden(), weight(), labels())
    assert set(operators(ours)) == {vocab_reductions}


@pytest.mark.parametrize(("dtype", "operator"), [(torch.float32, scaled_loss), (torch.bfloat16, vocab_reductions)])
def test_no_16_bit_gradient_is_rounded_twice(dtype, operator):
    ours = check(a_third, hidden(dtype=dtype), weight(dtype=dtype), labels())
    assert operators(ours) == [operator]


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Decisions are those for a GPU."""
    monkeypatch.setattr(
        graph_in_forward, "pays_in_forward", lambda _, *rest: pays_in_forward(torch.device("cuda"), *rest)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mass", [0, 0.0, 2**-5])
def test_on_a_gpu_no_dtype_waits(dtype, mass, like_a_gpu):
    ours = check(
        loss, hidden(dtype=dtype), weight(dtype=dtype), labels(), options=replace(EVERYTHING, approximate_mass=mass)
    )
    assert operators(ours) == [scaled_loss]


@pytest.mark.parametrize(("dtype", "operator"), [(torch.float16, vocab_reductions), (torch.bfloat16, scaled_loss)])
def test_on_a_gpu_float16_waits_where_a_slope_has_no_bound(dtype, operator, like_a_gpu):
    """Its gradients are kept in range by what bounds them."""

    def program(h, w, t):
        x = F.linear(h, w).view(-1, V)
        return F.cross_entropy(x * x, t.view(-1))

    args = hidden(dtype=dtype), weight(dtype=dtype), labels()
    assert operators(check(program, *args, options=replace(EVERYTHING, approximate_mass=0.0))) == [operator]


@pytest.mark.parametrize("scale", [1.0, 2.0**15])
def test_float16_is_multiplied_by_a_gradient_scaler_in_the_end(scale, like_a_gpu):
    """Compiled, backward and all: gradients that underflow without a scaler, and are right with one."""
    leaves = hidden(dtype=torch.float16), weight(dtype=torch.float16)
    compiled = torch.compile(loss, backend="cce", options=OPTIONS)
    ours = torch.autograd.grad(compiled(*leaves, labels()) * scale, leaves)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    right = torch.autograd.grad(loss(*doubles, labels()) * scale, doubles)
    eagers = torch.autograd.grad(loss(*leaves, labels()) * scale, leaves)
    for mine, theirs, exact in zip(ours, eagers, right, strict=True):
        assert (mine.double() - exact).norm() <= (theirs.double() - exact).norm()


@pytest.mark.parametrize("mass", [0.0, 2**-5])
@pytest.mark.parametrize(("w", "operator"), [(True, scaled_loss), (False, vocab_reductions)])
def test_on_a_gpu_the_weight_must_have_a_gradient(w, operator, mass, like_a_gpu):
    args = hidden(dtype=torch.bfloat16), weight(dtype=torch.bfloat16, requires_grad=w), labels()
    assert operators(check(loss, *args, options=replace(EVERYTHING, approximate_mass=mass))) == [operator]


@pytest.mark.parametrize("mass", [0.0, 2**-5])
@pytest.mark.parametrize("cap", [1, 4, None])
def test_on_a_gpu_a_sparse_backward_comes_later_where_slopes_are_not_known(cap, mass, like_a_gpu):
    """What is kept for it says too little of logits with a tight cap. A wide one, or one slope for all, it knows."""

    def program(h, w, t):
        x = F.linear(h, w).view(-1, V)
        return F.cross_entropy(x / 3 if cap is None else cap * torch.tanh(x / cap), t.view(-1))

    args = hidden(dtype=torch.bfloat16), weight(dtype=torch.bfloat16), labels()
    ours = check(program, *args, options=replace(EVERYTHING, approximate_mass=mass))
    assert operators(ours) == [vocab_reductions if cap == 1 and mass > 0 else scaled_loss]


def test_on_a_gpu_under_autocast_float32_weights_have_more_room(like_a_gpu):
    def program(h, w, t):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(h, w, t)

    ours = check(program, hidden(), weight(), labels(), options=replace(EVERYTHING, approximate_mass=0.0))
    assert operators(ours) == [scaled_loss]


def test_on_a_cpu_float16_waits():
    ours = check(loss, hidden(dtype=torch.float16), weight(dtype=torch.float16), labels())
    assert operators(ours) == [vocab_reductions]


@settings(max_examples=8)  # each is compiled
@given(
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(("mean", "sum")),
    ignored=st.sampled_from((None, -100, 2)),
    weighted=st.booleans(),
    biased=st.booleans(),
    capped=st.booleans(),
)
def test_any_such_loss_is_like_eagers(dtype, reduction, ignored, weighted, biased, capped):
    how = {"reduction": reduction, "ignore_index": -100 if ignored is None else ignored}

    def program(h, w, b, t, c):
        x = F.linear(h, w, b if biased else None).view(-1, V)
        return F.cross_entropy(5 * torch.tanh(x / 5) if capped else x, t.view(-1), c if weighted else None, **how)

    class_weight = bias(dtype=dtype, requires_grad=False).abs()
    target = labels(ignored=ignored)
    ours = check(program, hidden(dtype=dtype), weight(dtype=dtype), bias(dtype=dtype), target, class_weight)
    assert operators(ours) == [scaled_loss]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_row_at_all_counts(reduction):
    def program(h, w, t):
        return F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1), reduction=reduction)

    ours = check(program, hidden(), weight(), labels(ignored=-100, every=1))
    assert operators(ours) == [scaled_loss]


def flops(program, *args):
    """Of a compiled program's forward and of its backward, if there is one."""
    counted = []

    def counting(module, inputs):
        def run(*args):
            with FlopCounterMode(display=False) as counter:
                result = module.forward(*args)
            counted.append(counter.get_total_flops())
            return result

        return run

    run_compiled(program, *args, lower=counting)
    return counted


def test_without_gradients_only_the_logits_are_computed():
    with torch.no_grad():
        assert flops(loss, hidden(), weight(), labels()) == [MATMUL]


@pytest.mark.parametrize(("h", "w", "matmuls"), [(True, True, 3), (True, False, 2), (False, True, 2)])
def test_each_matmul_is_computed_once(h, w, matmuls):
    args = hidden(requires_grad=h), weight(requires_grad=w), labels()
    assert flops(loss, *args) == [matmuls * MATMUL]
