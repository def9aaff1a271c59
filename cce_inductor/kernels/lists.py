"""From which pairs of rows and vocabulary tiles are active to the lists that the sparse backward walks over.

There is one list of the dense rows, and each tile has a list of the other rows that need it. Lists are in order and
cut into slots of BLOCK_N rows; the last slot of a list is filled up with -1. With the rows of a slot and the columns
of a tile goes a block of the logits. Its rows need not lie next to each other, so what a batch costs does not depend
on the order of its rows. The blocks of a tile are those of the dense rows, then those of its own list.

The workspace holds the blocks of a round. A round takes whole tiles, so that one program can complete a tile of the
weight's gradient. How many tiles that is depends on the data; how many rounds there may be does not: where few pairs
are active, the last rounds are empty. The blocks of a round are those of the dense rows, tile by tile, then the others.
"""

import triton
import triton.language as tl

from .pointwise import exp


@triton.jit(do_not_specialize=["num_tiles", "usable", "rounds"])
def rounds_kernel(
    counts,  # [tiles + 1], int32: rows in the list of each tile; dense rows
    tile_start,  # [tiles + 1], int32: the first slot of each tile's list; the list of the dense rows starts at 0
    round_tiles,  # [rounds + 1], int32: the first tile of each round
    num_tiles,
    usable,  # tiles that begin within this many blocks of each other fit in the workspace
    rounds,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,  # a power of two, at least num_tiles
):
    """One program."""
    tiles = tl.arange(0, TILES)
    mask = tiles < num_tiles
    dense_slots = tl.cdiv(tl.load(counts + num_tiles), BLOCK_N)
    slots = tl.cdiv(tl.load(counts + tiles, mask=mask, other=0), BLOCK_N)
    before = tl.cumsum(slots, 0) - slots
    tl.store(tile_start + tiles, dense_slots + before, mask=mask)
    tl.store(tile_start + num_tiles, dense_slots + tl.sum(slots, 0))
    first_block = before + tiles * dense_slots
    for index in range(rounds + 1):
        tl.store(round_tiles + index, tl.sum((mask & (first_block < index * usable)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def lists_kernel(
    tile_lse,  # [tiles, N]
    lse,  # [N]
    grad_lse,  # [N]
    grad_peak,  # one number: the largest |grad_lse|
    active,  # [tiles + 1, N], bool: rows of each list
    tile_start,  # [tiles + 1]
    slot_rows,  # [slots * BLOCK_N], int32: the listed rows
    slot_tile,  # [slots], int32: the tile of each slot
    skipped_mass,  # [tiles, N]: mass * grad_lse / grad_peak where the tile is not computed, else 0
    skips,  # [tiles], bool: whether any row skips the tile
    num_rows,
    num_tiles,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,  # at a time
    ROW_BLOCKS: tl.constexpr,  # a power of two, at least the slots of a list
):
    """A program writes the list of one tile, and what is skipped there; the last program that of the dense rows."""
    tile = tl.program_id(0)
    of_tile = tile < num_tiles
    start = tl.where(of_tile, tl.load(tile_start + tile), 0)
    slots = tl.load(tile_start + tl.where(of_tile, tile + 1, 0)) - start
    first = start.to(tl.int64) * BLOCK_N
    here = tile.to(tl.int64) * num_rows
    dense = active + num_tiles.to(tl.int64) * num_rows
    peak = tl.load(grad_peak)
    count, skipping = 0, 0
    for row in range(0, num_rows, ROWS):
        rows = row + tl.arange(0, ROWS)
        mask = rows < num_rows
        listed = tl.load(active + here + rows, mask=mask, other=0).to(tl.int32)
        tl.store(slot_rows + first + count + tl.cumsum(listed, 0) - 1, rows, mask=listed != 0)
        count += tl.sum(listed, 0)
        mask = rows < tl.where(of_tile, num_rows, 0)
        computed = listed + tl.load(dense + rows, mask=mask, other=1).to(tl.int32)
        grad = tl.load(grad_lse + rows, mask=mask, other=0.0)
        skipped = (computed == 0) & (grad != 0.0)
        skipping += tl.sum(skipped.to(tl.int32), 0)
        mass = exp(tl.load(tile_lse + here + rows, mask=mask, other=0.0) - tl.load(lse + rows, mask=mask, other=0.0))
        mass = tl.where(skipped, mass * (grad / peak), 0.0)
        tl.store(skipped_mass + here + rows, mass.to(skipped_mass.dtype.element_ty), mask=mask)
    if of_tile:
        tl.store(skips + tile, skipping > 0)
    tail = count + tl.arange(0, BLOCK_N)
    tl.store(slot_rows + first + tail, tl.full((BLOCK_N,), -1, dtype=tl.int32), mask=tail < slots * BLOCK_N)
    index = tl.arange(0, ROW_BLOCKS)
    tl.store(slot_tile + start + index, tl.zeros((ROW_BLOCKS,), dtype=tl.int32) + tile, mask=index < slots)
