"""The backward over the rows that each vocabulary tile lists. `kernels/lists.py` says what the lists hold.

    dz[n, v]       = (p[n, v] * grad_lse[n] + [v == target[n]] * grad_picked[n]) * f'(z[n, v])      of listed rows
    grad_weight[v] = sum over n of dz[n, v] * hidden[n]  +  share[v] * skipped_hidden[tile of v]
    grad_hidden[n] = sum over v of dz[n, v] * weight[v] + sum over tiles: skipped_mass[tile, n] * skipped_weight[tile]

Of what a row does not list only its probability mass in the tile is known. Its place within the tile is taken to be
`share`, the same for all rows. One kernel computes dz of a round, slot by slot, into the workspace; then one kernel
for each gradient multiplies. A block of grad_weight is owned by one program, which adds in a fixed order. To
grad_hidden many tiles add at once: in fixed point, where the order does not matter.
"""

import triton
import triton.language as tl

from .pointwise import exp
from .tile import gather_rows, load_block, position_in_tile

FIXED_POINT_ONE = tl.constexpr(2.0**30)  # of int32; the sum of all |summands| of an element stays below it
SMALLEST_UNIT = tl.constexpr(2.0**-120)  # of the fixed point, so that its reciprocal is a float32


@triton.jit
def fixed_point_unit(grad_lse, grad_picked, lse, weight_peak, slope_bound):
    """What one unit of a row of the fixed-point gradient is worth; nan in a row that is not a number.

    |grad_hidden[n, d]| <= sum over v of |dz[n, v]| * |weight[v, d]| <= (|grad_lse| + |grad_picked|) * bound * peak.
    """
    peak = tl.load(weight_peak).to(tl.float32, bitcast=True)
    largest = (tl.abs(grad_lse) + tl.abs(grad_picked)) * (slope_bound * peak)
    unit = largest / FIXED_POINT_ONE
    unit = tl.where(unit < SMALLEST_UNIT, SMALLEST_UNIT, unit)
    return tl.where(lse == lse, unit, lse)


