"""The sparse backward: exact where it may skip nothing, and what it skips is put back."""

import pytest
import torch
from cases import INTERPRETED, MAPS, NOT_INTERPRETED, Case, assert_no_worse, costly, eager, exact, uncertainty
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import (
    TILE_WIDTH,
    active_and_tops,
    all_active,
    backward,
    few_sampled_rows,
    make,
    recorded,
    shares_left,
    target_logits,
)

from cce_inductor.compat import FakeTensorMode
from cce_inductor.ops import cuda, row_lists, shares, sparse
from cce_inductor.ops.kept_tiles import KeptTiles
from cce_inductor.ops.library import vocab_reductions
from cce_inductor.ops.problem import Problem, Reductions, evenly_spaced
from cce_inductor.ops.sparse_rounds import MOST_ROUNDS

if not INTERPRETED:
    pytest.skip(NOT_INTERPRETED, allow_module_level=True)

__all__ = ["few_sampled_rows"]  # a fixture of this module too


@costly
@given(
    rows=st.integers(1, 70),
    vocab=st.integers(1, 150),
    width=st.integers(1, 40),
    logit_map=st.sampled_from(MAPS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    dense_share=st.sampled_from([0.0, 1.0]),
    workspace_bytes=st.sampled_from([1, 8192, 1 << 20]),
)
def test_nothing_skipped_is_no_worse_than_eager(
    rows, vocab, width, logit_map, dtype, bias, dense_share, workspace_bytes
):
    """Whether the rows are listed in each tile or, as dense ones, once; with a bias that needs no gradient too."""
    case = make(rows, vocab, width, logit_map=logit_map, dtype=dtype, bias=bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_lists, "DENSE_SHARE", dense_share)
        gradients = backward(case, 0.0, workspace_bytes)[:2]
    allowances = uncertainty(case, interpreted=True)
    for i, gradient in enumerate(gradients, start=3):
        assert_no_worse([case.names[i]], [gradient], [exact(case)[i]], [eager(case)[i]], [allowances[i]])


@given(holds=st.lists(st.booleans(), min_size=1, max_size=60), count=st.integers(1, 20))
def test_the_sample_is_of_rows_that_count(holds, count):
    chosen = evenly_spaced(torch.tensor(holds), count).tolist()
    assert len(chosen) == count
    assert all(0 <= place < len(holds) for place in chosen)
    if places := [place for place, held in enumerate(holds) if held]:
        assert chosen == [places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)]


@given(holds=st.lists(st.booleans(), min_size=1, max_size=60), count=st.integers(1, 70))
def test_the_kernel_takes_the_same_sample(holds, count):
    sample = shares.sample_of(torch.tensor(holds).float(), count)
    expected = evenly_spaced(torch.tensor(holds), min(count, len(holds)))
    assert len(sample) == len(expected)
    assert torch.equal(sample.long(), expected) or not any(holds)
    assert ((sample >= 0) & (sample < len(holds))).all()


def specified(case, problem, lse, tiles, dense_share):
    """The gradients of hidden and weight in float64, as `kernels/sparse.py` and `kernels/share.py` specify them.

    Then the sums of the absolute values of what is added up there, with the largest slopes that there are.
    """
    grads = [grad.double() for grad in case.grads[:2]]
    counts = case.targets != case.ignore_index
    bias = 0.0 if case.bias_vector is None else case.bias_vector.double()
    hidden, weight = case.hidden.double(), case.weight.double()
    x, slope = problem.logit_map.value_and_derivative(hidden @ weight.T + bias)
    slope = torch.ones_like(x) if slope is None else slope
    p = torch.exp(x - lse.double()[:, None])
    active, tops = active_and_tops(all_active(problem, lse, tiles, case.grads))
    dense = active.sum(0) > dense_share * len(active)
    active, tops = active | (dense & counts), tops & ~dense[:, None]
    tile_of = torch.arange(x.shape[1]) // TILE_WIDTH
    places = torch.where(tops, tiles.tops % TILE_WIDTH, -1)[tile_of]  # [V, N, 2]
    is_top = (torch.arange(x.shape[1])[:, None, None] % TILE_WIDTH == places).any(2).T
    computed = active[tile_of].T | is_top
    rest = torch.where(computed, 0.0, p)  # of rows and columns

    sample = evenly_spaced(case.grads[0] != 0, min(shares.SAMPLED_ROWS, case.rows))
    weights = grads[0][sample, None].abs() * torch.where(active[tile_of].T[sample], 2.0**-10, 1 + 2.0**-10)
    weights = torch.where(is_top[sample], 0.0, weights)
    in_tile = torch.nn.functional.one_hot(tile_of).double()  # [V, tiles]
    share = (weights * p[sample] * slope[sample]).sum(0) / ((weights * p[sample]).sum(0) @ in_tile)[tile_of]
    share = torch.where(share.isfinite() & (rest != 0).any(0), share, 0.0)

    kept = torch.where(computed, p * grads[0][:, None], 0.0)
    skipped = (rest * grads[0][:, None] @ in_tile)[:, tile_of] * share
    picked = torch.zeros_like(kept)
    picked[counts, case.targets[counts]] = grads[1][counts]
    dz = (kept + picked) * slope + skipped
    size = (kept.abs() + picked.abs()) * slope.abs().max() + skipped.abs()
    return dz @ weight, dz.T @ hidden, size @ weight.abs(), size.T @ hidden.abs()


