"""The backward over the rows listed for each vocabulary tile. `kernels/lists.py` says what lists, slots, rounds are.

    dz[n, v]        = (p[n, v] * grad_lse[n] + [v == target[n]] * grad_picked[n]) * f'(z[n, v])
    grad_weight[v] += sum over n of dz[n, v] * hidden[n]
    grad_hidden[n] += sum over v of dz[n, v] * weight[v] + sum over tiles: skipped_mass[tile, n] * skipped_weight[tile]

What other kernels put there before is what is not listed: tokens computed alone (`kernels/top_gradient.py`), and the
others by their probability mass in the tile, whose place within it is taken to be `share`, the same for all rows. One
kernel computes dz of a round, block by block, into the workspace; then one kernel for each gradient multiplies. A block
of grad_weight is owned by one program, which adds in a fixed order. To grad_hidden many tiles add at once: in fixed
point, where the order does not matter.
"""

import triton
import triton.language as tl

from .fixed_point import fixed_point_unit, from_fixed_point, to_fixed_point
from .pointwise import exp
from .tile import gather_rows, load_block, position_in_tile, tile_position


@triton.jit
def round_blocks(list_start, round_tiles, round_index):
    """(first tile, tiles, slots of the dense rows, their blocks, first slot of the tiles' own lists, how many)."""
    return blocks_between(list_start, tl.load(round_tiles + round_index), tl.load(round_tiles + round_index + 1))


@triton.jit
def blocks_between(list_start, first_tile, last_tile):
    """The same of the tiles from the first to before the last; of none where they are in the wrong order."""
    last_tile = tl.maximum(first_tile, last_tile)
    dense_slots = tl.load(list_start + 1)
    first_slot = tl.load(list_start + 1 + first_tile)
    own_slots = tl.load(list_start + 1 + last_tile) - first_slot
    tiles = last_tile - first_tile
    return first_tile, tiles, dense_slots, tiles * dense_slots, first_slot, own_slots


