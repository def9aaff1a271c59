"""How the probability mass that rows skip is spread over the columns of a tile, estimated from some rows:

    share[v] = sum over n of s[n] * p[n, v] * f'(z[n, v])  /  sum over n and u in v's tile of s[n] * p[n, u]
               of the pairs of n and v that are skipped, or were if v's tile were
    skipped_weight[tile] = sum over v in the tile of share[v] * weight[v]

With a scale s that is large where a row skips the tile, share is the mean of what is skipped. It sums to one over a
tile (where f' is one). A token without probability anywhere gets none here, so its row of the weight is left in peace.
The same pass over the weight finds its largest absolute value, which `kernels/sparse.py` needs.
"""

import triton
import triton.language as tl

from .pointwise import exp
from .tile import load_block, preactivations

EVERYWHERE = tl.constexpr(2.0**-10)  # how much a row counts for the share of a tile that it does not skip


@triton.jit(do_not_specialize=["num_rows", "num_columns", "num_tiles"])
def share_kernel(
    hidden,  # TMA descriptor or pointer, [S, D], the sampled rows
    weight,  # TMA descriptor or pointer, [V, D]
    bias,  # [V]
    lse,  # [S]
    grad_lse,  # [S]
    skipped_mass,  # [tiles, S]
    top_column,  # [tiles, S], int32: the place in the tile of the token that is not skipped, or -1
    skips,  # [tiles], bool: whether any row skips the tile
    share,  # [V]
    skipped_weight,  # [tiles, D]
    weight_peak,  # one int32, zero before: the bits of the largest |weight|, a float32
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
    NUM_STAGES: tl.constexpr,  # of the second loop, which multiplies nothing: the compiler would not pipeline it
    NUM_PROGRAMS: tl.constexpr,
):
    # the bits of floats that are not negative, nan among them, are in order as integers
    peak = tl.zeros((BLOCK_V,), dtype=tl.int32)
    for tile in tl.range(tl.program_id(0), num_tiles, NUM_PROGRAMS):
        column = tile * BLOCK_V
        columns = column + tl.arange(0, BLOCK_V)
        column_mask = columns < num_columns
        mass = tl.zeros((BLOCK_V,), dtype=tl.float32)
        force = tl.zeros((BLOCK_V,), dtype=tl.float32)
        sampled = tl.where(tl.load(skips + tile), num_rows, 0)
        for row in range(0, sampled, BLOCK_N):
            rows = row + tl.arange(0, BLOCK_N)
            row_mask = rows < num_rows
            z = preactivations(
                hidden, weight, bias, row, column, num_rows, num_columns, width,
                stride_hn, stride_hd, stride_wv, stride_wd, HAS_BIAS, USE_TMA, BLOCK_N, BLOCK_V, BLOCK_D,
            )  # fmt: skip
            x, slope = VALUE_AND_SLOPE(z)
            row_lse = tl.load(lse + rows, mask=row_mask, other=float("inf"))
            skipped = tl.load(skipped_mass + tile * num_rows + rows, mask=row_mask, other=0.0)
            scale = tl.abs(tl.load(grad_lse + rows, mask=row_mask, other=0.0))
            scale = scale * tl.where(skipped != 0.0, 1.0 + EVERYWHERE, EVERYWHERE)
            p = exp(x - row_lse[:, None]) * scale[:, None]
            top = tl.load(top_column + tile * num_rows + rows, mask=row_mask, other=-1)
            counts = column_mask[None, :] & (tl.arange(0, BLOCK_V)[None, :] != top[:, None])
            p = tl.where(counts, p, 0.0)
            mass += tl.sum(p, 0)
            force += tl.sum(p * slope, 0)
        tile_mass = tl.sum(mass, 0)
        spread = tl.where(tile_mass > 0.0, force / tile_mass, 0.0)
        tl.store(share + columns, spread, mask=column_mask)
        for depth in tl.range(0, width, BLOCK_D, num_stages=NUM_STAGES):
            if USE_TMA:
                w = weight.load([column, depth])
            else:
                w = load_block(weight, column, depth, num_columns, width, stride_wv, stride_wd, BLOCK_V, BLOCK_D)
            w = w.to(tl.float32)
            depths = depth + tl.arange(0, BLOCK_D)
            sums = tl.sum(w * spread[:, None], 0).to(skipped_weight.dtype.element_ty)
            tl.store(skipped_weight + tl.cast(tile, tl.int64) * width + depths, sums, mask=depths < width)
            peak = tl.maximum(peak, tl.max(tl.abs(w).to(tl.int32, bitcast=True), 1))
    tl.atomic_max(weight_peak, tl.max(peak, 0), sem="relaxed")
