"""The sparse backward: exact where it may skip nothing, and what it skips is put back."""

import os

import pytest
import torch
from cases import MAPS, Case, assert_no_worse, eager, exact, uncertainty
from hypothesis import given
from hypothesis import strategies as st

from cce_inductor.ops import cuda, row_lists, sparse
from cce_inductor.ops.problem import evenly_spaced
from cce_inductor.ops.row_lists import RowLists

TILE_ROWS, TILE_WIDTH = 16, 32  # of the interpreter's tiles

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "there is a GPU, so Triton compiles: tests/ops/test_gpu.py runs the kernels on it", allow_module_level=True
    )


@pytest.fixture(autouse=True)
def _few_sampled_rows(monkeypatch):
    monkeypatch.setattr(sparse, "SAMPLED_ROWS", 16)


def make(rows, vocab, width, **options):
    """A problem that the sparse backward takes, with a softmax peaked as a trained model's, and gradients of a loss."""
    case = Case(rows, vocab, width, **{"bias": False, "total": False, "class_weight": False} | options)
    case.hidden = case.hidden * 4
    counts = case.targets != case.ignore_index
    case.grads[0] = torch.where(counts, case.grads[0].abs(), 0.0)
    case.grads[1] = -case.grads[0]
    return case


def backward(case, mass, workspace_bytes=1 << 16):
    problem = case.problem(approximate_mass=mass, workspace_bytes=workspace_bytes)
    lse = cuda.forward(problem)[0]
    return sparse.backward(problem, lse, tile_lse(case, problem), case.row_gradients(), [True, True, False])


def tile_lse(case, problem):
    bias = 0.0 if case.bias_vector is None else case.bias_vector.double()
    x = problem.logit_map(case.hidden.double() @ case.weight.double().T + bias)
    return torch.stack([tile.logsumexp(1) for tile in x.split(TILE_WIDTH, dim=1)]).float()


def all_active(problem, lse, tiles, grads):
    """[tiles, N]: the tiles that each row needs, with no row dense."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_lists, "DENSE_SHARE", 1.0)
        return row_lists._active(problem, lse, tiles, grads[0], grads[1], TILE_WIDTH)[0][:-1]


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


@pytest.mark.parametrize("mass", [2**-6, 2**-3, 2**-1])
def test_what_a_row_skips_stays_within_the_budget_and_never_its_target(mass):
    case = make(50, 150, 24)
    problem = case.problem(approximate_mass=mass)
    lse, tiles = cuda.forward(problem)[0], tile_lse(case, problem)
    active = all_active(problem, lse, tiles, case.grads)
    counts = case.targets != -100
    skipped = torch.where(active, 0.0, torch.exp(tiles - lse)).sum(0)[counts]
    assert (skipped <= mass * (1 + 1e-5)).all()
    assert skipped.max() > 0
    assert active[case.targets[counts] // TILE_WIDTH, counts.nonzero().squeeze(1)].all()
    assert not active[:, ~counts].any()


@pytest.mark.parametrize("mass", [2**-4, 2**-2])
def test_many_light_tiles_are_skipped_to_within_the_budget(mass):
    """Each of them is light enough, and all of them together are too heavy."""
    light, rows = 600, 8
    case = make(rows, (light + 1) * TILE_WIDTH, 1)
    shares = torch.rand(light, rows, generator=torch.Generator().manual_seed(0)) * mass / 128
    shares = torch.cat([shares, 1 - shares.sum(0, keepdim=True)])
    gradients = torch.ones(rows), torch.zeros(rows)
    active = all_active(case.problem(approximate_mass=mass), torch.zeros(rows), shares.log(), gradients)
    skipped = torch.where(active, 0.0, shares).sum(0)
    assert (skipped <= mass * (1 + 1e-5)).all()
    assert (skipped > 0.9 * mass).all()


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
    lse, tiles = cuda.forward(problem)[0], tile_lse(case, problem)
    some = sparse.backward(problem, lse, tiles, case.row_gradients(), needs_grad)
    both = sparse.backward(problem, lse, tiles, case.row_gradients(), [True, True, False])
    for gradient, full, needed in zip(some, both, needs_grad, strict=True):
        assert torch.equal(gradient, full) if needed else gradient.numel() == 0


@given(
    rows=st.integers(1, 70),
    vocab=st.integers(1, 150),
    extra=st.integers(0, 20),
    mass=st.sampled_from([0.0, 2**-5, 2**-1]),
    dense_share=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    seed=st.integers(0, 99),
)
def test_lists_hold_each_needed_pair_once_and_rounds_fit_in_the_workspace(rows, vocab, extra, mass, dense_share, seed):
    case = make(rows, vocab, 16, seed=seed)
    problem = case.problem(approximate_mass=mass)
    lse, tiles = cuda.forward(problem)[0], tile_lse(case, problem)
    needed = all_active(problem, lse, tiles, case.grads)
    most = row_lists.most_blocks_of_a_tile(rows, TILE_ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_lists, "DENSE_SHARE", dense_share)
        active, counts = row_lists._active(problem, lse, tiles, case.grads[0], case.grads[1], TILE_WIDTH)
        lists = RowLists.of(problem, lse, tiles, case.grads[0], case.grads[1], most + extra)
    *own, dense = active
    assert torch.equal(dense, needed.sum(0) > dense_share * len(tiles))
    assert torch.equal(torch.stack(own), needed & ~dense)
    assert torch.equal(counts, active.sum(1))

    starts = lists.tile_start.tolist()
    assert_list(lists, dense, 0, starts[0])
    for tile, rows_of_tile in enumerate(own):
        assert_list(lists, rows_of_tile, starts[tile], starts[tile + 1])
        assert (lists.slot_tile[starts[tile] : starts[tile + 1]] == tile).all()
    mass = torch.exp(tiles - lse) * case.grads[0] / case.grads[0].abs().max()
    wanted = torch.where(needed | dense, 0.0, mass.nan_to_num())
    torch.testing.assert_close(lists.skipped_mass, wanted, rtol=1e-5, atol=1e-12)
    assert torch.equal(lists.skips, (~needed & ~dense & (case.grads[0] != 0)).any(1))

    assert lists.round_tiles[[0, -1]].tolist() == [0, len(tiles)]
    blocks = lists.tile_start.diff() + starts[0]
    for first, last in zip(lists.round_tiles, lists.round_tiles[1:], strict=False):
        assert blocks[first:last].sum() <= most + extra


def assert_list(lists, listed, start, end):
    """The slots from start to end hold the true elements of `listed`, in order, and are filled up."""
    span = lists.slot_rows[start * TILE_ROWS : end * TILE_ROWS]
    count = listed.sum()
    assert len(span) == -(-count // TILE_ROWS) * TILE_ROWS
    assert torch.equal(span[:count], listed.nonzero().squeeze(1).int())
    assert (span[count:] == -1).all()
