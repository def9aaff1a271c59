"""How the probability mass of a skipped block is spread over the columns of its tile, estimated from some rows:

    share[v] = sum over n of s[n] * p[n, v] * f'(z[n, v])  /  sum over n and u in v's tile of s[n] * p[n, u]

With a scale s that is large where a row skips the tile, share is the mean of what is skipped. It sums to one over a
tile (where f' is one). A token without probability anywhere gets none here, so its row of the weight is left in peace.
"""

import triton
import triton.language as tl

from .pointwise import exp
from .tile import preactivations


@triton.jit(do_not_specialize=["num_rows", "num_columns", "num_tiles"])
def share_kernel(
    hidden,  # TMA descriptor or pointer, [S, D], the sampled rows
    weight,  # TMA descriptor or pointer, [V, D]
    bias,  # [V]
    lse,  # [S]
    scale,  # [tiles, S]
    share,  # [V]
    num_rows,  # S
    num_columns,  # V
    num_tiles,
    width,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    VALUE_AND_SLOPE: tl.constexpr,  # the generated function (f, f')
    HAS_BIAS: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    for tile in tl.range(tl.program_id(0), num_tiles, NUM_PROGRAMS):
        column = tile * BLOCK_V
        columns = column + tl.arange(0, BLOCK_V)
        column_mask = columns < num_columns
        mass = tl.zeros((BLOCK_V,), dtype=tl.float32)
        force = tl.zeros((BLOCK_V,), dtype=tl.float32)
        for row in range(0, num_rows, BLOCK_N):
            rows = row + tl.arange(0, BLOCK_N)
            row_mask = rows < num_rows
            z = preactivations(
                hidden, weight, bias, row, column, num_rows, num_columns, width,
                stride_hn, stride_hd, stride_wv, stride_wd, HAS_BIAS, USE_TMA, BLOCK_N, BLOCK_V, BLOCK_D,
            )  # fmt: skip
            x, slope = VALUE_AND_SLOPE(z)
            row_lse = tl.load(lse + rows, mask=row_mask, other=float("inf"))
            row_scale = tl.load(scale + (tile * num_rows + rows), mask=row_mask, other=0.0)
            p = exp(x - row_lse[:, None]) * row_scale[:, None]
            p = tl.where(column_mask[None, :], p, 0.0)
            mass += tl.sum(p, 0)
            force += tl.sum(p * slope, 0)
        tile_mass = tl.sum(mass, 0)
        tl.store(share + columns, tl.where(tile_mass > 0.0, force / tile_mass, 0.0), mask=column_mask)
