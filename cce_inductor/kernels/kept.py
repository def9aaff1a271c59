"""Logits of a tile that stay in memory between the forward and the gradient, in 16 bits.

    kept[n, v] = (z[n, v] - base[n]) / 256   in float16          base[n] = z[n, v] where x[n, v] is the tile's largest

A log-sum-exp is not rounded together with the logits, so a rounded logit would be off by as much as a certain row is
away from certain. Its difference to the tile's peak is exact at the peak, where the probability is; elsewhere it is off
by 2**-12 of itself, far less than a logit in bfloat16. Divided by 256, differences of up to 16 million are in the range
of float16, and what its smallest numbers can't tell apart is below 2**-17.
"""

import triton
import triton.language as tl

UNIT = tl.constexpr(256.0)


@triton.jit
def store_logits(
    kept,  # of the first of the tiles that are kept
    base,  # [tiles, N]
    z,  # [BLOCK_N, BLOCK_V]
    x,
    peak,  # the largest x of each row
    tile,
    rows,  # where each row of z is among all rows
    row_mask,
    stride_kept_tile,
    stride_kept_row,
    stride_kept_base,
    PLAIN: tl.constexpr,  # whether x is z
    BLOCK_V: tl.constexpr,
):
    """The tile must be whole: columns beyond the vocabulary would be stored too."""
    origin = peak
    if not PLAIN:
        origin = tl.max(tl.where(x == peak[:, None], z, -float("inf")), 1)
    origin = tl.where(origin == -float("inf"), 0.0, origin)
    offsets = _offsets(tile, rows, stride_kept_tile, stride_kept_row, BLOCK_V)
    difference = (z * (1 / UNIT) - (origin * (1 / UNIT))[:, None]).to(tl.float16)
    tl.store(kept + offsets, difference, mask=row_mask[:, None])
    tl.store(base + tile.to(tl.int64) * stride_kept_base + rows, origin, mask=row_mask)


@triton.jit
def load_logits(
    kept,  # of the first of the tiles that are kept, and of the first row
    base,
    tile,
    rows,
    row_mask,  # the others were not stored
    stride_kept_tile,
    stride_kept_row,
    stride_kept_base,
    BLOCK_V: tl.constexpr,
):
    """z [BLOCK_N, BLOCK_V] in float32, zero where rows are masked."""
    origin = tl.load(base + tile.to(tl.int64) * stride_kept_base + rows, mask=row_mask, other=0.0)
    offsets = _offsets(tile, rows, stride_kept_tile, stride_kept_row, BLOCK_V)
    difference = tl.load(kept + offsets, mask=row_mask[:, None], other=0.0).to(tl.float32)
    return difference * UNIT + origin[:, None]


@triton.jit
def _offsets(tile, rows, stride_kept_tile, stride_kept_row, BLOCK_V: tl.constexpr):
    """Strides are multiples of 8, which Triton is told so that it moves 16 bytes at a time."""
    columns = tl.multiple_of(tile.to(tl.int64) * stride_kept_tile, 8) + tl.arange(0, BLOCK_V)
    return tl.multiple_of(rows[:, None].to(tl.int64) * stride_kept_row, (1, 8)) + columns[None, :]
