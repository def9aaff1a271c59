"""What is not computed with a whole tile: the tokens that are computed alone (`kernels/tops.py`), and what is skipped.

    dz[n, v]       = (p[n, v] * grad_lse[n] + [v == target[n]] * grad_picked[n]) * f'(z[n, v])       v listed for row n
    grad_hidden[n] = sum over the listed v of dz[n, v] * weight[v]
    grad_weight[v] = sum over n that list v of dz[n, v] * hidden[n]  +  share[v] * skipped_hidden[tile of v]

A program owns a row of the hidden states' gradient in fixed point, or a block of the weight's gradient, and begins its
sums, to which the blocks of `kernels/sparse.py` add.
"""

import triton
import triton.language as tl

from .fixed_point import fixed_point_unit, to_fixed_point
from .pointwise import exp
from .sparse import begins_before
from .tile import gather_rows
from .tops import number_at, with_column


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "ignore_index"])
def top_hidden_kernel(
    hidden,  # [N, D]
    weight,  # [V, D]
    bias,  # [V]
    target,  # [N]
    lse,  # [N]
    grad_lse,  # [N]
    grad_picked,  # [N]
    weight_peak,
    row_tokens,  # [N, 2 * tiles], int32: what each row lists: 2 * place in the vocabulary + which of its tile
    row_count,  # [N], int32: how many there are
    row_dz,  # [N, 2 * tiles]: dz of each, where KNOWN
    top_dz,  # [tiles, N, 2], int32: dz with the token's column, written where there is one and not KNOWN
    fixed,  # [N, ceil(D / 2)], int64, written where WANT_HIDDEN
    num_rows,
    num_tiles,
    width,
    ignore_index,
    slope_bound,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    VALUE_AND_SLOPE: tl.constexpr,  # the generated function (f, f')
    HAS_BIAS: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_IGNORE_INDEX: tl.constexpr,
    KNOWN: tl.constexpr,
    WANT_HIDDEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least D unless KNOWN
    TOKENS: tl.constexpr,  # at a time
    NUM_STAGES: tl.constexpr,  # the compiler would pipeline only what it multiplies
):
    """A program writes BLOCK_D columns of a row. Programs that are at work together write the same columns of many
    rows, for which they read no other columns of the weight."""
    row = tl.program_id(0) % num_rows
    depth = (tl.program_id(0) // num_rows) * BLOCK_D
    depths = depth + tl.arange(0, BLOCK_D)
    depth_mask = depths < width
    count = tl.load(row_count + row)
    row_lse, row_grad, target_grad = tl.load(lse + row), tl.load(grad_lse + row), tl.load(grad_picked + row)
    if not KNOWN:
        h = tl.load(hidden + row.to(tl.int64) * stride_hn + depths * stride_hd, mask=depth_mask, other=0.0)
        h = h.to(tl.float32)
        if HAS_TARGET:
            row_target = tl.load(target + row)
            if HAS_IGNORE_INDEX:
                row_target = tl.where(row_target == ignore_index, -1, row_target)
    total = tl.zeros((TOKENS, BLOCK_D), dtype=tl.float32)
    for first in tl.range(0, count, TOKENS, num_stages=NUM_STAGES):
        places = first + tl.arange(0, TOKENS)
        mask = places < count
        listed = row.to(tl.int64) * (2 * num_tiles) + places
        packed = tl.load(row_tokens + listed, mask=mask, other=0)
        tokens = packed // 2
        offsets = tokens[:, None].to(tl.int64) * stride_wv + depths[None, :] * stride_wd
        w = tl.load(weight + offsets, mask=mask[:, None] & depth_mask[None, :], other=0.0).to(tl.float32)
        if KNOWN:
            dz = tl.load(row_dz + listed, mask=mask, other=0.0)
        else:
            z = tl.sum(w * h[None, :], 1)
            if HAS_BIAS:
                z += tl.load(bias + tokens, mask=mask, other=0.0).to(tl.float32)
            x, slope = VALUE_AND_SLOPE(z)
            dx = exp(x - row_lse) * row_grad
            if HAS_TARGET:
                dx += tl.where(tokens == row_target, target_grad, 0.0)
            dz = tl.where(mask, dx * slope, 0.0)
            here = (tokens // BLOCK_V).to(tl.int64) * num_rows + row
            tl.store(top_dz + 2 * here + packed % 2, with_column(dz, tokens % BLOCK_V, BLOCK_V), mask=mask)
        total += dz[:, None] * w
    if WANT_HIDDEN:
        unit = fixed_point_unit(row_grad, target_grad, row_lse, weight_peak, slope_bound)
        sums = tl.expand_dims(tl.sum(total, 0), 0)
        both = to_fixed_point(sums, tl.zeros((1,), dtype=tl.float32) + unit)
        row_pairs = tl.cdiv(width, 2)
        pairs = (depth // 2 + tl.arange(0, BLOCK_D // 2))[None, :]
        tl.store(fixed + row.to(tl.int64) * row_pairs + pairs, both, mask=pairs < row_pairs)


@triton.jit(do_not_specialize=["round_index", "num_rows", "num_columns", "num_tiles"])
def top_weight_kernel(
    hidden,  # [N, D]
    top_dz,  # [tiles, N, 2], int32: dz of the tops, with their columns
    places,  # [TILE_WIDTH], int32: 0, 1, 2, ...
    share,  # [V]
    skipped_hidden,  # [tiles, D], float32: sum over n of skipped_mass[tile, n] * hidden[n]
    grad_peak,  # one number, by which skipped_mass is divided
    skips,  # [tiles], bool
    scale,  # one number, by which what is written is multiplied, or None
    grad_weight,  # [V, D], contiguous
    slot_rows,  # with BLOCK_N more at the end
    counts,  # [lists]: how many each has
    list_start,
    round_tiles,
    round_index,
    num_rows,
    num_columns,  # V
    num_tiles,
    width,
    stride_hn,
    stride_hd,
    TILE_WIDTH: tl.constexpr,
    PART: tl.constexpr,  # columns of a block
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,  # rows of one step of the inner product, a divisor of BLOCK_N
    NUM_PROGRAMS: tl.constexpr,
):
    """A program begins a block [PART, BLOCK_D] of a round: a product in which each row of dz has one number."""
    parts: tl.constexpr = TILE_WIDTH // PART
    depth_blocks = tl.cdiv(width, BLOCK_D)
    first_part = tl.load(round_tiles + round_index) * parts
    parts_here = tl.load(round_tiles + round_index + 1) * parts - first_part
    peak, dense_slots = tl.load(grad_peak), tl.load(list_start + 1)
    for work in tl.range(tl.program_id(0), parts_here * depth_blocks, NUM_PROGRAMS):
        index = first_part + work // depth_blocks
        tile = index // parts
        blocks = dense_slots + tl.load(list_start + 2 + tile) - tl.load(list_start + 1 + tile)
        if begins_before(skips, list_start, tile, num_tiles, parts) | (blocks == 0):
            first = (index % parts) * PART
            depth = (work % depth_blocks) * BLOCK_D
            slot = tl.load(list_start + 1 + num_tiles + index)
            steps = tl.cdiv(tl.load(counts + 1 + num_tiles + index), STEP)
            listed = slot_rows + slot.to(tl.int64) * BLOCK_N + tl.arange(0, STEP)
            tile_dz = top_dz + tile.to(tl.int64) * (2 * num_rows)
            # what is loaded, and what is made of it, is laid out as the tensor cores take it: turning it round, as the
            # compiler does with numbers it makes itself, would cost a fifth of the kernel's time
            here = tl.load(places + first + tl.arange(0, PART))
            total = tl.zeros((PART, BLOCK_D), dtype=tl.float32)
            # the next ones are looked up a step ahead: loads that wait for an index can't be pipelined
            entries = tl.load(listed)
            for step in range(steps):
                packed = tl.load(tile_dz + entries, mask=entries >= 0, other=0)
                h = gather_rows(hidden, tl.maximum(entries, 0) // 2, depth, width, stride_hn, stride_hd, BLOCK_D)
                entries = tl.load(listed + (step + 1) * STEP)
                g = number_at(packed[None, :], here[:, None], TILE_WIDTH).to(h.dtype)
                total = tl.dot(g, h, total, input_precision="ieee")
            columns = tile * TILE_WIDTH + first + tl.arange(0, PART)
            depths = depth + tl.arange(0, BLOCK_D)
            column_mask, depth_mask = columns < num_columns, depths < width
            spread = tl.load(share + columns, mask=column_mask, other=0.0) * peak
            skipped = tl.load(skipped_hidden + tile.to(tl.int64) * width + depths, mask=depth_mask, other=0.0)
            total += spread[:, None] * skipped[None, :]
            if scale is not None:
                total *= tl.load(scale)
            offsets = columns[:, None].to(tl.int64) * width + depths[None, :]
            mask = column_mask[:, None] & depth_mask[None, :]
            tl.store(grad_weight + offsets, total.to(grad_weight.dtype.element_ty), mask=mask)
