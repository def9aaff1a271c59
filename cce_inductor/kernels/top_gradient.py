"""What a row gets from, and gives to, the tokens that are computed alone (`kernels/tops.py`).

    dz[n, v]       = p[n, v] * grad_lse[n] * f'(z[n, v])                      v in the tokens listed for row n
    grad_hidden[n] = sum over the listed v of dz[n, v] * weight[v]

A program owns a row of the fixed-point gradient and begins its sums, to which the blocks of `kernels/sparse.py` add.
dz goes to the weight's gradient, which that file computes.
"""

import triton
import triton.language as tl

from .fixed_point import fixed_point_unit, to_fixed_point
from .pointwise import exp
from .tops import with_column


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def top_gradient_kernel(
    hidden,  # [N, D]
    weight,  # [V, D]
    bias,  # [V]
    lse,  # [N]
    grad_lse,  # [N]
    grad_picked,  # [N]
    weight_peak,
    row_tokens,  # [N, tiles], int32: the listed tokens of each row
    row_count,  # [N], int32: how many there are
    top_dz,  # [tiles, N], int32: dz with the token's column, written where there is one
    fixed,  # [N, ceil(D / 2)], int64, written where WANT_HIDDEN
    num_rows,
    num_tiles,
    width,
    slope_bound,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    VALUE_AND_SLOPE: tl.constexpr,  # the generated function (f, f')
    HAS_BIAS: tl.constexpr,
    WANT_HIDDEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least D
    TOKENS: tl.constexpr,  # at a time
):
    row = tl.program_id(0)
    count = tl.load(row_count + row)
    depths = tl.arange(0, BLOCK_D)
    depth_mask = depths < width
    h = tl.load(hidden + row.to(tl.int64) * stride_hn + depths * stride_hd, mask=depth_mask, other=0.0).to(tl.float32)
    row_lse, row_grad = tl.load(lse + row), tl.load(grad_lse + row)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, count, TOKENS):
        places = first + tl.arange(0, TOKENS)
        mask = places < count
        tokens = tl.load(row_tokens + row.to(tl.int64) * num_tiles + places, mask=mask, other=0)
        offsets = tokens[:, None].to(tl.int64) * stride_wv + depths[None, :] * stride_wd
        w = tl.load(weight + offsets, mask=mask[:, None] & depth_mask[None, :], other=0.0).to(tl.float32)
        z = tl.sum(w * h[None, :], 1)
        if HAS_BIAS:
            z += tl.load(bias + tokens, mask=mask, other=0.0).to(tl.float32)
        x, slope = VALUE_AND_SLOPE(z)
        dz = tl.where(mask, exp(x - row_lse) * row_grad * slope, 0.0)
        total += tl.sum(dz[:, None] * w, 0)
        here = (tokens // BLOCK_V).to(tl.int64) * num_rows + row
        tl.store(top_dz + here, with_column(dz, tokens % BLOCK_V, BLOCK_V), mask=mask)
    if WANT_HIDDEN:
        unit = fixed_point_unit(row_grad, tl.load(grad_picked + row), row_lse, weight_peak, slope_bound)
        both = to_fixed_point(tl.expand_dims(total, 0), tl.zeros((1,), dtype=tl.float32) + unit)
        row_pairs = tl.cdiv(width, 2)
        pairs = tl.arange(0, BLOCK_D // 2)[None, :]
        tl.store(fixed + row.to(tl.int64) * row_pairs + pairs, both, mask=pairs < row_pairs)
