"""dz of a round's blocks from what the forward kept of their tiles, without a product (`kernels/codes.py`).

    dz[n, v] = (p[n, v] * grad_lse[n] + [v == target[n]] * grad_picked[n]) * f'(z[n, v])

f' is that of x = log(p) + lse, as far as codes and the records of a tile's tops tell p; the target has a logit that is
known. `kernels/sparse.py` computes the blocks of the other tiles, and multiplies.
"""

import triton
import triton.language as tl

from .codes import FIRST, among_columns, load_cubes, place_of_codes
from .pointwise import exp, log
from .sparse import blocks_between
from .tile import position_in_tile
from .tops import shares_of


@triton.jit(do_not_specialize=["round_index", "first_apart", "last_kept", "num_rows", "ignore_index"])
def coded_gradient_kernel(
    codes,  # [tiles, N, BLOCK_V], uint8, of the tiles up to first_apart
    codes_apart,  # the same of those from first_apart on
    tile_lse,  # [all tiles, N]
    tile_tops,  # [all tiles, N, 2], int32
    target,  # [N]
    target_logit,  # [N]: x of the target, unless SAME_SLOPE
    lse,  # [N]
    grad_lse,  # [N]
    grad_picked,  # [N]
    dz,  # [blocks of a round * SLOT, BLOCK_V], contiguous
    slot_rows,
    slot_tile,
    list_start,
    round_tiles,
    round_index,
    first_apart,
    last_kept,  # the first tile without codes
    num_rows,
    ignore_index,
    HAS_TARGET: tl.constexpr,
    HAS_IGNORE_INDEX: tl.constexpr,
    SAME_SLOPE: tl.constexpr,  # whether f' is the same everywhere
    SLOPE_BY_VALUE: tl.constexpr,  # the generated function f' of x
    SLOT: tl.constexpr,  # rows of a slot
    BLOCK_N: tl.constexpr,  # rows at a time, a divisor of SLOT
    BLOCK_V: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    PIECES: tl.constexpr = SLOT // BLOCK_N
    begin, end = tl.load(round_tiles + round_index), tl.load(round_tiles + round_index + 1)
    _, _, dense_slots, dense_blocks, _, _ = blocks_between(list_start, begin, end)
    _, _, _, dense_here, first_slot, own_here = blocks_between(list_start, begin, tl.minimum(end, last_kept))
    for work in tl.range(tl.program_id(0), (dense_here + own_here) * PIECES, NUM_PROGRAMS):
        index = work // PIECES
        if index < dense_here:
            slot = index % dense_slots
            tile = begin + index // dense_slots
            block = index
        else:
            slot = first_slot + index - dense_here
            tile = tl.load(slot_tile + slot)
            block = dense_blocks + slot - first_slot
        piece = (work % PIECES) * BLOCK_N + tl.arange(0, BLOCK_N)
        listed = tl.load(slot_rows + slot.to(tl.int64) * SLOT + piece)
        row_mask = listed >= 0
        rows = tl.maximum(listed, 0)
        kept, tile_there = place_of_codes(codes, codes_apart, first_apart, tile)
        here = tile.to(tl.int64) * num_rows + rows
        # rows that are not listed have no numbers but zero, and so must not add to the products
        first = tl.load(tile_tops + 2 * here, mask=row_mask, other=0)
        second = tl.load(tile_tops + 2 * here + 1, mask=row_mask, other=0)
        row_lse = tl.load(lse + rows, mask=row_mask, other=0.0)
        log_sum = tl.load(tile_lse + here, mask=row_mask, other=0.0)
        grad = exp(log_sum - row_lse) * tl.load(grad_lse + rows, mask=row_mask, other=0.0)
        of_first, of_second, of_others = shares_of(first, second, BLOCK_V)
        first_grad = grad * of_first
        if HAS_TARGET:  # it is the first in its tile
            targets = tl.load(target + rows)
            inside = position_in_tile(targets, tile * BLOCK_V, ignore_index, HAS_IGNORE_INDEX, BLOCK_V)[1] & row_mask
            first_grad += tl.load(grad_picked + rows, mask=inside, other=0.0)
        kept, tile_there = place_of_codes(codes, codes_apart, first_apart, tile)
        cubes = load_cubes(kept, first, second, tile_there, rows, row_mask, num_rows, BLOCK_V)
        gradient = among_columns(cubes, first_grad, grad * of_second, grad * of_others)
        if SAME_SLOPE:
            gradient *= SLOPE_BY_VALUE(gradient)  # whatever it is of
        else:
            x = log(among_columns(cubes, of_first, of_second, of_others)) + log_sum[:, None]
            if HAS_TARGET:
                x = tl.where((cubes == FIRST) & inside[:, None], tl.load(target_logit + rows)[:, None], x)
            gradient *= SLOPE_BY_VALUE(x)
        block_rows = (block.to(tl.int64) * SLOT + piece) * BLOCK_V
        offsets = tl.multiple_of(block_rows[:, None], (1, 16)) + tl.arange(0, BLOCK_V)[None, :]
        tl.store(dz + offsets, gradient.to(dz.dtype.element_ty))
