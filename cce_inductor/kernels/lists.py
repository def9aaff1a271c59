"""From which pairs of rows and vocabulary tiles are active to the lists that the sparse backward walks over.

There is one list of the dense rows. Each tile has a list of the other rows that need it, and one of the rows that need
its heaviest token only (`kernels/tops.py`). Lists are in order and cut into slots of BLOCK_N rows; the last slot of a
list is filled up with -1. With the rows of a slot and the columns of a tile goes a block of the logits. Its rows need
not lie next to each other, so what a batch costs does not depend on the order of its rows. The blocks of a tile are
those of the dense rows, then those of its own list; tops have none.

The workspace holds the blocks of a round. A round takes whole tiles, so that one program can complete a tile of the
weight's gradient. How many tiles that is depends on the data; how many rounds there may be does not: where few pairs
are active, the last rounds are empty. The blocks of a round are those of the dense rows, tile by tile, then the others.
"""

import triton
import triton.language as tl

from .pointwise import exp
from .tops import number_of


@triton.jit(do_not_specialize=["num_tiles", "usable", "rounds"])
def rounds_kernel(
    counts,  # [2 * tiles + 1], int32: rows in the list of each tile, of each tile's tops; dense rows
    list_start,  # [2 * tiles + 1], int32: the first slot of each list, and the end; the list of the dense rows is at 0
    round_tiles,  # [rounds + 1], int32: the first tile of each round
    num_tiles,
    usable,  # tiles that begin within this many blocks of each other fit in the workspace
    rounds,
    BLOCK_N: tl.constexpr,
    LISTS: tl.constexpr,  # a power of two, at least 2 * num_tiles
):
    """One program."""
    lists = tl.arange(0, LISTS)
    mask = lists < 2 * num_tiles
    dense_slots = tl.cdiv(tl.load(counts + 2 * num_tiles), BLOCK_N)
    slots = tl.cdiv(tl.load(counts + lists, mask=mask, other=0), BLOCK_N)
    before = tl.cumsum(slots, 0) - slots
    tl.store(list_start + lists, dense_slots + before, mask=mask)
    tl.store(list_start + 2 * num_tiles, dense_slots + tl.sum(slots, 0))
    first_block = before + lists * dense_slots
    of_tile = lists < num_tiles
    for index in range(rounds + 1):
        tl.store(round_tiles + index, tl.sum((of_tile & (first_block < index * usable)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def lists_kernel(
    active,  # [2 * tiles + 1, N], bool: rows of each list
    list_start,  # [2 * tiles + 1]
    slot_rows,  # [slots * BLOCK_N], int32: the listed rows
    slot_tile,  # [slots], int32: the tile of each slot
    num_rows,
    num_tiles,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,  # at a time
    ROW_BLOCKS: tl.constexpr,  # a power of two, at least the slots of a list
):
    """A program writes a list; the last program that of the dense rows."""
    index = tl.program_id(0)
    of_tile = index < 2 * num_tiles
    start = tl.where(of_tile, tl.load(list_start + index), 0)
    slots = tl.load(list_start + tl.where(of_tile, index + 1, 0)) - start
    first = start.to(tl.int64) * BLOCK_N
    count = 0
    for row in range(0, num_rows, ROWS):
        rows = row + tl.arange(0, ROWS)
        listed = tl.load(active + index.to(tl.int64) * num_rows + rows, mask=rows < num_rows, other=0).to(tl.int32)
        tl.store(slot_rows + first + count + tl.cumsum(listed, 0) - 1, rows, mask=listed != 0)
        count += tl.sum(listed, 0)
    tail = count + tl.arange(0, BLOCK_N)
    tl.store(slot_rows + first + tail, tl.full((BLOCK_N,), -1, dtype=tl.int32), mask=tail < slots * BLOCK_N)
    places = tl.arange(0, ROW_BLOCKS)
    tile = tl.zeros((ROW_BLOCKS,), dtype=tl.int32) + index % num_tiles
    tl.store(slot_tile + start + places, tile, mask=places < slots)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def skipped_kernel(
    tile_lse,  # [tiles, N]
    tile_top,  # [tiles, N], int32
    lse,  # [N]
    grad_lse,  # [N]
    grad_peak,  # one number: the largest |grad_lse|
    active,  # [2 * tiles + 1, N], bool: rows of each list
    skipped_mass,  # [tiles, N]: mass * grad_lse / grad_peak of what is not computed of the tile
    skips,  # [tiles], bool: whether any row skips the tile
    num_rows,
    num_tiles,
    TILE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,  # at a time
):
    """A program writes what is skipped in a tile."""
    tile = tl.program_id(0)
    here = tile.to(tl.int64) * num_rows
    all_tiles = num_tiles.to(tl.int64) * num_rows
    peak = tl.load(grad_peak)
    skipping = 0
    for row in range(0, num_rows, ROWS):
        rows = row + tl.arange(0, ROWS)
        mask = rows < num_rows
        computed = tl.load(active + here + rows, mask=mask, other=1) | tl.load(
            active + 2 * all_tiles + rows, mask=mask, other=1
        )
        top = tl.load(active + all_tiles + here + rows, mask=mask, other=0)
        grad = tl.load(grad_lse + rows, mask=mask, other=0.0)
        skipped = (computed == 0) & (grad != 0.0)
        skipping += tl.sum(skipped.to(tl.int32), 0)
        mass = exp(tl.load(tile_lse + here + rows, mask=mask, other=0.0) - tl.load(lse + rows, mask=mask, other=0.0))
        share = number_of(tl.load(tile_top + here + rows, mask=mask, other=0), TILE_WIDTH)
        mass = tl.where(top != 0, mass * (1.0 - share), mass)
        mass = tl.where(skipped, mass * (grad / peak), 0.0)
        tl.store(skipped_mass + here + rows, mass.to(skipped_mass.dtype.element_ty), mask=mask)
    tl.store(skips + tile, skipping > 0)
