"""The sparse way of `scaled_loss` on a CPU: exact where it may skip nothing, and what it skips is put back."""

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cce_inductor.ops import cpu, cpu_sparse, in_forward
from cce_inductor.ops.blocks import Gradients
from cce_inductor.ops.library import scaled_loss

TILE = 8
BUDGETS = (2**-5, 2**-3, 2**-1)


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Tiles and blocks so small that a problem of a few rows has many, and is worth it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BLOCK_ROWS", 16)
        patch.setattr(cpu, "BLOCK_BYTES", 2048)
        patch.setattr(cpu_sparse, "TILE", TILE)
        patch.setattr(cpu_sparse, "PIECES", 8)
        patch.setattr(cpu_sparse, "MULTIPLE", 4)
        patch.setattr(cpu_sparse, "LEAST_PRODUCT", 0)
        patch.setattr(cpu_sparse, "SAMPLED_SHARE", 2)
        patch.setattr(cpu_sparse, "LOOKED_AT", 8)
        patch.setattr(cpu_sparse, "MOST_NEEDED", 1.0)
        yield


def make(rows, vocab, width, dtype=torch.bfloat16, **options):
    """A loss's problem, with a softmax as peaked as a trained model's; all rows count."""
    options = {"bias": False, "total": False, "class_weight": False, "ignore_index": None} | options
    case = cases.Case(rows, vocab, width, dtype, **options)
    case.hidden = case.hidden * 4
    case.grads[:3] = [case.grads[0].abs(), -case.grads[0].abs(), torch.zeros(rows)]
    return case


def make_agreeing():
    """Rows that agree on what to skip, and much to skip."""
    case = make(64, 600, 24, torch.float64)
    case.hidden = case.hidden[:4].repeat_interleave(16, 0) / 3
    case.grads[0] = case.grads[0].double()
    case.grads[1] = -case.grads[0]
    return case


def compute(case, budget, needs_grad=(True, True, None)):
    """(loss, gradients of hidden, weight and bias) by the sparse way, whatever the sample says."""
    problem = case.problem(approximate_mass=budget)
    needs = [needs_grad[0], needs_grad[1], case.bias if needs_grad[2] is None else needs_grad[2]]
    gradients = Gradients.allocate(problem, needs)
    share = cpu_sparse.token_shares(problem, case.grads[0], gradients.weight)
    return cpu_sparse.loss_and_gradients(problem, case.grads[0], share, gradients)


def assert_gradients_no_worse_than_eager(case, gradients):
    references, eagers, roundings = cases.exact(case), cases.eager(case), cases.uncertainty(case)
    first = case.names.index("grad_hidden")
    some = (values[first:] for values in (references, eagers, roundings[:3] + roundings[-3:]))
    cases.assert_no_worse(case.names[first:], list(gradients), *some)


def loss_of(case, lse, picked):
    return case.grads[0].double() @ (lse - picked).double()


