"""Losses in float16 with their gradients at once: in range, whatever the loss and the hidden states are."""

import cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_scaled_loss import compute, eager, make, run

from cce_inductor.ops import float16_range
from cce_inductor.ops.library import scaled_loss

FP16 = torch.float16
LARGEST = torch.finfo(FP16).max


def problem_of(rows=20, vocab=53, width=8, **how):
    """(problem, leaves, target, coefficient, options)."""
    leaves, target, coefficient, options = make(rows, vocab, width, FP16, **how)
    case = cases.Case(rows, vocab, width, FP16, total=False, class_weight=False, **how)
    return case.problem(), leaves, target, coefficient.abs(), options


def is_power_of_two(number):
    return torch.frexp(number).mantissa == 0.5


@given(
    rows=st.integers(1, 40),
    vocab=st.integers(1, 60),
    width=st.integers(1, 20),
    logit_map=st.sampled_from(["z", "30.0*z", "30.0*tanh(z/30.0)", "0.1*z*z"]),
    exponent=st.integers(-60, 60),
    outlier=st.sampled_from([0.0, 1.0, 300.0, 60000.0]),
    seed=st.integers(0, 9),
)
def test_no_number_overflows_and_as_much_room_is_taken(rows, vocab, width, logit_map, exponent, outlier, seed):
    assert_in_range(rows, vocab, width, logit_map, exponent, outlier, seed)


@pytest.mark.parametrize("outlier", [0.0, 60000.0])
def test_a_steep_map_leaves_less_room(outlier):
    assert_in_range(40, 20, 4, "30.0*z", 0, outlier)


def assert_in_range(rows, vocab, width, logit_map, exponent, outlier, seed=0):
    problem, *_, coefficient, _ = problem_of(rows, vocab, width, logit_map=logit_map, seed=seed)
    problem.hidden[:, 0] += outlier
    coefficient = coefficient * 2.0**exponent
    scaled = float16_range.scaled(problem, coefficient)
    largest, slope = scaled.coefficient.abs().max(), problem.logit_map.slope_bound or 1.0
    assert largest == 0 or 4 <= largest <= 8
    sums = (scaled.coefficient.abs() * problem.hidden.abs().amax(1).float().clamp(min=1)).sum() * slope
    assert sums * scaled.problem.weight_scale <= LARGEST / 2
    assert scaled.problem.weight_scale == 1 or sums * scaled.problem.weight_scale * 2 >= LARGEST / 4
    numbers = torch.stack([scaled.rows, scaled.problem.weight_scale, *scaled.units])
    assert is_power_of_two(numbers).all()
    assert scaled.rows * scaled.units[0] == 1
    assert scaled.rows * scaled.problem.weight_scale * scaled.units[1] == 1


@pytest.mark.parametrize("exponent", [-40, -17, 0, 12])
def test_the_loss_may_be_of_any_size(exponent):
    """Gradients are the same numbers times a power of two, where eager's underflow or are infinite."""
    _, *problem = problem_of(bias=True)
    leaves, target, coefficient, options = problem
    loss, *gradients = run(compute, *problem)
    larger, *others = run(compute, leaves, target, coefficient * 2.0**exponent, options, scale=2.0**-exponent)
    assert larger == loss * 2.0**exponent
    assert all(map(torch.equal, gradients, others))


def test_rows_of_one_token_do_not_overflow():
    """All give their gradient to one row of the weight, whose sum is far beyond float16."""
    rows, generator = 30000, torch.Generator().manual_seed(1)
    hidden, weight, bias = torch.full((rows, 8), 50.0), torch.randn(40, 8, generator=generator) / 50, torch.zeros(40)
    leaves = [tensor.to(FP16).requires_grad_() for tensor in (hidden, weight, bias)]
    target, coefficient = torch.full((rows,), 7), torch.full((rows,), 1.0)
    options = make(1, 2, 1, FP16)[3] | {"logit_map": "z", "ignore_index": None}
    _, *gradients = run(compute, leaves, target, coefficient, options, scale=2.0**-12)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    _, *right = run(eager, doubles, target, coefficient.double(), options, scale=2.0**-12)
    for mine, exact in zip(gradients, right, strict=True):
        assert (mine.double() - exact).norm() <= 2 * torch.finfo(FP16).eps * exact.norm()


def test_what_overflows_in_the_end_is_infinite_as_with_a_scaler():
    _, *problem = problem_of()
    _, *gradients = run(compute, *problem, scale=2.0**30)
    assert all(gradient.isinf().any() for gradient in gradients[:2])


@pytest.mark.parametrize("ignored", [False, True])
def test_a_row_that_is_not_a_number_counts_only_where_it_is_not_ignored(ignored):
    _, leaves, target, coefficient, options = problem_of(ignore_index=-100)
    target[4] = -100 if ignored else 3
    leaves[0].data[4], coefficient[4] = torch.nan, torch.inf
    gradients = run(compute, leaves, target, coefficient, options)[1:]
    others = torch.arange(20) != 4
    assert gradients[0][others].isfinite().all() or not ignored
    assert gradients[1].isfinite().all() == ignored


def test_rows_that_are_ignored_do_not_take_the_range_of_others():
    _, leaves, target, coefficient, options = problem_of(ignore_index=-100)
    target[4] = -100
    expected = run(compute, leaves, target, coefficient, options)
    coefficient[4], leaves[0].data[4] = 2.0**40, 60000.0
    assert all(map(torch.equal, run(compute, leaves, target, coefficient, options), expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, FP16])
def test_only_float16_has_units(dtype):
    leaves, target, coefficient, options = make(20, 53, 8, dtype)
    units = scaled_loss(*leaves, target, coefficient, **options)[4]
    assert units.shape == (2 if dtype == FP16 else 0,)
    assert not units.requires_grad