@triton.jit(do_not_specialize=["round_index", "first_left", "num_columns", "ignore_index"])
def block_gradient_kernel(
    hidden,  # pointer, [N, D]
    dense_hidden,  # TMA descriptor or pointer, [slots * BLOCK_N, D], contiguous: those of the dense rows, as listed
    weight,  # TMA descriptor or pointer, [V, D]
    bias,  # [V]
    target,  # [N]
    lse,  # [N]
    grad_lse,  # [N]
    grad_picked,  # [N]
    dz,  # TMA descriptor or pointer, [blocks of a round * BLOCK_N, BLOCK_V]
    slot_rows,
    slot_tile,
    list_start,
    round_tiles,
    round_index,
    first_left,  # the first tile that is left to this kernel
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
    """dz of the blocks of a round."""
    steps = tl.cdiv(width, BLOCK_D)
    begin, end = tl.load(round_tiles + round_index), tl.load(round_tiles + round_index + 1)
    _, _, dense_slots, dense_blocks, round_slot, _ = blocks_between(list_start, begin, end)
    first_tile, tiles, _, dense_here, first_slot, own_here = blocks_between(
        list_start, tl.minimum(tl.maximum(begin, first_left), end), end
    )
    for work in tl.range(tl.program_id(0), dense_here + own_here, NUM_PROGRAMS):
        if work < dense_here:
            slot, tile_here = tile_position(work, dense_slots, tiles)
            tile = first_tile + tile_here
            block = (tile - begin) * dense_slots + slot
            dense_steps, own_steps = steps, 0
        else:
            slot = first_slot + work - dense_here
            tile = tl.load(slot_tile + slot)
            block = dense_blocks + slot - round_slot
            dense_steps, own_steps = 0, steps
        column = tile * BLOCK_V
        columns = column + tl.arange(0, BLOCK_V)
        column_mask = columns < num_columns
        listed = tl.load(slot_rows + slot.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))
        row_mask = listed >= 0
        rows = tl.maximum(listed, 0)
        row_lse = tl.load(lse + rows)
        row_grad = tl.load(grad_lse + rows)
        z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        for step in range(dense_steps):
            depth = step * BLOCK_D
            if USE_TMA:
                h = dense_hidden.load([slot * BLOCK_N, depth])
                w = weight.load([column, depth])
            else:
                row = slot * BLOCK_N
                h = load_block(dense_hidden, row, depth, row + BLOCK_N, width, width, 1, BLOCK_N, BLOCK_D)
                w = load_block(weight, column, depth, num_columns, width, stride_wv, stride_wd, BLOCK_V, BLOCK_D)
            z = tl.dot(h, w.T, z, input_precision="ieee")
        for step in range(own_steps):
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
            dz.store([block * BLOCK_N, 0], gradient.to(dz.dtype))
        else:
            block_rows = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
            offsets = block_rows[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
            tl.store(dz + offsets, gradient.to(dz.dtype.element_ty))


@triton.jit
def begins_before(skips, list_start, tile, num_tiles, PARTS: tl.constexpr):
    """Whether grad_weight of a tile has a part that is not from its blocks: of what is skipped or computed alone."""
    tops = list_start + 1 + num_tiles + tile * PARTS
    return (tl.load(skips + tile) != 0) | (tl.load(tops + PARTS) > tl.load(tops))


@triton.jit(do_not_specialize=["round_index", "num_columns", "num_tiles"])
def weight_gradient_kernel(
    hidden,  # pointer, [N, D]
    dense_hidden,  # TMA descriptor or pointer, [slots * BLOCK_N, D], contiguous: those of the dense rows, as listed
    dz,  # TMA descriptor or pointer, [blocks of a round * BLOCK_N, BLOCK_V]
    skips,  # [tiles], bool
    scale,  # one number, by which what is written is multiplied, or None
    grad_weight,  # [V, D], contiguous: added to where `begins_before`, else written
    slot_rows,  # with BLOCK_N more at the end
    counts,  # [lists]: how many rows each has
    list_start,
    round_tiles,
    round_index,
    num_columns,
    num_tiles,
    width,
    stride_hn,
    stride_hd,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,  # rows of one step of the inner product, a divisor of BLOCK_N
    PARTS: tl.constexpr,  # of a tile: see kernels/top_gradient.py
    NUM_PROGRAMS: tl.constexpr,
):
    """A program completes a block [BLOCK_V, BLOCK_D] of grad_weight with the sum over the blocks of its tile."""
    STEPS: tl.constexpr = BLOCK_N // STEP
    first_tile, tiles, dense_slots, dense_blocks, first_slot, _ = round_blocks(list_start, round_tiles, round_index)
    depth_blocks = tl.cdiv(width, BLOCK_D)
    dense_steps = dense_slots * STEPS
    for work in tl.range(tl.program_id(0), tiles * depth_blocks, NUM_PROGRAMS):
        tile_in_round = work // depth_blocks
        tile = first_tile + tile_in_round
        depth = (work % depth_blocks) * BLOCK_D
        slot = tl.load(list_start + 1 + tile)
        steps = tl.cdiv(tl.load(counts + 1 + tile), STEP)
        total = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.float32)
        for step in range(dense_steps):
            row = step * STEP
            block_row = tile_in_round * dense_slots * BLOCK_N + row
            if USE_TMA:
                h = dense_hidden.load([row, depth])
                g = dz.load([block_row, 0])
            else:
                h = load_block(dense_hidden, row, depth, row + STEP, width, width, 1, STEP, BLOCK_D)
                g = load_block(dz, block_row, 0, block_row + STEP, BLOCK_V, BLOCK_V, 1, STEP, BLOCK_V)
            total = tl.dot(g.T, h, total, input_precision="ieee")
        own_rows = slot_rows + slot.to(tl.int64) * BLOCK_N + tl.arange(0, STEP)
        own_block = dense_blocks + slot - first_slot
        # the next rows are looked up a step ahead: loads that wait for an index can't be pipelined
        rows = tl.load(own_rows)
        for step in range(steps):
            h = gather_rows(hidden, tl.maximum(rows, 0), depth, width, stride_hn, stride_hd, BLOCK_D)
            rows = tl.load(own_rows + (step + 1) * STEP)
            block_row = own_block * BLOCK_N + step * STEP
            if USE_TMA:
                g = dz.load([block_row, 0])
            else:
                g = load_block(dz, block_row, 0, block_row + STEP, BLOCK_V, BLOCK_V, 1, STEP, BLOCK_V)
            total = tl.dot(g.T, h, total, input_precision="ieee")
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        depths = depth + tl.arange(0, BLOCK_D)
        offsets = columns[:, None].to(tl.int64) * width + depths[None, :]
        mask = (columns < num_columns)[:, None] & (depths < width)[None, :]
        if scale is not None:
            total *= tl.load(scale)
        if dense_steps + steps > 0:  # what has no block is complete: it need not be read and written again
            if begins_before(skips, list_start, tile, num_tiles, PARTS):
                total += tl.load(grad_weight + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_weight + offsets, total.to(grad_weight.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["round_index", "num_columns", "depths_at_once"])
def hidden_gradient_kernel(
    weight,  # TMA descriptor or pointer, [V, D]
    dz,  # TMA descriptor or pointer, [blocks of a round * BLOCK_N, BLOCK_V]
    lse,  # [N]
    grad_lse,  # [N]
    grad_picked,  # [N]
    weight_peak,
    fixed,  # [N, ceil(D / 2)], int64, contiguous: added to, column 2i + 1 in the upper and 2i in the lower half
    slot_rows,
    slot_tile,
    list_start,
    round_tiles,
    round_index,
    num_columns,
    width,
    depths_at_once,  # blocks of columns of the gradient; additions in memory are slow outside of the L2 cache
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
    """A program multiplies a chain of blocks with the same rows, then adds once to the gradient of these rows.

    The blocks of a slot of dense rows form one chain; they come first, for they are long. Those that are left when all
    programs have had as many are cut into pieces, so that all have some of them. Every other block is a chain.
    """
    STEPS: tl.constexpr = BLOCK_V // STEP
    first_tile, tiles, dense_slots, dense_blocks, first_slot, own_slots = round_blocks(
        list_start, round_tiles, round_index
    )
    depth_blocks = tl.cdiv(width, BLOCK_D)
    chains = tl.where(tiles > 0, dense_slots * depth_blocks, 0)
    whole = chains // NUM_PROGRAMS * NUM_PROGRAMS
    pieces = tl.minimum(NUM_PROGRAMS // tl.maximum(chains - whole, 1), tl.maximum(tiles, 1))
    dense_work = whole + (chains - whole) * pieces
    for work in tl.range(tl.program_id(0), dense_work + own_slots * depth_blocks, NUM_PROGRAMS):
        if work < dense_work:
            cut = work >= whole
            chain = tl.where(cut, whole + (work - whole) // pieces, work)
            begin = tl.where(cut, (work - whole) % pieces * tiles // pieces, 0)
            end = tl.where(cut, ((work - whole) % pieces + 1) * tiles // pieces, tiles)
            slot = chain // depth_blocks
            depth = (chain % depth_blocks) * BLOCK_D
            block, blocks, apart = begin * dense_slots + slot, end - begin, dense_slots
            tile = first_tile + begin
        else:
            group = (work - dense_work) // (own_slots * depths_at_once)
            within = (work - dense_work) % (own_slots * depths_at_once)
            depths_here = tl.minimum(depth_blocks - group * depths_at_once, depths_at_once)
            depth = (group * depths_at_once + within % depths_here) * BLOCK_D
            slot = first_slot + within // depths_here
            block, blocks, apart = dense_blocks + slot - first_slot, 1, 0
            tile = tl.load(slot_tile + slot)
        total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        for step in range(blocks * STEPS):
            inner = (step % STEPS) * STEP
            block_row = (block + (step // STEPS) * apart) * BLOCK_N
            column = (tile + step // STEPS) * BLOCK_V + inner
            if USE_TMA:
                g = dz.load([block_row, inner])
                w = weight.load([column, depth])
            else:
                g = load_block(dz, block_row, inner, block_row + BLOCK_N, BLOCK_V, BLOCK_V, 1, BLOCK_N, STEP)
                w = load_block(weight, column, depth, num_columns, width, stride_wv, stride_wd, STEP, BLOCK_D)
            total = tl.dot(g, w, total, input_precision="ieee")
        listed = tl.load(slot_rows + slot.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))
        row_mask = listed >= 0
        rows = tl.maximum(listed, 0)
        unit = fixed_point_unit(
            tl.load(grad_lse + rows), tl.load(grad_picked + rows), tl.load(lse + rows), weight_peak, slope_bound
        )
        both = to_fixed_point(total, unit)
        pairs = depth // 2 + tl.arange(0, BLOCK_D // 2)
        row_pairs = tl.cdiv(width, 2)
        offsets = rows[:, None].to(tl.int64) * row_pairs + pairs[None, :]
        tl.atomic_add(fixed + offsets, both, mask=row_mask[:, None] & (pairs < row_pairs)[None, :], sem="relaxed")


@triton.jit(do_not_specialize=["num_rows"])
def complete_hidden_kernel(
    fixed,  # [N, ceil(D / 2)], int64
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
        both = tl.load(fixed + row.to(tl.int64) * tl.cdiv(width, 2) + depths // 2, mask=mask, other=0)
        computed = from_fixed_point(both, depths, unit)
        put_back = tl.load(skipped + offsets, mask=mask, other=0.0).to(tl.float32) * peak
        tl.store(grad_hidden + offsets, (computed + put_back).to(grad_hidden.dtype.element_ty), mask=mask)