@costly
@given(
    rows=st.integers(1, 70),
    vocab=st.integers(1, 150),
    width=st.integers(1, 40),
    logit_map=st.sampled_from(MAPS),
    bias=st.booleans(),
    mass=st.sampled_from([2**-5, 2**-2]),
    dense_share=st.sampled_from([0.6, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_gradients_are_the_specified_ones(rows, vocab, width, logit_map, bias, mass, dense_share, seed):
    assert_as_specified(make(rows, vocab, width, logit_map=logit_map, bias=bias, seed=seed), mass, dense_share)


@settings(max_examples=5)
@given(
    logit_map=st.sampled_from(["5.0*tanh(z/5.0)", "30.0*tanh(z/30.0)", "1.0 - 6.0*sigmoid(z/3.0)"]),
    mass=st.sampled_from([2**-5, 2**-2]),
    seed=st.integers(0, 99),
)
def test_slopes_that_are_known_by_logits_are_the_specified_ones(logit_map, mass, seed):
    """In the forward the logits of targets are at hand, which tells the last of the slopes."""
    case = make(64, 150, 24, logit_map=logit_map, bias=True, seed=seed)
    assert_as_specified(case, mass, 0.6, target_logit=target_logits(case))


def assert_as_specified(case, mass, dense_share, target_logit=None):
    problem = case.problem(approximate_mass=mass)
    lse, tiles = cuda.forward(problem)[0], recorded(case)
    grads = case.row_gradients(target_logit=target_logit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_lists, "DENSE_SHARE", dense_share)
        gradients = sparse.backward(problem, lse, tiles, grads, [True, True, False])[:2]
    *wanted, of_hidden, of_weight = specified(case, problem, lse, tiles, dense_share)
    # the share of a tile without a token, and the token's dz, give five bits to its place
    cut_off = 2 * TILE_WIDTH * torch.finfo(torch.float32).eps
    for mine, theirs, size in zip(gradients, wanted, (of_hidden, of_weight), strict=True):
        assert (mine.double() - theirs).norm() <= cut_off * size.norm()


@settings(max_examples=6)
@given(mass=st.sampled_from([2**-5, 2**-3, 2**-1]), seed=st.integers(0, 99))
def test_skipped_mass_is_put_back_in_its_tile(mass, seed):
    """With hidden states of ones in one place, the weight's gradient there sums to all rows' gradients of the lse."""
    case = make(64, 150, 24, seed=seed)
    case.hidden[:, 0] = 1.0
    grad_weight = backward(case, mass)[1].double()[:, 0]
    onehot = torch.zeros(150, dtype=torch.float64).index_add_(
        0, case.targets.clamp(min=0), case.grads[1].double() * (case.targets != -100)
    )
    for tile, wanted in zip((grad_weight - onehot).split(TILE_WIDTH), _tile_masses(case), strict=True):
        # share and skipped mass are float32, and there are as many roundings as summands
        assert abs(tile.sum() - wanted) <= 150 * torch.finfo(torch.float32).eps * wanted.abs().clamp(min=1)


def _tile_masses(case):
    p = torch.softmax(case.hidden.double() @ case.weight.double().T, 1) * case.grads[0].double().unsqueeze(1)
    return [tile.sum() for tile in p.split(TILE_WIDTH, dim=1)]


@given(
    rows=st.integers(1, 40),
    vocab=st.integers(1, 150),
    logit_map=st.sampled_from(MAPS),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_forward_records_the_two_heaviest_tokens_or_the_target_and_another(rows, vocab, logit_map, bias, seed):
    case = make(rows, vocab, 16, logit_map=logit_map, bias=bias, seed=seed, ignore_index=-1)
    problem = case.problem(approximate_mass=2**-5)
    tiles, wanted = _recorded_by_the_forward(problem), recorded(case)
    # of two tokens that are equally heavy either may be found, and the place takes five bits
    cut_off = 2 * TILE_WIDTH * torch.finfo(torch.float32).eps
    torch.testing.assert_close(tiles.lse, wanted.lse)
    torch.testing.assert_close(shares_left(tiles), shares_left(wanted), rtol=cut_off, atol=cut_off)
    bias_vector = 0.0 if case.bias_vector is None else case.bias_vector
    x = problem.logit_map(case.hidden @ case.weight.T + bias_vector)
    for number, columns in enumerate(tiles.tops.long() % TILE_WIDTH):
        of_tile = x[:, number * TILE_WIDTH : (number + 1) * TILE_WIDTH]
        holds_target = (case.targets // TILE_WIDTH == number) & (case.targets != case.ignore_index)
        for which in range(min(2, of_tile.shape[1])):  # of one column there is no second
            found = of_tile.gather(1, columns[:, which, None]).squeeze(1)
            heaviest = found >= of_tile.amax(1) - cut_off - 1e-5 * of_tile.amax(1).abs()
            if which == 0:
                heaviest = torch.where(holds_target, columns[:, 0] == case.targets % TILE_WIDTH, heaviest)
            assert heaviest.all()
            of_tile = of_tile.scatter(1, columns[:, which, None], -torch.inf)


def _recorded_by_the_forward(problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "recorded_tiles", lambda *_: -(-problem.vocab_size // TILE_WIDTH))
        return cuda.forward(problem).tiles


def test_the_forward_records_of_a_tile_without_a_finite_logit_that_nothing_is_left():
    case = make(20, 3 * TILE_WIDTH, 16, bias=True)
    case.bias_vector[TILE_WIDTH : 2 * TILE_WIDTH] = -torch.inf
    case.targets %= TILE_WIDTH
    assert (shares_left(_recorded_by_the_forward(case.problem(approximate_mass=2**-5)))[1] == 0).all()


@pytest.mark.parametrize(("picks", "may_skip"), [(None, True), (1, False), (3, False)])
def test_several_targets_of_a_row_are_left_to_the_exact_backward(picks, may_skip, monkeypatch):
    """For them nothing is recorded, as the fake implementation knows too."""
    monkeypatch.setattr(sparse, "LEAST_FLOPS", 0)
    monkeypatch.setattr(cuda, "device_properties", lambda _: ((9, 0), 132))
    options = Case(9, 300, 6, torch.bfloat16, total=False).options | {"approximate_mass": 2**-4}
    with FakeTensorMode():
        hidden, weight = (torch.empty(rows, 6, dtype=torch.bfloat16, device="cuda") for rows in (9, 300))
        target = torch.empty((9,) if picks is None else (9, picks), dtype=torch.int64, device="cuda")
        problem = Problem.of(hidden, weight, None, target, None, **options)
        results = Reductions(*vocab_reductions(hidden, weight, None, target, None, **options))
        assert sparse.worthwhile(problem, [True, True, False]) == cuda.may_skip(problem) == may_skip
    assert results.tile_lse.shape == ((2 if may_skip else 0), 9)
    assert results.tile_tops.shape == (*results.tile_lse.shape, 2)


def test_a_small_workspace_takes_no_more_than_so_many_rounds():
    case = make(70, 200 * TILE_WIDTH, 8)
    problem = case.problem(approximate_mass=2**-3, workspace_bytes=1)
    operands = cuda.forward(problem)[0], recorded(case), case.row_gradients()
    lists = sparse._SparseBackward(problem, *operands, want_hidden=True, kept=KeptTiles()).lists
    assert 1 < lists.rounds <= MOST_ROUNDS


def test_the_error_shrinks_with_the_budget():
    case = make(64, 600, 24)
    case.hidden = case.hidden[:4].repeat_interleave(16, 0) / 3  # rows that agree on what to skip, and much to skip
    wanted = exact(case)[3:5]
    errors = [
        sum((g.double() - w).norm().item() for g, w in zip(backward(case, mass)[:2], wanted, strict=True))
        for mass in (2**-1, 2**-3, 2**-5, 0.0)
    ]
    assert errors == sorted(errors, reverse=True)


def test_a_row_that_is_not_a_number_shows_in_the_gradients_as_in_eager():
    case = make(40, 100, 16)
    case.hidden[3] = torch.nan
    case.grads[0][3], case.grads[1][3] = 1.0, -1.0
    grad_hidden, grad_weight, _ = backward(case, 2**-3)
    assert grad_hidden[3].isnan().all()
    assert grad_hidden[torch.arange(40) != 3].isfinite().all()
    assert grad_weight.isnan().all()


@pytest.mark.parametrize("needs_grad", [[True, False, False], [False, True, False]])
def test_only_what_is_needed_is_computed(needs_grad):
    case = make(40, 100, 16)
    problem = case.problem(approximate_mass=0.0)
    lse, tiles = cuda.forward(problem)[0], recorded(case)
    some = sparse.backward(problem, lse, tiles, case.row_gradients(), needs_grad)
    both = sparse.backward(problem, lse, tiles, case.row_gradients(), [True, True, False])
    for gradient, full, needed in zip(some, both, needs_grad, strict=True):
        assert torch.equal(gradient, full) if needed else gradient.numel() == 0
