"""What the forward keeps for a sparse backward, in 8 bits a logit: where, how exactly, and what comes of it."""

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import TILE_WIDTH, backward, few_sampled_rows, make, mapped_logits, recorded, target_logits
from test_kept_tiles import in_triton

from cce_inductor.kernels.config import HOPPER_BACKWARD, HOPPER_PRODUCT
from cce_inductor.logit_map import STEEPEST
from cce_inductor.ops import cuda, row_lists, sparse
from cce_inductor.ops.kept_tiles import KeptTiles
from cce_inductor.ops.problem import MIB, Problem
from cce_inductor.ops.sparse_rounds import FEW_ROUNDS, MOST_ROUNDS, blocks_of_a_round, room_for_codes
from cce_inductor.ops.workspace import MOST_FOR_CODES, for_approximate_loss

# the interpreter meets nan and infinity with numpy's warnings
pytestmark = [cases.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
__all__ = ["few_sampled_rows", "in_triton"]  # fixtures of this module too

BF16, FP32 = torch.bfloat16, torch.float32
HALF = 0.5 / 255  # of the cube root of a share by that of the largest: what is nearer than this to a code becomes it
CUT = 2.0**-17  # by so much of itself may be off what the tops of a tile leave: their columns take its last bits


# ------------------------------------------------------------------------------------------------------------ layout


def codes_of(place, tile, rows):
    """[N, columns of a tile] of a tile in a place."""
    first = (tile - place.tiles[0]) * place.tile_stride
    return place.logits[first:].as_strided((rows, TILE_WIDTH), (place.row_stride, 1))


@given(
    rows=st.integers(1, 40),
    vocab=st.integers(1, 300),
    width=st.integers(1, 60),
    apart=st.integers(0, 20_000),
    at_once=st.integers(1, 4),
    dtype=st.sampled_from((BF16, FP32, None)),
)
def test_no_gradient_is_written_over_codes_that_will_be_read(rows, vocab, width, apart, at_once, dtype):
    """Whatever number of tiles a round has. Without a gradient of the weight there is no room in it."""
    problem = cases.Case(rows, vocab, width, BF16).problem()
    grad_weight = torch.empty((vocab, width) if dtype else 0, dtype=dtype or BF16)
    kept = KeptTiles.coded(problem, TILE_WIDTH, apart, grad_weight)
    of_tile = {tile: codes_of(place, tile, rows) for place in kept.places for tile in range(*place.tiles)}
    assert list(of_tile) == list(range(len(of_tile)))
    assert kept.bytes_apart <= apart
    for tile, codes in of_tile.items():
        codes.fill_(tile)
    tiles = -(-vocab // TILE_WIDTH)
    for first in range(0, tiles, at_once):
        for tile in range(first, min(first + at_once, len(of_tile))):
            assert (of_tile[tile] == tile).all()
        grad_weight[first * TILE_WIDTH : (first + at_once) * TILE_WIDTH] = -1
    assert (grad_weight == -1).all()
    size = rows * TILE_WIDTH
    assert len(of_tile) >= min(
        tiles, apart // size + max(0, grad_weight.nbytes // max(size, width * TILE_WIDTH * 4) - 1)
    )


HEADS = {  # of well-known models, and a long batch: (tokens, vocabulary, width, share that is kept)
    "gemma2": (8192, 256000, 2304, 0.954),
    "llama3": (8192, 128256, 4096, 1.0),
    "qwen": (8192, 152064, 3584, 1.0),
    "gpt2": (16384, 50257, 768, 0.565),
    "phi": (8192, 32064, 3072, 1.0),
    "long": (131072, 256000, 2304, 0.035),
}


def divided(rows, vocab, width, workspace_mib):
    """(problem, kept tiles, blocks of a round) on an H100, without memory for the operands."""
    hidden, weight = (torch.empty(size, width, dtype=BF16, device="meta") for size in (rows, vocab))
    problem = Problem.plain(hidden, weight, torch.empty(rows, dtype=torch.int64, device="meta"), workspace_mib, 2**-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        problem = for_approximate_loss(problem)
    room = room_for_codes(problem, HOPPER_BACKWARD, HOPPER_PRODUCT, 132)
    kept = KeptTiles.coded(problem, HOPPER_BACKWARD.block_v, room, weight)
    blocks = blocks_of_a_round(problem, HOPPER_BACKWARD, HOPPER_PRODUCT, 132, kept.bytes_apart)
    return problem, kept, blocks


@pytest.mark.parametrize(("rows", "vocab", "width", "share"), HEADS.values(), ids=HEADS)
def test_the_share_of_large_heads(rows, vocab, width, share):
    _, kept, _ = divided(rows, vocab, width, None)
    assert kept.places[-1].columns.stop / vocab == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("workspace_mib", [None, 64, 256, 1024])
@pytest.mark.parametrize("head", HEADS)
def test_codes_and_blocks_share_the_workspace(head, workspace_mib):
    rows, vocab, width, _ = HEADS[head]
    problem, kept, blocks = divided(rows, vocab, width, workspace_mib)
    tiles, of_tile = -(-vocab // 256), -(-rows // 128)
    bytes_of_blocks = blocks * 128 * 256 * 2
    if workspace_mib is None:
        assert 256 * MIB <= problem.workspace_bytes <= 256 * MIB + MOST_FOR_CODES
    else:
        assert problem.workspace_bytes == workspace_mib * MIB
    lists = 18 * tiles * rows + 2 * of_tile * 128 * width
    least = (of_tile + 2 + tiles * (of_tile + 1) // MOST_ROUNDS) * 128 * 256 * 2
    assert kept.bytes_apart + bytes_of_blocks <= max(problem.workspace_bytes - lists, least)
    if kept.bytes_apart:  # what codes take does not make rounds small
        of_round = blocks // of_tile - 1
        assert -(-tiles // of_round) <= FEW_ROUNDS * 1.25
        assert of_round * -(-width // HOPPER_PRODUCT.weight_depth) >= 132 * 0.9


# ------------------------------------------------------------------------------------------------------------- codes


def roots_of(x):
    """exp((x - the largest of its tile) / 3), in the shape of x [N, V]."""
    return torch.cat([torch.exp((tile - tile.amax(1, keepdim=True)) / 3) for tile in x.split(TILE_WIDTH, 1)], 1)


def what_codes_round(x, tiles):
    """[N, V]: by how much each probability may be off where the tiles' tops and sums are exact, and the others' cubes.

    Where the sum of these may be nothing but rounding, by all that is left of the tile.
    """
    off_by = []
    for p, root, tops in zip(
        torch.softmax(x, 1).split(TILE_WIDTH, 1), roots_of(x).split(TILE_WIDTH, 1), tiles.tops, strict=True
    ):
        is_top = (torch.arange(p.shape[1])[None, :, None] == (tops % TILE_WIDTH)[:, None, :]).any(2)
        p, cube, off = (torch.where(is_top, 0.0, value) for value in (p, root**3, (root + HALF) ** 3 - root**3))
        left, total, most = (value.sum(1, keepdim=True) for value in (p, cube, off))
        of_others = (off + cube * most / total.clamp(min=1e-300)) / (total - most).clamp(min=1e-300)
        off_by.append(left * of_others.clamp(max=1.0))
    return torch.cat(off_by, 1)


@given(
    rows=st.integers(1, 40),
    vocab=st.integers(1, 150),
    spread=st.sampled_from([0.1, 1.0, 4.0, 100.0]),
    ignore_index=st.sampled_from((-100, 0)),
    seed=st.integers(0, 99),
)
def test_a_code_is_the_nearest_and_that_of_the_heaviest_the_largest(rows, vocab, spread, ignore_index, seed):
    case = make(rows, vocab, 16, seed=seed, ignore_index=ignore_index)
    case.hidden *= spread / 4
    problem = case.problem(approximate_mass=2**-5, skip_ignored=True)
    kept = KeptTiles.coded(problem, TILE_WIDTH, MIB, torch.empty(vocab, 16))
    cuda.reduce(problem, kept)
    x = case.hidden.double() @ case.weight.double().T
    x = torch.nn.functional.pad(x, (0, -vocab % TILE_WIDTH), value=-torch.inf)
    right = roots_of(x)
    got = torch.cat([codes_of(place, tile, rows) for place in kept.places for tile in range(*place.tiles)], 1)
    counts = torch.ones(rows, dtype=torch.bool) if problem.counts is None else problem.counts
    rounding = 32 * torch.finfo(FP32).eps * x[:, :vocab].abs().max().clamp(min=1)
    right, got = right[counts], got[counts].double()
    assert ((got / 255 - right).abs() <= HALF + right * rounding).all()
    assert (got[right == 1] == 255).all()
    assert (got[:, vocab:] == 0).all()


# --------------------------------------------------------------------------------------------------------- gradients


def with_and_without(case, mass, dense_share, apart=MIB, workspace_bytes=1 << 14):
    """The gradients of hidden and weight from codes, and without any."""
    problem = case.problem(approximate_mass=mass, workspace_bytes=workspace_bytes)
    grads = case.row_gradients(target_logit=target_logits(case))
    grad_weight = torch.empty(case.vocab, case.width, dtype=case.weight.dtype)
    kept = KeptTiles.coded(problem, TILE_WIDTH, apart, grad_weight)
    lse, tiles = cuda.reduce(problem, kept).lse, recorded(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_lists, "DENSE_SHARE", dense_share)
        coded = sparse.backward(problem, lse, tiles, grads, [True, True, False], kept, grad_weight)
        assert coded[1] is grad_weight
        return coded[:2], backward(case, mass, workspace_bytes)[:2]


@settings(max_examples=15)
@given(
    rows=st.integers(1, 40),
    vocab=st.integers(1, 100),
    width=st.integers(1, 24),
    logit_map=st.sampled_from(["z", "1.0 - z/3.0", "5.0*tanh(z/5.0)", "30.0*tanh(z/30.0)", "8.0*sigmoid(z/4.0) - 1.0"]),
    bias=st.booleans(),
    mass=st.sampled_from([0.0, 2**-5]),
    dense_share=st.sampled_from([0.0, 0.6, 1.0]),
    apart=st.sampled_from([0, 3000, MIB]),
    workspace_bytes=st.sampled_from([1, 1 << 14, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_gradients_from_codes_are_as_close_as_codes_are(
    rows, vocab, width, logit_map, bias, mass, dense_share, apart, workspace_bytes, seed
):
    case = make(rows, vocab, width, logit_map=logit_map, bias=bias, seed=seed)
    coded, without = with_and_without(case, mass, dense_share, apart, workspace_bytes)
    assert_as_close_as_codes_are(case, coded, without)


def assert_as_close_as_codes_are(case, coded, without):
    """Slopes are off by no more than `STEEPEST` of what logits are off by, which is what a probability is of itself."""
    added = 0.0 if case.bias_vector is None else case.bias_vector.double()
    x, slope = case.problem().logit_map.value_and_derivative(case.hidden.double() @ case.weight.double().T + added)
    slope = torch.ones_like(x) if slope is None else slope.abs()
    size = case.grads[0].double().abs()[:, None]
    picked = case.grads[1].double().abs()[:, None] * torch.nn.functional.one_hot(case.targets.clamp(min=0), case.vocab)
    finite = x[x.isfinite()].abs().max()
    rounding = 64 * torch.finfo(FP32).eps * (1 + finite)
    steepness = 0.0 if case.problem().logit_map.affine() else STEEPEST
    p, tile = torch.softmax(x, 1), torch.arange(case.vocab) // TILE_WIDTH
    of_tile = torch.zeros(len(x), int(tile.max()) + 1, dtype=p.dtype).index_add_(1, tile, p)[:, tile]
    off = what_codes_round(x, recorded(case)).nan_to_num(0.0) + rounding * p + CUT * of_tile
    dz = size * off * (slope.max() + steepness) + rounding * picked
    for mine, other, most in zip(
        coded, without, (dz @ case.weight.double().abs(), dz.T @ case.hidden.double().abs()), strict=True
    ):
        assert ((mine.double() - other.double()).abs() <= most + 1e-30).all()


@pytest.mark.parametrize("logit_map", ["z", "0.5*z", "5.0*tanh(z/5.0)"])
def test_shares_from_codes_are_as_close_as_codes_are(logit_map):
    """Of the same sample of rows. In a tile they sum to no more than the largest slope, which is one or less.

    Most tiles are light, so that they are skipped, and their logits lie where the map is not steep.
    """
    case = make(64, 300, 16, logit_map=logit_map, bias=True)
    case.hidden /= 4
    case.bias_vector[TILE_WIDTH : 8 * TILE_WIDTH] -= 20
    problem = case.problem(approximate_mass=2**-2)
    kept = KeptTiles.coded(problem, TILE_WIDTH, MIB, torch.empty(0))
    lse, tiles = cuda.reduce(problem, kept).lse, recorded(case)
    grads = case.row_gradients(target_logit=target_logits(case))
    coded, without = (
        sparse._SparseBackward(problem, lse, tiles, grads, want_hidden=False, kept=where).share
        for where in (kept, KeptTiles())
    )
    assert kept.first_left == len(tiles.lse)
    assert (without > 0).any()
    x = mapped_logits(case)
    offs, parts = what_codes_round(x, tiles).split(TILE_WIDTH, 1), torch.softmax(x, 1).split(TILE_WIDTH, 1)
    for mine, other, off, p in zip(coded.split(TILE_WIDTH), without.split(TILE_WIDTH), offs, parts, strict=True):
        most = (off.sum(1) / p.sum(1)).max() + TILE_WIDTH * CUT  # of what a row has of the tile
        assert (mine - other).abs().sum() <= (2 + STEEPEST) * most / (1 - most)


@pytest.mark.parametrize("dense_share", [0.0, 1.0])
def test_what_a_tile_weighs_is_not_rounded(dense_share):
    """With hidden states of ones in one place, the weight's gradient there sums to all rows' gradients of the lse."""
    case = make(40, 100, 16)
    case.hidden[:, 0] = 1.0
    case.grads[1] *= 0.0
    (_, grad_weight), _ = with_and_without(case, 0.0, dense_share)
    p = torch.softmax(case.hidden.double() @ case.weight.double().T, 1) * case.grads[0].double()[:, None]
    for mine, right in zip(grad_weight[:, 0].split(TILE_WIDTH), p.sum(0).split(TILE_WIDTH), strict=True):
        assert abs(mine.double().sum() - right.sum()) <= 100 * torch.finfo(FP32).eps * right.sum()


def test_a_row_that_is_not_a_number_shows_in_the_gradients_as_in_eager():
    case = make(40, 100, 16)
    case.hidden[3] = torch.nan
    case.grads[0][3], case.grads[1][3] = 1.0, -1.0
    (grad_hidden, grad_weight), _ = with_and_without(case, 2**-3, 0.5)
    assert grad_hidden[3].isnan().all()
    assert grad_hidden[torch.arange(40) != 3].isfinite().all()
    assert grad_weight.isnan().all()


def test_a_tile_without_a_finite_logit_has_no_gradient():
    case = make(40, 100, 16, bias=True)
    case.bias_vector[TILE_WIDTH : 2 * TILE_WIDTH] = -torch.inf
    case.targets = torch.where(case.targets == -100, case.targets, case.targets % TILE_WIDTH)
    coded, without = with_and_without(case, 0.0, 0.0)
    assert_as_close_as_codes_are(case, coded, without)
    assert all(gradient.isfinite().all() for gradient in coded)
    assert (with_and_without(case, 0.0, 0.0)[0][1][TILE_WIDTH : 2 * TILE_WIDTH] == 0).all()