@given(
    rows=st.integers(1, 50),
    vocab=st.integers(9, 150),
    width=st.integers(1, 40),
    logit_map=st.sampled_from(cases.MAPS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    bias=st.booleans(),
    strides=st.sampled_from(("contiguous", "transposed", "sliced")),
    seed=st.integers(0, 9),
)
def test_nothing_skipped_is_no_worse_than_eager(rows, vocab, width, logit_map, dtype, bias, strides, seed):
    case = make(rows, vocab, width, dtype, logit_map=logit_map, bias=bias, strides=strides, seed=seed)
    loss, *gradients = compute(case, 2.0**-60)
    assert_gradients_no_worse_than_eager(case, gradients[: 2 + bias])
    right, eager = (loss_of(case, *results[:2]) for results in (cases.exact(case), cases.eager(case)))
    allowed = sum(error @ case.grads[0].double() for error in cases.uncertainty(case)[:2])
    assert abs(loss.double() - right) <= abs(eager - right) + allowed


@settings(max_examples=15)
@given(
    rows=st.integers(64, 90),
    vocab=st.integers(200, 300),
    width=st.integers(30, 50),
    logit_map=st.sampled_from(cases.MAPS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_products_in_16_bits_are_no_worse_than_eagers(rows, vocab, width, logit_map, dtype, bias, seed):
    """With the default budget, where targets are as probable as the softmax says."""
    case = make(rows, vocab, width, dtype, compute_dtype=torch.bfloat16, logit_map=logit_map, bias=bias, seed=seed)
    x = case.hidden.float() @ case.weight.float().T + (case.bias_vector.float() if bias else 0.0)
    case.targets = case.problem().logit_map(x).softmax(1).multinomial(1, generator=case.generator).squeeze(1)
    loss, *gradients = compute(case, 2.0**-5)
    assert_gradients_no_worse_than_eager(case, gradients[: 2 + bias])
    right, eager = (loss_of(case, *results[:2]) for results in (cases.exact(case), cases.eager(case)))
    assert abs(loss - right) <= abs(eager - right) + 2.0**-9 * right  # of either, by luck


@settings(max_examples=30)
@given(mass=st.sampled_from(BUDGETS), bias=st.booleans(), seed=st.integers(0, 99))
def test_skipped_mass_is_put_back_in_its_tile(mass, bias, seed):
    """With hidden states of ones in one place, the weight's gradient there sums to the tile's mass in all rows."""
    case = make(64, 150, 24, torch.float64, bias=bias, seed=seed)
    case.hidden[:, 0] = 1.0
    coefficient = case.grads[0] = case.grads[0].double()
    _, _, grad_weight, grad_bias = compute(case, mass)
    x = case.hidden @ case.weight.T + (case.bias_vector if bias else 0.0)
    dz = torch.softmax(x, 1) * coefficient[:, None]
    dz[torch.arange(64), case.targets] -= coefficient
    for gradient in [grad_weight[:, 0], grad_bias][: 1 + bias]:
        for tile, wanted in zip(gradient.split(TILE), dz.sum(0).split(TILE), strict=True):
            torch.testing.assert_close(tile.sum(), wanted.sum(), rtol=1e-5, atol=1e-5)  # masses are float32


@given(
    mass=st.sampled_from((2**-6, *BUDGETS)), tiles=st.integers(1, 300), peak=st.floats(0, 20), seed=st.integers(0, 99)
)
def test_what_a_row_skips_stays_within_the_budget(mass, tiles, peak, seed):
    shares = (peak * torch.randn(tiles, 8, generator=torch.Generator().manual_seed(seed))).softmax(0)
    needed = cpu_sparse.needed_tiles(shares, mass)
    skipped = torch.where(needed, 0.0, shares)
    assert (skipped.sum(0) <= mass * (1 + 1e-5)).all()
    assert (skipped <= mass / cpu_sparse.PIECES * (1 + 1e-5)).all()
    assert (needed | (shares < torch.where(needed, shares, 2.0).amin(0))).all()


def test_many_light_tiles_are_skipped_up_to_the_budget(monkeypatch):
    monkeypatch.setattr(cpu_sparse, "PIECES", 128)
    shares = torch.full((601, 4), 2**-4 / 200)
    shares[0] = 1 - shares[1:].sum(0)
    assert cpu_sparse.needed_tiles(shares, 2**-4)[1:].all()
    shares[1:] *= torch.rand(600, 1, generator=torch.Generator().manual_seed(0))
    skipped = torch.where(cpu_sparse.needed_tiles(shares, 2**-4), 0.0, shares).sum(0)
    assert (skipped > 0.85 * 2**-4).all()


def test_a_row_that_is_not_a_number_needs_everything():
    assert cpu_sparse.needed_tiles(torch.full((10, 3), torch.nan), 0.5).all()


def test_the_error_shrinks_with_the_budget():
    case = make_agreeing()
    wanted = cases.exact(case)[-2:]
    errors = [
        sum((g - w).norm().item() for g, w in zip(compute(case, mass)[1:3], wanted, strict=True))
        for mass in (2**-1, 2**-3, 2**-5, 2.0**-60)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 < errors[0]


def test_compensation_is_better_than_none():
    case = make_agreeing()
    problem = case.problem(approximate_mass=2**-2)
    wanted = cases.exact(case)[-2:]

    def error(share):
        gradients = Gradients.allocate(problem, [True, True, False])
        gradients = cpu_sparse.loss_and_gradients(problem, case.grads[0], share, gradients)[1:3]
        return torch.stack([(g - w).norm() for g, w in zip(gradients, wanted, strict=True)])

    share = cpu_sparse.token_shares(problem, case.grads[0], torch.empty(0, dtype=torch.float64))
    assert (error(share) < 0.2 * error(torch.zeros_like(share))).all()


@settings(max_examples=10)
@given(rows=st.integers(1, 70), vocab=st.integers(9, 90), mass=st.sampled_from(BUDGETS))
def test_gradients_are_the_same_bits_every_run(rows, vocab, mass):
    case = make(rows, vocab, 16)
    first, second = (compute(case, mass) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("needs_grad", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_only_the_gradients_asked_for_are_computed(needs_grad):
    case = make(40, 100, 16, bias=True)
    _, *every = compute(case, 2**-3, (True, True, True))
    _, *some = compute(case, 2**-3, list(map(bool, needs_grad)))
    for gradient, full, needed in zip(some, every, needs_grad, strict=True):
        assert torch.equal(gradient, full) if needed else gradient.numel() == 0


def test_a_row_that_is_not_a_number_shows_in_the_gradients_as_in_eager():
    case = make(40, 100, 16)
    case.hidden[3] = torch.nan
    loss, grad_hidden, grad_weight, _ = compute(case, 2**-3)
    assert loss.isnan()
    assert grad_hidden[3].isnan().all()
    assert grad_hidden[torch.arange(40) != 3].isfinite().all()
    assert grad_weight.isnan().all()


def test_a_class_at_minus_infinity_has_no_gradient():
    case = make(40, 100, 16, bias=True)
    case.bias_vector[33:61] = -torch.inf  # whole tiles, and parts of others
    case.targets = case.targets % 33
    loss, grad_hidden, grad_weight, grad_bias = compute(case, 2**-3)
    assert all(result.isfinite().all() for result in (loss, grad_hidden, grad_weight, grad_bias))
    assert grad_weight[33:61].count_nonzero() == grad_bias[33:61].count_nonzero() == 0


# --------------------------------------------------------------------------------------- as a part of `scaled_loss`


class _Operations(TorchDispatchMode):
    """The sizes of all results."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.most = max(self.most, result.numel())
        return result


def run(case, mass):
    options = {name: value for name, value in case.options.items() if not name.startswith("want")}
    needs = [True, True, case.bias]
    return scaled_loss(*case.tensors[:4], case.grads[0], **options, needs_grad=needs, approximate_mass=mass)


def spy(monkeypatch):
    """How many rows each sparse call got."""
    calls, original = [], cpu_sparse.loss_and_gradients

    def spied(problem, *args):
        calls.append(problem.num_rows)
        return original(problem, *args)

    monkeypatch.setattr(cpu_sparse, "loss_and_gradients", spied)
    return calls


def test_rows_that_do_not_count_cost_nothing(monkeypatch):
    case = make(60, 120, 16, ignore_index=-100)
    counts = case.targets != -100
    calls = spy(monkeypatch)
    case.hidden[~counts] = torch.nan
    masked = run(case, 2**-3)
    part = make(int(counts.sum()), 120, 16)
    part.hidden, part.weight, part.targets = case.hidden[counts], case.weight, case.targets[counts]
    part.grads = [case.grads[0][counts]]
    alone = run(part, 2**-3)
    assert calls == [counts.sum()] * 2
    assert torch.equal(masked[0], alone[0])
    assert torch.equal(masked[1][counts], alone[1])
    assert not masked[1][~counts].any()
    assert torch.equal(masked[2], alone[2])


def test_a_row_without_weight_in_the_loss_has_no_gradient():
    case = make(40, 100, 16)
    case.grads[0][7] = 0.0
    grad_hidden = run(case, 2**-3)[1]
    assert not grad_hidden[7].any()
    assert grad_hidden[8].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_other_dtype_is_approximated(dtype, monkeypatch):
    case = make(40, 100, 16, dtype)
    calls = spy(monkeypatch)
    assert all(map(torch.equal, run(case, 2**-1), run(case, 0.0)))
    assert not calls


def test_zero_is_exact(monkeypatch):
    case = make(40, 100, 16)
    calls = spy(monkeypatch)
    _, *gradients = run(case, 0.0)
    assert not calls
    assert_gradients_no_worse_than_eager(case, gradients[:2])


def test_an_even_softmax_is_exact(monkeypatch):
    monkeypatch.setattr(cpu_sparse, "MOST_NEEDED", 0.6)
    case = make(40, 100, 16)
    case.hidden = case.hidden * 0.01
    calls = spy(monkeypatch)
    assert all(map(torch.equal, run(case, 2**-5), run(case, 0.0)))
    assert not calls


def test_there_are_no_logits_in_memory():
    case = make(100, 1000, 8)
    problem = case.problem(approximate_mass=2**-5)
    with _Operations() as operations:
        in_forward.loss_and_gradients(problem, case.grads[0], [True, True, False])
    assert operations.most <= 1000 * 100 // 5


@settings(max_examples=20)
@given(
    rows=st.integers(20, 70),
    vocab=st.integers(60, 200),
    logit_map=st.sampled_from(cases.MAPS),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_by_default_it_is_near_to_exact(rows, vocab, logit_map, bias, seed):
    """Each row's gradient of the hidden state moves by no more than its skipped mass may."""
    case = make(rows, vocab, 16, logit_map=logit_map, bias=bias, seed=seed)
    budget = 2**-5
    near, exact = run(case, budget)[1], run(case, 0.0)[1]
    largest = case.weight.float().norm(dim=1).max()
    slope = case.problem().logit_map.slope_bound
    allowed = 2 * budget * case.grads[0] * largest * slope + exact.float().norm(dim=1) * 2**-5 + case.grads[0] * 2**-4
    assert ((near - exact).float().norm(dim=1) <= allowed).all()
