"""What each row of a sparse backward computes, and the lists of that."""

import itertools

import pytest
import torch
from cases import interpreted
from hypothesis import given
from hypothesis import strategies as st
from sparse_cases import PART, TILE_ROWS, TILE_WIDTH, active_and_tops, all_active, make, recorded, rests_of

from cce_inductor.kernels import active as active_rules
from cce_inductor.ops import cuda, row_lists, sparse
from cce_inductor.ops.activity import activity
from cce_inductor.ops.problem import Problem, Tiles
from cce_inductor.ops.row_lists import LARGEST_FLOAT16_PIECE, LARGEST_PIECE, Active, RowLists, Skipped

pytestmark = interpreted


@pytest.mark.parametrize("mass", [2**-6, 2**-3, 2**-1])
def test_what_a_row_skips_stays_within_the_budget_and_never_its_target(mass):
    case = make(50, 150, 24)
    problem = case.problem(approximate_mass=mass)
    lse, tiles = cuda.forward(problem)[0], recorded(case)
    active, tops = active_and_tops(all_active(problem, lse, tiles, case.grads))
    counts = case.targets != -100
    mass_of = torch.exp(tiles.lse - lse)
    approximated = torch.where(active, 0.0, mass_of * rests_of(tiles, tops))
    skipped = approximated.sum(0)[counts]
    assert (skipped <= mass * (1 + 1e-5)).all()
    assert skipped.max() > 0
    of_target = case.targets[counts] // TILE_WIDTH, counts.nonzero().squeeze(1)
    assert (active | tops[..., 0])[of_target].all()
    assert tops[of_target].any(0).all()  # alone, and another one
    assert torch.equal(tiles.tops[of_target][:, 0] % TILE_WIDTH, case.targets[counts].int() % TILE_WIDTH)
    assert not active[:, ~counts].any()
    assert not tops[:, ~counts].any()
    assert (tops[..., 0] | ~tops[..., 1]).all()
    assert not (active & tops[..., 0]).any()


def of_masses(masses, *shares):
    """Records of tiles with these masses [tiles, N], of rows whose lse is 0, and whose heaviest tokens have shares.

    They are the first in the tile; the second has nothing unless it has a share.
    """
    first, second = (*shares, 0.0, 0.0)[:2]
    left = torch.tensor([1 - first, 1 - first - second]).expand(*masses.shape, 2).contiguous()
    return Tiles(masses.log(), (left.view(torch.int32) & -TILE_WIDTH) | torch.tensor([0, 1], dtype=torch.int32))


def planned(mass, masses, *shares, tops=True, dtype=torch.float32):
    """What rows with a gradient and no target need of tiles with these masses, where so much may be approximated."""
    count, rows = masses.shape
    problem = make(rows, count * TILE_WIDTH, 1, dtype=dtype).problem(approximate_mass=mass)
    gradients = torch.ones(rows), torch.zeros(rows)
    return all_active(problem, torch.zeros(rows), of_masses(masses, *shares), gradients, tops)


def test_a_run_of_rows_without_a_gradient_needs_nothing():
    """Whatever is in the memory of the results: many of them are not looked at at all."""
    case = make(100, 150, 24)
    case.grads[0][:70] = case.grads[1][:70] = 0.0
    problem = case.problem(approximate_mass=2**-3)
    lse, tiles = cuda.forward(problem)[0], recorded(case)
    torch.use_deterministic_algorithms(True)  # fills new memory with true and with large numbers
    try:
        active = all_active(problem, lse, tiles, case.grads)
    finally:
        torch.use_deterministic_algorithms(False)
    pairs, tops = active_and_tops(active)
    assert not pairs[:, :70].any()
    assert not tops[:, :70].any()
    assert not active.row_count[:70].any()
    assert active.row_count[70:].any()


@pytest.mark.parametrize("mass", [2**-4, 2**-2])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_many_light_tiles_are_skipped_to_within_the_budget(mass, share):
    """Each of them is light enough, and all of them together are too heavy. Of tops only the rest counts."""
    light, rows = 1600, 8
    rests = torch.rand(light, rows, generator=torch.Generator().manual_seed(0)) ** 5 * mass * LARGEST_PIECE / 4
    shares = rests / (1 - share)
    shares = torch.cat([shares, 1 - shares.sum(0, keepdim=True)])
    active, tops = active_and_tops(planned(mass, shares, share))
    assert torch.equal(tops[..., 0], ~active & (shares > mass**3 * row_lists.TOP_PART) & (share > 0))
    assert not tops[..., 1].any()
    skipped = torch.where(active, 0.0, torch.where(tops[..., 0], (1 - share) * shares, shares)).sum(0)
    assert (skipped <= mass * (1 + 1e-5)).all()
    assert (skipped > 0.9 * mass).all()


@pytest.mark.parametrize(
    ("shares", "needed"), [((0.0,), True), ((0.5,), True), ((0.99,), False), ((0.6, 0.2), True), ((0.6, 0.39), False)]
)
def test_a_heavy_tile_that_is_nearly_two_tokens_needs_only_these(shares, needed):
    """Half of the budget in one tile, of which at most a small part may be approximated."""
    mass = 2**-3
    masses = torch.tensor([[1 - mass / 2], [mass / 2]])
    active, tops = active_and_tops(planned(mass, masses, *shares))
    assert active[1].item() == needed
    assert tops[1, 0].tolist() == [not needed, not needed and len(shares) == 2]


