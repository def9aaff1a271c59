"""Backward kernel: recomputes the logits of a block, or reads those that were kept, and stores their gradient.

    x  = f(z),  z = hidden @ weight.T + bias
    dx = p * grad_lse + sum over targets of [v == target] * grad_picked + total_weight[v] * grad_total
         + [v == argmax] * grad_maximum - p * (log p + entropy) * grad_entropy,      p = exp(x - lse)
    dz = dx * f'(z)                                                     stored in the dtype of the matmuls
    tile_bias[i, v] = sum over n in row block i of dz[n, v]             where the bias needs a gradient

One program owns each tile of dz. The products of dz with hidden and weight are plain matrix multiplications.
"""

import triton
import triton.language as tl

from .kept import load_logits
from .pointwise import LEAST_LOG, exp_of_difference
from .several_targets import add_targets
from .tile import position_in_tile, preactivations, tile_position


@triton.jit(do_not_specialize=["num_rows", "first_column", "ignore_index"])
def gradient_kernel(
    hidden,
    weight,
    bias,
    target,  # [N, num_targets]; where there are several, ascending in each row
    total_weight,
    lse,  # [N]
    grad_lse,  # [N]
    grad_picked,  # [N, num_targets], in the order of the targets
    grad_total,  # [N]
    grad_maximum,  # [N], read where HAS_MAXIMUM
    argmax,  # [N]
    grad_entropy,  # [N], read where HAS_ENTROPY
    entropy,  # [N]
    dz,  # TMA descriptor or pointer, [N, columns of the slice]
    tile_bias,  # [row blocks, columns of the slice]
    kept,  # the logits, where FROM_KEPT: `kept.py`; may be the memory of dz
    kept_base,  # [tiles of the slice, N]
    num_rows,
    num_columns,  # of the slice that `weight` holds
    width,
    num_targets,  # of each row
    first_column,  # where the slice starts in the vocabulary
    ignore_index,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_dz,
    stride_kept_tile,
    stride_kept_row,
    stride_kept_base,
    VALUE_AND_SLOPE: tl.constexpr,  # the generated function (f, f')
    HAS_BIAS: tl.constexpr,
    HAS_TARGET: tl.constexpr,  # one in each row
    SEARCH_STEPS: tl.constexpr,  # among several in each row: `several_targets.py`; else 0
    HAS_IGNORE_INDEX: tl.constexpr,
    WANT_TOTAL: tl.constexpr,
    HAS_TOTAL_WEIGHT: tl.constexpr,
    HAS_MAXIMUM: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    WANT_BIAS: tl.constexpr,
    FROM_KEPT: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    row_blocks = tl.cdiv(num_rows, BLOCK_N)
    column_blocks = tl.cdiv(num_columns, BLOCK_V)
    for tile in tl.range(tl.program_id(0), row_blocks * column_blocks, NUM_PROGRAMS):
        row_block, column_block = tile_position(tile, row_blocks, column_blocks)
        row = row_block * BLOCK_N
        column = column_block * BLOCK_V
        rows = row + tl.arange(0, BLOCK_N)
        columns = column + tl.arange(0, BLOCK_V)
        row_mask = rows < num_rows
        column_mask = columns < num_columns
        row_lse = tl.load(lse + rows, mask=row_mask, other=0.0)
        row_grad = tl.load(grad_lse + rows, mask=row_mask, other=0.0)
        if HAS_TARGET:
            targets = tl.load(target + rows, mask=row_mask, other=-1)
            position, inside = position_in_tile(targets, first_column + column, ignore_index, HAS_IGNORE_INDEX, BLOCK_V)
            target_grad = tl.load(grad_picked + rows, mask=row_mask & inside, other=0.0)
            holds_targets = tl.max(inside.to(tl.int32), 0) > 0  # few tiles do

        if FROM_KEPT:
            z = load_logits(
                kept, kept_base, column_block, rows, row_mask & (row_lse != float("inf")),
                stride_kept_tile, stride_kept_row, stride_kept_base, BLOCK_V,
            )  # fmt: skip
        else:
            z = preactivations(
                hidden, weight, bias, row, column, num_rows, num_columns, width,
                stride_hn, stride_hd, stride_wv, stride_wd, HAS_BIAS, USE_TMA, BLOCK_N, BLOCK_V, BLOCK_D,
            )  # fmt: skip
        x, slope = VALUE_AND_SLOPE(z)
        if HAS_ENTROPY:
            row_entropy = tl.load(entropy + rows, mask=row_mask, other=0.0)
            entropy_grad = tl.load(grad_entropy + rows, mask=row_mask, other=0.0)
            log_p = tl.maximum(x - row_lse[:, None], LEAST_LOG)
            scale = row_grad[:, None] - entropy_grad[:, None] * (log_p + row_entropy[:, None])
            dx = exp_of_difference(x, row_lse) * scale
        else:
            dx = exp_of_difference(x, row_lse) * row_grad[:, None]
        if SEARCH_STEPS > 0:
            dx = add_targets(
                dx, target, grad_picked, rows, row_mask, first_column + column, num_targets, ignore_index,
                HAS_IGNORE_INDEX, SEARCH_STEPS, BLOCK_V,
            )  # fmt: skip
        if HAS_TARGET:  # noqa: SIM102 (known when the kernel is compiled, holds_targets is not)
            if holds_targets:
                hit = tl.arange(0, BLOCK_V)[None, :] == position[:, None]
                dx += tl.where(hit, target_grad[:, None], 0.0)
        if HAS_MAXIMUM:
            highest = tl.load(argmax + rows, mask=row_mask, other=-1)
            maximum_grad = tl.load(grad_maximum + rows, mask=row_mask, other=0.0)
            hit = first_column + column + tl.arange(0, BLOCK_V)[None, :] == highest[:, None]
            dx += tl.where(hit, maximum_grad[:, None], 0.0)
        if WANT_TOTAL:
            total_grad = tl.load(grad_total + rows, mask=row_mask, other=0.0)[:, None]
            if HAS_TOTAL_WEIGHT:
                scale = tl.load(total_weight + columns, mask=column_mask, other=0.0).to(tl.float32)
                total_grad = total_grad * scale[None, :]
            dx += total_grad
        gradient = dx * slope
        if WANT_BIAS:
            sums = tl.sum(tl.where(row_mask[:, None], gradient, 0.0), 0)
            tl.store(tile_bias + row_block.to(tl.int64) * num_columns + columns, sums, mask=column_mask)
        if USE_TMA:
            dz.store([row, column], gradient.to(dz.dtype))
        else:
            offsets = rows[:, None].to(tl.int64) * stride_dz + columns[None, :]
            mask = row_mask[:, None] & column_mask[None, :]
            tl.store(dz + offsets, gradient.to(dz.dtype.element_ty), mask=mask)
