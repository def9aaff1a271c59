"""The logit of each target, one dot product for each; where rows have one target,

    picked[n] = f(hidden[n] . weight[target[n]] + bias[target[n]])          0 where target[n] == ignore_index
    tile_tops[j, n] = the records of the target and the heaviest other token, in the tile j of target[n]

Computed apart, it costs a thousandth of the forward kernel. Inside, it made some tiles slower than others, so that
programs ceased to read the same tiles at the same time and the L2 cache missed: 1.1 to 1.4 times the whole forward.
The order of the sums differs from the forward kernel's, so rounding could lift the result above the row's
log-sum-exp, which no logit exceeds: a loss below zero. The minimum of the two rules that out.
"""

import triton
import triton.language as tl

from .pointwise import exp
from .tops import with_target


@triton.jit(do_not_specialize=["ignore_index", "num_rows"])
def picked_kernel(
    hidden,  # [N, D], in the dtype of the matmuls
    weight,  # [V, D], in its own dtype
    bias,  # [V]
    target,  # [N, num_targets]
    lse,  # [N]
    picked,  # [N, num_targets]
    tile_lse,  # [tiles, N]
    tile_tops,  # [tiles, N, 2], int32: the heaviest tokens of each; read and written where WANT_TOPS
    num_rows,
    num_targets,  # of each row; one where WANT_TOPS
    width,
    ignore_index,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    VALUE: tl.constexpr,  # the generated function f
    HAS_BIAS: tl.constexpr,
    HAS_IGNORE_INDEX: tl.constexpr,
    WANT_TOPS: tl.constexpr,
    TILE: tl.constexpr,  # columns of a tile
    BLOCK_D: tl.constexpr,
):
    pick = tl.program_id(0).to(tl.int64)
    row = pick // num_targets
    column = tl.load(target + pick)  # 64-bit, as targets are
    counts = column >= 0  # as every target that is not ignored
    if HAS_IGNORE_INDEX:
        counts = column != ignore_index
        column = tl.where(counts, column, 0)
    products = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden + row * stride_hn + depth.to(tl.int64) * stride_hd, mask=depth < width, other=0.0)
        w = tl.load(weight + column * stride_wv + depth.to(tl.int64) * stride_wd, mask=depth < width, other=0.0)
        products += h.to(tl.float32) * w.to(h.dtype).to(tl.float32)
    z = tl.sum(products, 0)
    if HAS_BIAS:
        z += tl.load(bias + column).to(tl.float32)
    x = tl.minimum(VALUE(z), tl.load(lse + row))
    tl.store(picked + pick, tl.where(counts, x, 0.0))
    if WANT_TOPS:
        place = (column // TILE) * num_rows + row
        of_tile = tl.load(tile_lse + place)
        share = tl.where(x < of_tile, exp(x - of_tile), 1.0)
        records = tile_tops + 2 * place
        first, second = with_target(
            tl.load(records), tl.load(records + 1), (column % TILE).to(tl.int32), share, TILE
        )  # fmt: skip
        tl.store(records, first, mask=counts)
        tl.store(records + 1, second, mask=counts)
