"""Which (row, vocabulary tile) pairs matter: all but those that leave the least to be approximated, up to a budget.

    mass[j, n]   = sum over v in tile j of p[n, v] = exp(tile_lse[j, n] - lse[n])
    tops[j, n]   = the sum of p[n, v] of the tokens v that may be computed alone: the target in its tile, and of the
                   heaviest those that have enough of a mass that is large enough, of the tile or without the first
    rest[j, n]   = mass[j, n] - tops[j, n]
    active[j, n] = rest[j, n] >= t[n],   t[n] <= largest_piece the largest with
                                         sum over j of rest[j, n] [rest[j, n] < t[n]] <= budget

Where a tile that is not active has tops, these tokens alone are computed, and only the rest is approximated.
The error of the gradients grows with the square root of the sum of the squares of what is approximated. So it takes
many light tiles to do the harm of a heavier one, and a row that may skip a lot must do so in small pieces.
The target is always computed, and no tile is active where the row has no gradient. A row that is spread evenly skips
nearly nothing, so an untrained model stays exact by itself. A row that needs many of the tiles is *dense*: it gets all
of them, and is listed once instead of in each tile.
"""

import triton
import triton.language as tl

from .pointwise import exp, log
from .tops import column_of, number_of, with_column

MOST_LEFT = tl.constexpr(0.75)  # of a mass without its heaviest token, for that to be computed alone
SMALLEST_LOG2 = tl.constexpr(-40.0)  # rests below 2**-40 are all the same
BISECTIONS = tl.constexpr(9)  # they find the threshold to a factor of 2**(40 / 2**9)


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "ignore_index"])
def active_kernel(
    tile_lse,  # [tiles, N]
    tile_tops,  # [tiles, N, 2], int32
    lse,  # [N]
    grad_lse,  # [N]
    grad_picked,  # [N]
    target,  # [N]
    target_logit,  # [N]: x of the target, where slopes are known but not the same everywhere
    # written where a row needs anything, zeros before:
    active,  # bool: which rows are dense [N]; active pairs of rows that are not dense [tiles, N]; tops [tiles, N, 2]
    counts,  # [1 + tiles + tiles * parts], int32: how many there are, of tops for each part of a tile
    row_tokens,  # [N, 2 * tiles], int32: the tops of each row: 2 * the place in the vocabulary + which of its tile
    row_count,  # [N], int32: how many there are
    row_dz,  # [N, 2 * tiles]: dz of the tops of each row, where KNOWN
    top_dz,  # [tiles, N, 2], int32: dz of tops with their columns, where KNOWN
    num_rows,
    num_tiles,
    ignore_index,
    budget,
    largest_piece,  # of no tile more than this is approximated
    lightest_top,  # of no more mass than this no token but the target is computed alone
    dense_share,  # a row that needs more than this share of the tiles is dense
    HAS_TARGET: tl.constexpr,
    HAS_IGNORE_INDEX: tl.constexpr,
    KNOWN: tl.constexpr,  # whether f' is known from x, and so dz from what the forward recorded
    SAME_SLOPE: tl.constexpr,  # whether f' is the same everywhere
    SLOPE_BY_VALUE: tl.constexpr,  # the generated function f' of x
    TILE_WIDTH: tl.constexpr,  # columns of a tile
    PART: tl.constexpr,  # columns of a part of a tile
    TILES: tl.constexpr,  # a power of two, at least num_tiles
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tiles = tl.arange(0, TILES)
    row_mask = rows < num_rows
    mask = (tiles < num_tiles)[:, None] & row_mask[None, :]
    offsets = tiles[:, None].to(tl.int64) * num_rows + rows[None, :]
    row_lse = tl.load(lse + rows, mask=row_mask, other=0.0)
    row_grad = tl.load(grad_lse + rows, mask=row_mask, other=0.0)
    target_grad = tl.load(grad_picked + rows, mask=row_mask, other=0.0)
    broken = row_lse != row_lse
    if tl.sum(((row_grad != 0.0) | (target_grad != 0.0) | broken).to(tl.int32), 0) == 0:
        return  # ignored rows mostly come together: prompts, padding
    mass = exp(tl.load(tile_lse + offsets, mask=mask, other=-float("inf")) - row_lse[None, :])
    first = tl.load(tile_tops + 2 * offsets, mask=mask, other=0)
    second = tl.load(tile_tops + 2 * offsets + 1, mask=mask, other=0)
    left, left_of_both = number_of(first, TILE_WIDTH), number_of(second, TILE_WIDTH)
    has_gradient = (row_grad != 0.0)[None, :]
    one = has_gradient & (mass > lightest_top) & (left <= MOST_LEFT)
    if HAS_TARGET:
        targets = tl.load(target + rows, mask=row_mask, other=0)
        if HAS_IGNORE_INDEX:
            target_grad = tl.where(targets != ignore_index, target_grad, 0.0)
        of_target = (target_grad != 0.0)[None, :] & (tiles[:, None] == (targets // TILE_WIDTH)[None, :])
        one = one | of_target
    two = one & has_gradient & (mass * left > lightest_top) & (left_of_both <= MOST_LEFT * left)
    rest = mass * tl.where(two, left_of_both, tl.where(one, left, 1.0))

    low = tl.full((ROWS,), SMALLEST_LOG2, dtype=tl.float32)
    high = tl.zeros((ROWS,), dtype=tl.float32) + tl.log2(largest_piece)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        skipped = tl.sum(tl.where(rest < tl.exp2(middle)[None, :], rest, 0.0), 0)
        fits = skipped <= budget
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    threshold = tl.exp2(low)
    selected = (rest >= threshold[None, :]) & has_gradient
    # a row that is not a number must show in the gradients
    selected = (selected | broken[None, :]) & mask
    dense = (tl.sum(selected.to(tl.int32), 0) > dense_share * num_tiles) & row_mask
    selected = selected & (dense == 0)[None, :]
    one = one & (selected == 0) & (dense == 0)[None, :] & mask
    two = two & one
    tl.store(active + rows, dense, mask=row_mask)
    tl.store(active + num_rows + offsets, selected, mask=mask)
    tops = active + (1 + num_tiles.to(tl.int64)) * num_rows + 2 * offsets
    tl.store(tops, one, mask=mask)
    tl.store(tops + 1, two, mask=mask)
    # sums of integers do not depend on their order
    tl.atomic_add(counts, tl.sum(dense.to(tl.int32), 0), sem="relaxed")
    tl.atomic_add(counts + 1 + tiles, tl.sum(selected.to(tl.int32), 1), mask=tiles < num_tiles, sem="relaxed")
    column, other_column = column_of(first, TILE_WIDTH), column_of(second, TILE_WIDTH)
    parts: tl.constexpr = TILE_WIDTH // PART
    for part in range(parts):
        here = (one & (column // PART == part)).to(tl.int32) + (two & (other_column // PART == part)).to(tl.int32)
        here = tl.sum(here, 1)
        tl.atomic_add(counts + 1 + num_tiles + tiles * parts + part, here, mask=tiles < num_tiles, sem="relaxed")

    listed = one.to(tl.int32) + two.to(tl.int32)
    places = rows[None, :].to(tl.int64) * (2 * num_tiles) + tl.cumsum(listed, 0) - listed
    tl.store(row_tokens + places, 2 * (tiles[:, None] * TILE_WIDTH + column), mask=one)
    tl.store(row_tokens + places + 1, 2 * (tiles[:, None] * TILE_WIDTH + other_column) + 1, mask=two)
    tl.store(row_count + rows, tl.sum(listed, 0), mask=row_mask)
    if KNOWN:
        p = mass * (1.0 - left)
        dx = p * row_grad[None, :]
        x = log(p) + row_lse[None, :]
        if HAS_TARGET:
            dx += tl.where(of_target, target_grad[None, :], 0.0)
            if not SAME_SLOPE:
                target_x = tl.load(target_logit + rows, mask=row_mask, other=0.0)
                x = tl.where(of_target, target_x[None, :], x)
        dz = dx * SLOPE_BY_VALUE(x)
        tl.store(row_dz + places, dz, mask=one)
        tl.store(top_dz + 2 * offsets, with_column(dz, column, TILE_WIDTH), mask=one)
        p = mass * (left - left_of_both)
        dz = p * row_grad[None, :] * SLOPE_BY_VALUE(log(p) + row_lse[None, :])
        tl.store(row_dz + places + 1, dz, mask=two)
        tl.store(top_dz + 2 * offsets + 1, with_column(dz, other_column, TILE_WIDTH), mask=two)
