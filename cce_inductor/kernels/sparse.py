"""The backward over active blocks only. `ops/block_plan.py` says what the lists of blocks hold.

    dz[n, v]       = (p[n, v] * grad_lse[n] + [v == target[n]] * grad_picked[n]) * f'(z[n, v])      in active blocks
    grad_weight[v] = sum over n of dz[n, v] * hidden[n]  +  share[v] * skipped_hidden[tile of v]
    grad_hidden[n] = sum over v of dz[n, v] * weight[v] + sum over tiles: skipped_mass[tile, n] * skipped_weight[tile]

In a skipped block only the probability mass of each row and tile is known. Its place within the tile is taken to be
`share`, the same for all rows. One kernel computes dz of a round, a block a slot of the workspace; then one kernel for
each gradient multiplies. Every output block is owned by one program, which adds in a fixed order.
"""

import triton
import triton.language as tl

from .pointwise import exp
from .tile import load_block, position_in_tile, preactivations


@triton.jit(do_not_specialize=["round_index", "row_blocks", "num_rows", "num_columns", "ignore_index"])
def block_gradient_kernel(
    hidden,  # TMA descriptor or pointer, [N, D]
    weight,  # TMA descriptor or pointer, [V, D]
    bias,  # [V]
    target,  # [N]
    lse,  # [N]
    grad_lse,  # [N]
    grad_picked,  # [N]
    dz,  # TMA descriptor or pointer, [slots * BLOCK_N, BLOCK_V]
    numbers,
    round_places,
    round_index,
    row_blocks,
    num_rows,
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
    """dz of the active blocks of a round."""
    first = tl.load(round_places + round_index)
    count = tl.load(round_places + round_index + 1) - first
    for slot in tl.range(tl.program_id(0), count, NUM_PROGRAMS):
        number = tl.load(numbers + first + slot)
        row = (number % row_blocks) * BLOCK_N
        column = (number // row_blocks) * BLOCK_V
        rows = row + tl.arange(0, BLOCK_N)
        columns = column + tl.arange(0, BLOCK_V)
        row_mask = rows < num_rows
        row_lse = tl.load(lse + rows, mask=row_mask, other=0.0)
        row_grad = tl.load(grad_lse + rows, mask=row_mask, other=0.0)
        z = preactivations(
            hidden, weight, bias, row, column, num_rows, num_columns, width,
            stride_hn, stride_hd, stride_wv, stride_wd, HAS_BIAS, USE_TMA, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        x, slope = VALUE_AND_SLOPE(z)
        dx = exp(x - row_lse[:, None]) * row_grad[:, None]
        if HAS_TARGET:
            targets = tl.load(target + rows, mask=row_mask, other=-1)
            position, inside = position_in_tile(targets, column, ignore_index, HAS_IGNORE_INDEX, BLOCK_V)
            target_grad = tl.load(grad_picked + rows, mask=row_mask & inside, other=0.0)
            hit = tl.arange(0, BLOCK_V)[None, :] == position[:, None]
            dx += tl.where(hit, target_grad[:, None], 0.0)
        # what lies outside of the logits must not add to the products
        inside_logits = row_mask[:, None] & (columns < num_columns)[None, :]
        gradient = tl.where(inside_logits, dx * slope, 0.0)
        if USE_TMA:
            dz.store([slot * BLOCK_N, 0], gradient.to(dz.dtype))
        else:
            slot_rows = (slot * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
            offsets = slot_rows[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
            tl.store(dz + offsets, gradient.to(dz.dtype.element_ty))


@triton.jit(do_not_specialize=["round_index", "row_blocks", "num_rows", "num_columns"])
def weight_gradient_kernel(
    hidden,  # TMA descriptor or pointer, [N, D]
    dz,  # TMA descriptor or pointer, [slots * BLOCK_N, BLOCK_V]
    share,  # [V]
    skipped_hidden,  # [tiles, D]: sum over n of skipped_mass[tile, n] * hidden[n]
    grad_weight,  # [V, D], contiguous
    numbers,
    tile_start,
    round_tiles,
    round_index,
    row_blocks,
    num_rows,
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
    """A program completes a block [BLOCK_V, BLOCK_D] of grad_weight: the sum over the active row blocks of its tile."""
    STEPS: tl.constexpr = BLOCK_N // STEP
    first_tile = tl.load(round_tiles + round_index)
    num_tiles = tl.load(round_tiles + round_index + 1) - first_tile
    first_place = tl.load(tile_start + first_tile)
    depth_blocks = tl.cdiv(width, BLOCK_D)
    for work in tl.range(tl.program_id(0), num_tiles * depth_blocks, NUM_PROGRAMS):
        tile = first_tile + work // depth_blocks
        depth = (work % depth_blocks) * BLOCK_D
        place = tl.load(tile_start + tile)
        count = tl.load(tile_start + tile + 1) - place
        total = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.float32)
        # the next block is looked up a step ahead: loads that wait for an index can't be pipelined
        number = tl.load(numbers + place)
        for step in range(count * STEPS):
            row = (number % row_blocks) * BLOCK_N + (step % STEPS) * STEP
            slot_row = (place - first_place) * BLOCK_N + step * STEP
            number = tl.load(numbers + place + (step + 1) // STEPS)
            if USE_TMA:
                g = dz.load([slot_row, 0])
                h = hidden.load([row, depth])
            else:
                g = load_block(dz, slot_row, 0, slot_row + STEP, BLOCK_V, BLOCK_V, 1, STEP, BLOCK_V)
                h = load_block(hidden, row, depth, num_rows, width, stride_hn, stride_hd, STEP, BLOCK_D)
            total = tl.dot(g.T, h, total, input_precision="ieee")
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        depths = depth + tl.arange(0, BLOCK_D)
        column_mask, depth_mask = columns < num_columns, depths < width
        spread = tl.load(share + columns, mask=column_mask, other=0.0)
        skipped = tl.load(skipped_hidden + tile.to(tl.int64) * width + depths, mask=depth_mask, other=0.0)
        total += spread[:, None] * skipped.to(tl.float32)[None, :]
        offsets = columns[:, None].to(tl.int64) * width + depths[None, :]
        tl.store(
            grad_weight + offsets,
            total.to(grad_weight.dtype.element_ty),
            mask=column_mask[:, None] & depth_mask[None, :],
        )


@triton.jit(do_not_specialize=["round_index", "row_blocks", "num_rows", "num_columns"])
def hidden_gradient_kernel(
    weight,  # TMA descriptor or pointer, [V, D]
    dz,  # TMA descriptor or pointer, [slots * BLOCK_N, BLOCK_V]
    grad_hidden,  # [N, D], float32, contiguous, added to
    row_tiles,
    row_places,
    row_start,
    round_places,
    round_index,
    row_blocks,
    num_rows,
    num_columns,
    width,
    stride_wv,
    stride_wd,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,  # columns of one step of the inner product, a divisor of BLOCK_V
    NUM_PROGRAMS: tl.constexpr,
):
    """A program owns a block [BLOCK_N, BLOCK_D] of grad_hidden and adds the active tiles of a round to it."""
    STEPS: tl.constexpr = BLOCK_V // STEP
    first_place = tl.load(round_places + round_index)
    depth_blocks = tl.cdiv(width, BLOCK_D)
    for work in tl.range(tl.program_id(0), row_blocks * depth_blocks, NUM_PROGRAMS):
        row_block = work // depth_blocks  # the fullest row blocks come first
        depth = (work % depth_blocks) * BLOCK_D
        start = tl.load(row_start + round_index * row_blocks + row_block)
        count = tl.load(row_start + (round_index + 1) * row_blocks + row_block) - start
        if count > 0:
            total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
            tile = tl.load(row_tiles + start)
            place = tl.load(row_places + start)
            for step in range(count * STEPS):
                inner = (step % STEPS) * STEP
                slot_row = (place - first_place) * BLOCK_N
                column = tile * BLOCK_V + inner
                tile = tl.load(row_tiles + start + (step + 1) // STEPS)
                place = tl.load(row_places + start + (step + 1) // STEPS)
                if USE_TMA:
                    g = dz.load([slot_row, inner])
                    w = weight.load([column, depth])
                else:
                    g = load_block(dz, slot_row, inner, slot_row + BLOCK_N, BLOCK_V, BLOCK_V, 1, BLOCK_N, STEP)
                    w = load_block(weight, column, depth, num_columns, width, stride_wv, stride_wd, STEP, BLOCK_D)
                total = tl.dot(g, w, total, input_precision="ieee")
            rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
            depths = depth + tl.arange(0, BLOCK_D)
            offsets = rows[:, None].to(tl.int64) * width + depths[None, :]
            mask = (rows < num_rows)[:, None] & (depths < width)[None, :]
            tl.store(grad_hidden + offsets, tl.load(grad_hidden + offsets, mask=mask, other=0.0) + total, mask=mask)
