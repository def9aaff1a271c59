"""`linear_cross_entropy` means what `cross_entropy(linear(...))` means, for every argument, and fails alike."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import B, D, S, V, assert_close_to_eager, bias, hidden, labels, weight

from cce_inductor import linear_cross_entropy

CLASS_WEIGHT = torch.linspace(0.1, 2.0, V)
CAP = "3.0*tanh(z/3.0)"


def eager(input, linear_weight, target, *, linear_bias=None, logit_map="z", reduction="mean", **options):
    logits = F.linear(input, linear_weight, linear_bias)
    if logit_map == CAP:
        logits = 3 * torch.tanh(logits / 3)
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), reduction=reduction, **options)
    return loss.reshape(target.shape) if reduction == "none" else loss


def both(*args, **options):
    """Asserts that ours is as close to float64 as eager is; gives our result."""
    return assert_close_to_eager(
        lambda *given: linear_cross_entropy(*given, **options), lambda *given: eager(*given, **options), args
    )


GRID = list(
    itertools.product(("mean", "sum", "none"), (-100, 5), (None, CLASS_WEIGHT), (0.0, 0.3), ("z", CAP), (False, True))
)


@pytest.mark.parametrize(("reduction", "ignore_index", "class_weight", "smoothing", "logit_map", "with_bias"), GRID)
def test_every_argument(reduction, ignore_index, class_weight, smoothing, logit_map, with_bias):
    b = bias()

    def call(function):
        return lambda h, w, b, t, c: function(
            h,
            w,
            t,
            linear_bias=b if with_bias else None,
            weight=c,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            logit_map=logit_map,
        )

    given = (hidden(), weight(), b, labels(ignored=ignore_index), class_weight)
    assert_close_to_eager(call(linear_cross_entropy), call(eager), given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_has_the_dtype_of_the_input(dtype):
    loss = both(hidden(dtype=dtype), weight(dtype=dtype), labels())
    assert loss.dtype == dtype


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_any_shape_of_the_rows(shape, reduction):
    given = (hidden(*shape, D), weight(), labels(*shape) if shape else labels(1)[0])
    loss = both(*given, reduction=reduction)
    assert loss.shape == (shape if reduction == "none" else ())


def test_the_defaults_are_those_of_torch():
    given = (hidden(), weight(), labels(ignored=-100))
    assert torch.allclose(linear_cross_entropy(*given), eager(*given), rtol=V * 2**-23)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch.nn.functional has no linear_cross_entropy")
def test_arguments_are_named_as_in_torch():
    given = (hidden(20, D), weight(), labels(20))
    options = {"linear_bias": bias(), "reduction": "sum", "ignore_index": 3, "label_smoothing": 0.1}
    assert torch.allclose(
        linear_cross_entropy(*given, **options), F.linear_cross_entropy(*given, **options), rtol=V * 2**-23
    )


def test_targets_of_bytes():
    h, w, t = hidden(), weight(), labels()
    assert torch.equal(linear_cross_entropy(h, w, t.to(torch.uint8)), linear_cross_entropy(h, w, t))


def test_operands_of_any_strides():
    h, w = hidden(S, B, D).transpose(0, 1), weight(D, V).t()
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    both(h, w, labels(S, B).t())
    both(hidden(1, 1, D).detach().expand(B, S, D), weight(V, 1).detach().expand(V, D), labels())


def test_autocast():
    """Products in bfloat16, a loss and gradients in float32."""

    def call(function):
        def run(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*args)

        return run

    given = (hidden(), weight(), labels())
    loss = assert_close_to_eager(call(linear_cross_entropy), call(eager), given, rounding=torch.bfloat16)
    assert loss.dtype == torch.float32


def test_a_float32_weight_under_narrower_hidden_states():
    """Its gradient is float32, and no cast copy of it is made."""
    h, w, t = hidden(dtype=torch.bfloat16), weight(), labels()
    loss = linear_cross_entropy(h, w, t)
    gradient = torch.autograd.grad(loss, w)[0]
    assert (loss.dtype, gradient.dtype) == (torch.bfloat16, torch.float32)


def test_frozen_operands():
    both(hidden(requires_grad=False), weight(), labels())
    both(hidden(), weight(requires_grad=False), labels())
    assert not linear_cross_entropy(hidden().detach(), weight().detach(), labels()).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_counts(reduction):
    both(hidden(), weight(), torch.full((B, S), -100), reduction=reduction)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_hidden_states_that_are_not_finite(value):
    """The rows concerned are nan, as in eager, and no other."""
    h = hidden(requires_grad=False)
    h[1, 2, 3] = value
    ours = linear_cross_entropy(h, weight(), labels(), reduction="none")
    theirs = eager(h, weight(), labels(), reduction="none")
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.allclose(ours[ours.isfinite()], theirs[theirs.isfinite()], rtol=V * 2**-23)


def test_inside_a_compiled_program():
    def program(h, w, t):
        return linear_cross_entropy(h * 2, w, t, label_smoothing=0.1)

    torch._dynamo.reset()
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    assert_close_to_eager(
        compiled, lambda h, w, t: eager(h * 2, w, t, label_smoothing=0.1), (hidden(), weight(), labels())
    )


# ---------------------------------------------------------------------------------------------------------- errors


def replaced(**changes):
    arguments = {"input": hidden(), "linear_weight": weight(), "target": labels()} | changes
    return arguments.pop("input"), arguments.pop("linear_weight"), arguments.pop("target"), arguments


def out_of_range(value):
    target = labels()
    target[1, 1] = value
    return target


WRONG = {
    "target_too_large": {"target": out_of_range(V)},
    "target_negative": {"target": out_of_range(-1)},
    "targets_of_another_batch": {"target": labels(B, S - 1)},
    "targets_of_int32": {"target": labels().int()},
    "targets_of_bool": {"target": labels().bool()},
    "weight_of_another_width": {"linear_weight": weight(V, D + 1)},
    "weight_of_one_dimension_more": {"linear_weight": weight(2, V, D)},
    "weight_of_ints": {"linear_weight": weight().detach().long()},
    "weight_of_another_dtype": {"linear_weight": weight(dtype=torch.float64)},
    "weight_narrower_than_the_input": {"linear_weight": weight(dtype=torch.bfloat16)},
    "bias_of_another_dtype": {"linear_bias": bias(dtype=torch.float64)},
    "class_weight_of_another_dtype": {"weight": torch.ones(V, dtype=torch.float64)},
    "class_weight_of_two_dimensions": {"weight": torch.ones(V, 1)},
    "bias_of_another_length": {"linear_bias": bias(V + 1)},
    "class_weight_of_another_length": {"weight": torch.ones(V + 1)},
    "smoothing_above_one": {"label_smoothing": 1.5},
    "reduction": {"reduction": "max"},
    "smoothed_class_weight_of_another_length": {"weight": torch.ones(V - 1), "label_smoothing": 0.1},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_errors_are_of_the_kind_that_eager_raises(wrong):
    h, w, t, options = replaced(**wrong)
    errors = []
    for function in (eager, linear_cross_entropy):
        try:
            function(h, w, t, **options)
        except Exception as error:
            errors.append(type(error))
    assert len(errors) == 2
    assert errors[0] is errors[1]


def test_smoothing_below_zero_raises():
    """Eager ignores it."""
    with pytest.raises(RuntimeError, match=r"label_smoothing must be between 0\.0 and 1\.0"):
        linear_cross_entropy(hidden(), weight(), labels(), label_smoothing=-0.5)


@pytest.mark.parametrize("text", ["", "y", "z.real", "__import__('os')", "z if z else z", "tan(z)", "lambda: z"])
def test_a_map_outside_its_language_raises(text):
    with pytest.raises(ValueError, match="logit map"):
        linear_cross_entropy(hidden(), weight(), labels(), logit_map=text)


def test_second_derivatives_say_that_there_are_none():
    h, w, t = hidden(), weight(), labels()
    [gradient] = torch.autograd.grad(linear_cross_entropy(h, w, t), h, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        gradient.sum().backward()


def test_losses_of_confident_rows_keep_their_digits():
    """Where the target's logit is the log-sum-exp but for a rounding, their difference is the whole loss."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(V, 48, generator=generator)
    t = torch.arange(32) % V
    h = w[t] + 0.3 * torch.randn(32, 48, generator=generator)
    exact = eager(h.double(), w.double(), t, reduction="none")
    logits = h @ w.T
    assert logits.max() > 32, "large enough for a rounding to be more than is asserted below"
    assert exact.max() < 2**-12
    error = (linear_cross_entropy(h, w, t, reduction="none").double() - exact).abs()
    # rounding 1 + (the other probabilities) takes half an epsilon, its logarithm as much
    assert error.max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("mass", [-0.1, 1.0, float("nan")])
def test_an_approximate_mass_outside_of_zero_to_one_is_an_error(mass):
    with pytest.raises(ValueError, match="approximate_mass must be in"):
        linear_cross_entropy(hidden(), weight(), labels(), approximate_mass=mass)