@triton.jit(do_not_specialize=["round_index", "num_columns", "ignore_index"])
def slot_gradient_kernel(
    hidden,  # pointer, [N, D]
    weight,  # TMA descriptor or pointer, [V, D]
    bias,  # [V]
    target,  # [N]
    lse,  # [N]
    grad_lse,  # [N]
    grad_picked,  # [N]
    dz,  # TMA descriptor or pointer, [slots of a round * BLOCK_N, BLOCK_V]
    slot_rows,
    slot_tile,
    round_slots,
    round_index,
    num_columns,
    width,
    ignore_index,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    VALUE_AND_SLOPE: tl.constexpr,  # the generated function (f, f')
    HAS_BIAS: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_IGNORE_INDEX: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    """dz of the slots of a round."""
    first = tl.load(round_slots + round_index)
    count = tl.load(round_slots + round_index + 1) - first
    for slot in tl.range(tl.program_id(0), count, NUM_PROGRAMS):
        column = tl.load(slot_tile + first + slot) * BLOCK_V
        columns = column + tl.arange(0, BLOCK_V)
        column_mask = columns < num_columns
        listed = tl.load(slot_rows + (first + slot).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))
        row_mask = listed >= 0
        rows = tl.maximum(listed, 0)
        row_lse = tl.load(lse + rows)
        row_grad = tl.load(grad_lse + rows)
        z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        for step in range(tl.cdiv(width, BLOCK_D)):
            depth = step * BLOCK_D
            h = gather_rows(hidden, rows, depth, width, stride_hn, stride_hd, BLOCK_D)
            if USE_TMA:
                w = weight.load([column, depth])
            else:
                w = load_block(weight, column, depth, num_columns, width, stride_wv, stride_wd, BLOCK_V, BLOCK_D)
            z = tl.dot(h, w.T, z, input_precision="ieee")
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        x, slope = VALUE_AND_SLOPE(z)
        dx = exp(x - row_lse[:, None]) * row_grad[:, None]
        if HAS_TARGET:
            targets = tl.load(target + rows)
            position, inside = position_in_tile(targets, column, ignore_index, HAS_IGNORE_INDEX, BLOCK_V)
            target_grad = tl.load(grad_picked + rows, mask=inside, other=0.0)
            hit = tl.arange(0, BLOCK_V)[None, :] == position[:, None]
            dx += tl.where(hit, target_grad[:, None], 0.0)
        # what lies outside of the logits must not add to the products
        gradient = tl.where(row_mask[:, None] & column_mask[None, :], dx * slope, 0.0)
        if USE_TMA:
            dz.store([slot * BLOCK_N, 0], gradient.to(dz.dtype))
        else:
            slot_row = (slot * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
            offsets = slot_row[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
            tl.store(dz + offsets, gradient.to(dz.dtype.element_ty))


@triton.jit(do_not_specialize=["round_index", "num_columns"])
def weight_gradient_kernel(
    hidden,  # pointer, [N, D]
    dz,  # TMA descriptor or pointer, [slots of a round * BLOCK_N, BLOCK_V]
    share,  # [V]
    skipped_hidden,  # [tiles, D], float32: sum over n of skipped_mass[tile, n] * hidden[n]
    grad_peak,  # one number, by which skipped_mass is divided
    grad_weight,  # [V, D], contiguous
    slot_rows,  # with BLOCK_N more at the end
    tile_start,
    round_tiles,
    round_index,
    num_columns,
    width,
    stride_hn,
    stride_hd,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,  # rows of one step of the inner product, a divisor of BLOCK_N
    NUM_PROGRAMS: tl.constexpr,
):
    """A program completes a block [BLOCK_V, BLOCK_D] of grad_weight: the sum over the slots of its tile."""
    STEPS: tl.constexpr = BLOCK_N // STEP
    first_tile = tl.load(round_tiles + round_index)
    num_tiles = tl.load(round_tiles + round_index + 1) - first_tile
    first_slot = tl.load(tile_start + first_tile)
    depth_blocks = tl.cdiv(width, BLOCK_D)
    peak = tl.load(grad_peak)
    for work in tl.range(tl.program_id(0), num_tiles * depth_blocks, NUM_PROGRAMS):
        tile = first_tile + work // depth_blocks
        depth = (work % depth_blocks) * BLOCK_D
        slot = tl.load(tile_start + tile)
        count = tl.load(tile_start + tile + 1) - slot
        total = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.float32)
        listed = slot_rows + slot.to(tl.int64) * BLOCK_N + tl.arange(0, STEP)
        # the next rows are looked up a step ahead: loads that wait for an index can't be pipelined
        rows = tl.load(listed)
        for step in range(count * STEPS):
            h = gather_rows(hidden, tl.maximum(rows, 0), depth, width, stride_hn, stride_hd, BLOCK_D)
            rows = tl.load(listed + (step + 1) * STEP)
            slot_row = (slot - first_slot) * BLOCK_N + step * STEP
            if USE_TMA:
                g = dz.load([slot_row, 0])
            else:
                g = load_block(dz, slot_row, 0, slot_row + STEP, BLOCK_V, BLOCK_V, 1, STEP, BLOCK_V)
            total = tl.dot(g.T, h, total, input_precision="ieee")
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        depths = depth + tl.arange(0, BLOCK_D)
        column_mask, depth_mask = columns < num_columns, depths < width
        spread = tl.load(share + columns, mask=column_mask, other=0.0) * peak
        skipped = tl.load(skipped_hidden + tile.to(tl.int64) * width + depths, mask=depth_mask, other=0.0)
        total += spread[:, None] * skipped[None, :]
        offsets = columns[:, None].to(tl.int64) * width + depths[None, :]
        tl.store(
            grad_weight + offsets,
            total.to(grad_weight.dtype.element_ty),
            mask=column_mask[:, None] & depth_mask[None, :],
        )


@triton.jit(do_not_specialize=["round_index", "row_blocks", "num_columns"])
def hidden_gradient_kernel(
    weight,  # TMA descriptor or pointer, [V, D]
    dz,  # TMA descriptor or pointer, [slots of a round * BLOCK_N, BLOCK_V]
    lse,  # [N]
    grad_lse,  # [N]
    grad_picked,  # [N]
    weight_peak,
    fixed,  # [N, D], int32, contiguous: added to
    slot_rows,
    slot_tile,
    dense,
    dense_tiles,
    tile_start,
    round_slots,
    round_dense,
    round_index,
    row_blocks,
    num_columns,
    width,
    slope_bound,
    stride_wv,
    stride_wd,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,  # columns of one step of the inner product, a divisor of BLOCK_V
    NUM_PROGRAMS: tl.constexpr,
):
    """A program multiplies a chain of slots with the same rows, then adds once to the gradient of these rows.

    A slot of a tile that is not dense is a chain of its own. The slots of the dense tiles form row_blocks chains.
    """
    STEPS: tl.constexpr = BLOCK_V // STEP
    first_slot = tl.load(round_slots + round_index)
    slots = tl.load(round_slots + round_index + 1) - first_slot
    first_dense = tl.load(round_dense + round_index)
    dense_count = tl.load(round_dense + round_index + 1) - first_dense
    dense_chains = tl.where(dense_count > 0, row_blocks, 0)
    depth_blocks = tl.cdiv(width, BLOCK_D)
    for work in tl.range(tl.program_id(0), (dense_chains + slots) * depth_blocks, NUM_PROGRAMS):
        chain = work // depth_blocks
        depth = (work % depth_blocks) * BLOCK_D
        in_dense = chain < dense_chains
        if in_dense:
            tile = tl.load(dense_tiles + first_dense)
            slot = tl.load(tile_start + tile) + chain
            # there may be fewer rows with a gradient than rows
            count = tl.where(slot < tl.load(tile_start + tile + 1), dense_count, 0)
        else:
            slot = first_slot + chain - dense_chains
            tile = tl.load(slot_tile + slot)
            count = tl.where(tl.load(dense + tile), 0, 1)
        if count > 0:
            listed = tl.load(slot_rows + slot.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))
            total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
            for step in range(count * STEPS):
                inner = (step % STEPS) * STEP
                slot_row = (slot - first_slot) * BLOCK_N
                column = tile * BLOCK_V + inner
                # looked up a step ahead, without a branch: what waits for either can't be pipelined
                next_tile = tl.load(dense_tiles + first_dense + (step + 1) // STEPS, mask=in_dense, other=0)
                tile = tl.where(in_dense, next_tile, tile)
                slot = tl.where(in_dense, tl.load(tile_start + next_tile) + chain, slot)
                if USE_TMA:
                    g = dz.load([slot_row, inner])
                    w = weight.load([column, depth])
                else:
                    g = load_block(dz, slot_row, inner, slot_row + BLOCK_N, BLOCK_V, BLOCK_V, 1, BLOCK_N, STEP)
                    w = load_block(weight, column, depth, num_columns, width, stride_wv, stride_wd, STEP, BLOCK_D)
                total = tl.dot(g, w, total, input_precision="ieee")
            row_mask = listed >= 0
            rows = tl.maximum(listed, 0)
            unit = fixed_point_unit(
                tl.load(grad_lse + rows), tl.load(grad_picked + rows), tl.load(lse + rows), weight_peak, slope_bound
            )
            depths = depth + tl.arange(0, BLOCK_D)
            offsets = rows[:, None].to(tl.int64) * width + depths[None, :]
            summand = tl.floor(total * (1.0 / unit)[:, None] + 0.5).to(tl.int32)
            tl.atomic_add(
                fixed + offsets, summand, mask=row_mask[:, None] & (depths < width)[None, :], sem="relaxed"
            )


@triton.jit(do_not_specialize=["num_rows"])
def complete_hidden_kernel(
    fixed,  # [N, D], int32
    skipped,  # [N, D]: sum over tiles of skipped_mass[tile, n] * skipped_weight[tile]
    lse,  # [N]
    grad_lse,  # [N]
    grad_picked,  # [N]
    weight_peak,
    grad_peak,  # one number, by which skipped_mass is divided
    grad_hidden,  # [N, D], contiguous
    num_rows,
    width,
    slope_bound,
    BLOCK_D: tl.constexpr,
):
    """A row of grad_hidden from both of its parts."""
    row = tl.program_id(0)
    unit = fixed_point_unit(
        tl.load(grad_lse + row), tl.load(grad_picked + row), tl.load(lse + row), weight_peak, slope_bound
    )
    peak = tl.load(grad_peak)
    for depth in range(0, width, BLOCK_D):
        depths = depth + tl.arange(0, BLOCK_D)
        mask = depths < width
        offsets = row.to(tl.int64) * width + depths
        computed = tl.load(fixed + offsets, mask=mask, other=0).to(tl.float32) * unit
        put_back = tl.load(skipped + offsets, mask=mask, other=0.0).to(tl.float32) * peak
        tl.store(grad_hidden + offsets, (computed + put_back).to(grad_hidden.dtype.element_ty), mask=mask)
