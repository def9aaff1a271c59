"""Two passes over logits that a matrix multiplication has put in memory, in float32: z = hidden @ weight.T.

The first gives, per row and vocabulary tile, what `ops/combine.py` makes reductions of; x = f(z + bias):

    tile_peak[j, n]   = the largest x[n, v], v in tile j, or 0 where all are -inf;  tile_argmax: the first v that has it
    tile_sum[j, n]    = sum over v in tile j of exp(x[n, v] - tile_peak[j, n])
    tile_spread[j, n] = sum over v in tile j of exp(x[n, v] - tile_peak[j, n]) * (x[n, v] - tile_peak[j, n])
    tile_total[j, n]  = sum over v in tile j of total_weight[v] * x[n, v]
    picked[n]         = x[n, target[n]]

The second gives dz of the formula in `backward.py`. Other than there, nothing is lost to rounding where a row is nearly
certain: differences of logits are taken before anything multiplies them, and p - 1 of the target is never p minus 1.
"""

import triton
import triton.language as tl

from .pointwise import LEAST_LOG, exp, expm1
from .tile import position_in_tile


@triton.jit
def _load_logits(z, bias, rows, columns, row_mask, column_mask, stride_z, HAS_BIAS: tl.constexpr):
    """z + bias [BLOCK_N, BLOCK_V]."""
    offsets = rows[:, None].to(tl.int64) * stride_z + columns[None, :]
    logits = tl.load(z + offsets, mask=row_mask[:, None] & column_mask[None, :], other=0.0)
    if HAS_BIAS:
        logits += tl.load(bias + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    return logits


@triton.jit(do_not_specialize=["num_rows", "first_column", "ignore_index"])
def reduce_stored_kernel(
    z,  # [N, columns of the slice], float32
    bias,
    target,  # [N]
    total_weight,
    picked,  # [N]; written where the slice has the target
    tile_peak,  # [tiles of the slice, N]
    tile_sum,  # [tiles of the slice, N]
    tile_spread,  # [tiles of the slice, N], written where WANT_ENTROPY
    tile_total,  # [tiles of the slice, N], written where WANT_TOTAL
    tile_argmax,  # [tiles of the slice, N], int32, written where WANT_MAX
    num_rows,
    num_columns,  # of the slice
    first_column,  # where the slice starts in the vocabulary
    ignore_index,
    stride_z,
    stride_tile,  # of all that have tiles
    VALUE: tl.constexpr,  # the generated function f
    HAS_BIAS: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_IGNORE_INDEX: tl.constexpr,
    WANT_TOTAL: tl.constexpr,
    HAS_TOTAL_WEIGHT: tl.constexpr,
    WANT_MAX: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    column_blocks = tl.cdiv(num_columns, BLOCK_V)
    column_block = tl.program_id(0) % column_blocks
    column = column_block * BLOCK_V
    rows = tl.program_id(0) // column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column + tl.arange(0, BLOCK_V)
    row_mask = rows < num_rows
    column_mask = columns < num_columns
    results = column_block.to(tl.int64) * stride_tile + rows
    x = VALUE(_load_logits(z, bias, rows, columns, row_mask, column_mask, stride_z, HAS_BIAS))
    if WANT_TOTAL:
        weighted = x
        if HAS_TOTAL_WEIGHT:
            weights = tl.load(total_weight + columns, mask=column_mask, other=0.0).to(tl.float32)
            weighted = x * weights[None, :]
        tl.store(tile_total + results, tl.sum(tl.where(column_mask[None, :], weighted, 0.0), 1), mask=row_mask)
    if HAS_TARGET:
        targets = tl.load(target + rows, mask=row_mask, other=-1)
        position, inside = position_in_tile(targets, first_column + column, ignore_index, HAS_IGNORE_INDEX, BLOCK_V)
        if tl.max(inside.to(tl.int32), 0) > 0:  # few tiles hold targets
            hit = tl.arange(0, BLOCK_V)[None, :] == position[:, None]
            tl.store(picked + rows, tl.sum(tl.where(hit, x, 0.0), 1), mask=row_mask & inside)
    x = tl.where(column_mask[None, :], x, -float("inf"))
    peak = tl.max(x, 1)
    if WANT_MAX:
        tl.store(tile_argmax + results, first_column + column + tl.argmax(x, 1, tie_break_left=True), mask=row_mask)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    difference = x - peak[:, None]
    e = exp(difference)
    if WANT_ENTROPY:
        tl.store(tile_spread + results, tl.sum(e * tl.maximum(difference, LEAST_LOG), 1), mask=row_mask)
    tl.store(tile_peak + results, peak, mask=row_mask)
    tl.store(tile_sum + results, tl.sum(e, 1), mask=row_mask)


@triton.jit(do_not_specialize=["num_rows", "first_column", "ignore_index"])
def gradient_stored_kernel(
    z,  # [N, columns of the slice], float32; may be the memory of dz
    dz,  # [N, columns of the slice], float32
    bias,
    target,
    total_weight,
    lse,  # [N]
    grad_lse,  # [N]
    grad_picked,  # [N]
    grad_total,  # [N]
    grad_maximum,  # [N], read where HAS_MAXIMUM
    argmax,  # [N]
    grad_entropy,  # [N], read where HAS_ENTROPY
    entropy,  # [N]
    num_rows,
    num_columns,  # of the slice
    first_column,  # where the slice starts in the vocabulary
    ignore_index,
    stride_z,
    stride_dz,
    VALUE_AND_SLOPE: tl.constexpr,  # the generated function (f, f')
    HAS_BIAS: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_IGNORE_INDEX: tl.constexpr,
    WANT_TOTAL: tl.constexpr,
    HAS_TOTAL_WEIGHT: tl.constexpr,
    HAS_MAXIMUM: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    column_blocks = tl.cdiv(num_columns, BLOCK_V)
    column = tl.program_id(0) % column_blocks * BLOCK_V
    rows = tl.program_id(0) // column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column + tl.arange(0, BLOCK_V)
    row_mask = rows < num_rows
    column_mask = columns < num_columns
    x, slope = VALUE_AND_SLOPE(_load_logits(z, bias, rows, columns, row_mask, column_mask, stride_z, HAS_BIAS))
    log_p = x - tl.load(lse + rows, mask=row_mask, other=0.0)[:, None]
    scale = tl.load(grad_lse + rows, mask=row_mask, other=0.0)[:, None]
    if HAS_ENTROPY:
        row_entropy = tl.load(entropy + rows, mask=row_mask, other=0.0)[:, None]
        entropy_grad = tl.load(grad_entropy + rows, mask=row_mask, other=0.0)[:, None]
        scale = scale - entropy_grad * (tl.maximum(log_p, LEAST_LOG) + row_entropy)
    dx = exp(log_p) * scale
    if HAS_TARGET:
        targets = tl.load(target + rows, mask=row_mask, other=-1)
        position, inside = position_in_tile(targets, first_column + column, ignore_index, HAS_IGNORE_INDEX, BLOCK_V)
        if tl.max(inside.to(tl.int32), 0) > 0:  # few tiles hold targets
            hit = tl.arange(0, BLOCK_V)[None, :] == position[:, None]
            target_grad = tl.load(grad_picked + rows, mask=row_mask, other=0.0)
            lack = expm1(tl.sum(tl.where(hit, log_p, 0.0), 1))
            factor = tl.sum(tl.where(hit, scale, 0.0), 1)
            # p * scale + target_grad: of a certain row, nothing but what p lacks of 1
            dx = tl.where(hit, (lack * factor + (factor + target_grad))[:, None], dx)
    if HAS_MAXIMUM:
        highest = tl.load(argmax + rows, mask=row_mask, other=-1)
        maximum_grad = tl.load(grad_maximum + rows, mask=row_mask, other=0.0)
        hit = first_column + column + tl.arange(0, BLOCK_V)[None, :] == highest[:, None]
        dx += tl.where(hit, maximum_grad[:, None], 0.0)
    if WANT_TOTAL:
        total_grad = tl.load(grad_total + rows, mask=row_mask, other=0.0)[:, None]
        if HAS_TOTAL_WEIGHT:
            weights = tl.load(total_weight + columns, mask=column_mask, other=0.0).to(tl.float32)
            total_grad = total_grad * weights[None, :]
        dx += total_grad
    offsets = rows[:, None].to(tl.int64) * stride_dz + columns[None, :]
    tl.store(dz + offsets, dx * slope, mask=row_mask[:, None] & column_mask[None, :])
