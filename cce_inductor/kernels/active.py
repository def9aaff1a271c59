"""Which (row, vocabulary tile) pairs matter: all but the lightest tiles of a row, up to a budget of its probability.

    mass[j, n]   = sum over v in tile j of p[n, v] = exp(tile_lse[j, n] - lse[n])
    active[j, n] = mass[j, n] >= t[n],   t[n] <= budget / 128 the largest with
                                         sum over j of mass[j, n] [mass[j, n] < t[n]] <= budget

The error of the gradients grows with the square root of the sum of the squares of what is skipped. So it takes many
light tiles to do the harm of a heavier one, and a row that may skip a lot must do so in small pieces.
The tile of the target is always active, and no tile is where the row has no gradient. A row that is spread evenly
skips nearly nothing, so an untrained model stays exact by itself. A row that needs most of the tiles is *dense*: it
gets all of them, and is listed once instead of in each tile.
"""

import triton
import triton.language as tl

from .pointwise import exp

PIECES_LOG2 = tl.constexpr(7.0)  # no skipped tile is heavier than the budget / 2**7
SMALLEST_LOG2 = tl.constexpr(-40.0)  # lighter tiles than 2**-40 are all the same
BISECTIONS = tl.constexpr(12)  # they find the threshold to a factor of 2**(40 / 2**12)


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "ignore_index"])
def active_kernel(
    tile_lse,  # [tiles, N]
    lse,  # [N]
    grad_lse,  # [N]
    grad_picked,  # [N]
    target,  # [N]
    active,  # [tiles + 1, N], bool: active pairs of rows that are not dense; the last: which rows are dense
    counts,  # [tiles + 1], int32, zeros before: how many there are in each
    num_rows,
    num_tiles,
    ignore_index,
    budget,
    dense_share,  # a row that needs more than this share of the tiles is dense
    HAS_TARGET: tl.constexpr,
    HAS_IGNORE_INDEX: tl.constexpr,
    TILE_WIDTH: tl.constexpr,  # columns of a tile
    TILES: tl.constexpr,  # a power of two, at least num_tiles
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tiles = tl.arange(0, TILES)
    row_mask = rows < num_rows
    mask = (tiles < num_tiles)[:, None] & row_mask[None, :]
    offsets = tiles[:, None].to(tl.int64) * num_rows + rows[None, :]
    row_lse = tl.load(lse + rows, mask=row_mask, other=0.0)
    mass = exp(tl.load(tile_lse + offsets, mask=mask, other=-float("inf")) - row_lse[None, :])

    low = tl.full((ROWS,), SMALLEST_LOG2, dtype=tl.float32)
    high = tl.zeros((ROWS,), dtype=tl.float32) + (tl.log2(budget) - PIECES_LOG2)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        skipped = tl.sum(tl.where(mass < tl.exp2(middle)[None, :], mass, 0.0), 0)
        fits = skipped <= budget
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    has_gradient = tl.load(grad_lse + rows, mask=row_mask, other=0.0) != 0.0
    selected = (mass >= tl.exp2(low)[None, :]) & has_gradient[None, :]
    if HAS_TARGET:
        targets = tl.load(target + rows, mask=row_mask, other=0)
        picks = tl.load(grad_picked + rows, mask=row_mask, other=0.0) != 0.0
        if HAS_IGNORE_INDEX:
            picks = picks & (targets != ignore_index)
        selected = selected | (picks[None, :] & (tiles[:, None] == (targets // TILE_WIDTH)[None, :]))
    # a row that is not a number must show in the gradients
    broken = row_lse != row_lse
    selected = (selected | broken[None, :]) & mask
    dense = (tl.sum(selected.to(tl.int32), 0) > dense_share * num_tiles) & row_mask
    selected = selected & (dense == 0)[None, :]
    tl.store(active + offsets, selected, mask=mask)
    tl.store(active + num_tiles.to(tl.int64) * num_rows + rows, dense, mask=row_mask)
    # sums of integers do not depend on their order
    tl.atomic_add(counts + tiles, tl.sum(selected.to(tl.int32), 1), mask=tiles < num_tiles, sem="relaxed")
    tl.atomic_add(counts + num_tiles, tl.sum(dense.to(tl.int32), 0), sem="relaxed")