@pytest.mark.parametrize("part", [0.9, 1.1])  # a threshold is found to within a factor of 1.06
@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float32, LARGEST_PIECE), (torch.bfloat16, LARGEST_PIECE), (torch.float16, LARGEST_FLOAT16_PIECE)],
    ids=str,
)
def test_a_tile_is_skipped_if_it_is_light_though_the_budget_has_room(part, dtype, largest):
    mass = 2**-3
    piece = mass * largest * part
    active, _ = active_and_tops(planned(mass, torch.tensor([[1 - piece], [piece]]), dtype=dtype))
    assert active[:, 0].tolist() == [True, part > 1]


@pytest.mark.parametrize(("weight", "share", "computed"), [(1.0, 0.5, True), (1.0, 0.1, False), (0.1, 0.5, False)])
def test_a_token_is_computed_alone_where_it_stands_out(weight, share, computed):
    """In tiles that are heavy enough, and that it has enough of."""
    mass = 2**-3
    masses = torch.full((20, 1), weight * mass**3 * row_lists.TOP_PART * 1.01)
    masses[0] = 1 - masses[1:].sum()
    active = planned(mass, masses, share)
    assert active_and_tops(active)[1].any() == computed
    assert share < 1 - active_rules.MOST_LEFT.value or weight < 1 or computed
    assert active.row_count.item() == 19 * computed
    if computed:  # the first column of each but the first tile
        assert active.row_tokens[0, :19].tolist() == [2 * TILE_WIDTH * tile for tile in range(1, 20)]
    assert not active_and_tops(planned(mass, masses, share, tops=False))[1].any()


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
    lse, tiles = cuda.forward(problem)[0], recorded(case)
    needed, tops = active_and_tops(all_active(problem, lse, tiles, case.grads))
    most = row_lists.most_blocks_of_a_tile(rows, TILE_ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_lists, "DENSE_SHARE", dense_share)
        active = Active.of(problem, lse, tiles, case.row_gradients(), TILE_WIDTH, PART)
    lists = RowLists.of(active, tiles, TILE_ROWS, most + extra, TILE_WIDTH, PART)
    skipped = Skipped.of(problem, lse, tiles, case.grads[0], active, TILE_WIDTH)
    dense, *listed = active.pairs
    assert torch.equal(dense, needed.sum(0) > dense_share * len(needed))
    tops = tops & ~dense[:, None]
    assert torch.equal(torch.stack(listed), torch.cat([needed & ~dense, tops.view(-1, rows)]))
    part_of = tiles.tops % TILE_WIDTH // PART
    parts = [(top & (part == here)).flatten() for top, part in zip(tops, part_of, strict=True) for here in (0, 1)]
    lists_of = [dense, *(needed & ~dense), *parts]
    assert active.counts.tolist() == [listed.sum() for listed in lists_of]
    for row, count in enumerate(active.row_count.tolist()):
        tile, which = tops[:, row].nonzero().unbind(1)
        tokens = tile * TILE_WIDTH + tiles.tops[tile, row, which] % TILE_WIDTH
        assert torch.equal(active.row_tokens[row, :count].long(), 2 * tokens + which)

    starts = lists.list_start.tolist()
    for rows_of_list, start, end in zip(lists_of, starts[:-1], starts[1:], strict=True):
        assert_list(lists, rows_of_list, start, end)
    for tile, (start, end) in enumerate(itertools.pairwise(starts[1 : len(needed) + 2])):
        assert (lists.slot_tile[start:end] == tile).all()
    mass = torch.exp(tiles.lse - lse) * case.grads[0] / case.grads[0].abs().max()
    wanted = torch.where(needed | dense, 0.0, (mass * rests_of(tiles, tops)).nan_to_num())
    torch.testing.assert_close(skipped.mass, wanted, rtol=1e-5, atol=1e-12)
    assert torch.equal(skipped.anything, (~needed & ~dense & (case.grads[0] != 0)).any(1))

    assert lists.round_tiles[[0, -1]].tolist() == [0, len(needed)]
    blocks = lists.list_start[1 : len(needed) + 2].diff() + starts[1]
    for first, last in zip(lists.round_tiles, lists.round_tiles[1:], strict=False):
        assert blocks[first:last].sum() <= most + extra


def assert_list(lists, listed, start, end):
    """The slots from start to end hold the true elements of `listed`, in order, and are filled up."""
    span = lists.slot_rows[start * TILE_ROWS : end * TILE_ROWS]
    count = listed.sum()
    assert len(span) == -(-count // TILE_ROWS) * TILE_ROWS
    assert torch.equal(span[:count], listed.nonzero().squeeze(1).int())
    assert (span[count:] == -1).all()


def test_activity_says_what_is_computed(monkeypatch):
    case = make(70, 150, 24)
    monkeypatch.setattr(sparse, "LEAST_FLOPS", 0)
    monkeypatch.setattr(cuda, "recorded_tiles", lambda *_: 5)
    found = activity(case.hidden, case.weight, case.targets, 2**-3)
    problem = Problem.plain(case.hidden, case.weight, case.targets, None, 2**-3)
    results, grad = cuda.forward(problem), (case.targets != -100).float()
    pairs, tops = active_and_tops(all_active(problem, results.lse, results.tiles, (grad, -grad)))
    dense = pairs.sum(0) > row_lists.DENSE_SHARE * len(pairs)
    assert found.tokens == pytest.approx((tops & ~dense[:, None]).sum().item() / pairs.numel())
    assert found.pairs == pytest.approx((pairs | dense).sum().item() / pairs.numel())
    assert found.tokens > 0
    assert 0 < found.pairs < found.blocks
