"""From which pairs of rows and vocabulary tiles are active to the lists that the sparse backward walks over.

List 0 has the dense rows, and list 1 + j the other rows that need tile j. Then come the rows that need some tokens of a
tile only (`kernels/tops.py`), once for each, by the part of the tile that it lies in: as 2 * row, + 1 for the second
token of its tile. Lists are in order and cut into slots
of BLOCK_N rows; the last slot of a list is filled up with -1. With the rows of a slot and the columns of a tile goes a
block of the logits. Its rows need not lie next to each other, so what a batch costs does not depend on the order of its
rows. The blocks of a tile are those of the dense rows, then those of its own list; tops have none.

The workspace holds the blocks of a round. A round takes whole tiles, so that one program can complete a tile of the
weight's gradient. How many tiles that is depends on the data; how many rounds there may be does not: where few pairs
are active, the last rounds are empty. The blocks of a round are those of the dense rows, tile by tile, then the others.
"""

import triton
import triton.language as tl

from .pointwise import exp
from .tile import gather_rows
from .tops import column_of, number_of


@triton.jit(do_not_specialize=["num_tiles", "num_lists", "usable", "rounds"])
def rounds_kernel(
    counts,  # [lists], int32: how many rows each has
    list_start,  # [lists + 1], int32: the first slot of each list, and the end of the last one
    round_tiles,  # [rounds + 1], int32: the first tile of each round
    num_tiles,
    num_lists,
    usable,  # tiles that begin within this many blocks of each other fit in the workspace
    rounds,
    BLOCK_N: tl.constexpr,
    LISTS: tl.constexpr,  # a power of two, at least num_lists + 1
):
    """One program."""
    lists = tl.arange(0, LISTS)
    slots = tl.cdiv(tl.load(counts + lists, mask=lists < num_lists, other=0), BLOCK_N)
    start = tl.cumsum(slots, 0) - slots
    tl.store(list_start + lists, start, mask=lists <= num_lists)
    dense_slots = tl.cdiv(tl.load(counts), BLOCK_N)
    first_block = start - dense_slots + (lists - 1) * dense_slots
    of_tile = (lists >= 1) & (lists <= num_tiles)
    for index in range(rounds + 1):
        tl.store(round_tiles + index, tl.sum((of_tile & (first_block < index * usable)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def lists_kernel(
    active,  # bool: dense rows [N], active pairs [tiles, N], tops [tiles, N, 2]
    tile_tops,  # [tiles, N, 2], int32
    list_start,  # [lists + 1]
    slot_rows,  # [slots * BLOCK_N], int32, -1 before: what is listed
    slot_tile,  # [slots], int32: the tile of each slot of active pairs
    num_rows,
    num_tiles,
    TILE_WIDTH: tl.constexpr,
    PART: tl.constexpr,  # columns of a part of a tile
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,  # at a time
    ROW_BLOCKS: tl.constexpr,  # a power of two, at least the slots of a list
):
    """A program writes a list."""
    index = tl.program_id(0)
    parts: tl.constexpr = TILE_WIDTH // PART
    top = index - 1 - num_tiles
    tile = tl.where(top >= 0, top // parts, index - 1)
    source = tl.where(top >= 0, 1 + num_tiles + 2 * tile, index).to(tl.int64) * num_rows
    start = tl.load(list_start + index)
    slots = tl.load(list_start + index + 1) - start
    first = start.to(tl.int64) * BLOCK_N
    count = 0
    entries = tl.where(top >= 0, 2, 1) * num_rows
    for entry in range(0, tl.where(slots > 0, entries, 0), ROWS):
        here = entry + tl.arange(0, ROWS)
        mask = here < entries
        listed = tl.load(active + source + here, mask=mask, other=0) != 0
        if top >= 0:
            packed = tl.load(tile_tops + tile.to(tl.int64) * entries + here, mask=mask, other=0)
            listed = listed & (column_of(packed, TILE_WIDTH) // PART == top % parts)
        places = first + count + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(slot_rows + places, here, mask=listed)
        count += tl.sum(listed.to(tl.int32), 0)
    if (top < 0) & (tile >= 0):
        places = tl.arange(0, ROW_BLOCKS)
        tl.store(slot_tile + start + places, tl.zeros((ROW_BLOCKS,), dtype=tl.int32) + tile, mask=places < slots)


@triton.jit
def dense_rows_kernel(
    hidden,  # [N, D]
    slot_rows,
    list_start,
    dense_hidden,  # [slots * BLOCK_N, D], contiguous
    width,
    stride_hn,
    stride_hd,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program copies the hidden states of a slot if it is one of the dense rows'."""
    slot = tl.program_id(0)
    if slot < tl.load(list_start + 1):
        places = slot * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = tl.maximum(tl.load(slot_rows + places), 0)
        for depth in range(0, width, BLOCK_D):
            depths = depth + tl.arange(0, BLOCK_D)
            h = gather_rows(hidden, rows, depth, width, stride_hn, stride_hd, BLOCK_D)
            offsets = places[:, None].to(tl.int64) * width + depths[None, :]
            tl.store(dense_hidden + offsets, h, mask=(depths < width)[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def skipped_kernel(
    tile_lse,  # [tiles, N]
    tile_tops,  # [tiles, N, 2], int32
    lse,  # [N]
    grad_lse,  # [N]
    grad_peak,  # one number: the largest |grad_lse|
    active,  # bool: dense rows [N], active pairs [tiles, N], tops [tiles, N, 2]
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
    tops = active + (1 + num_tiles.to(tl.int64)) * num_rows
    peak = tl.load(grad_peak)
    skipping = 0
    for row in range(0, num_rows, ROWS):
        rows = row + tl.arange(0, ROWS)
        mask = rows < num_rows
        pairs = here + rows
        computed = tl.load(active + rows, mask=mask, other=1) | tl.load(active + num_rows + pairs, mask=mask, other=1)
        grad = tl.load(grad_lse + rows, mask=mask, other=0.0)
        skipped = (computed == 0) & (grad != 0.0)
        skipping += tl.sum(skipped.to(tl.int32), 0)
        mass = exp(tl.load(tile_lse + pairs, mask=mask, other=0.0) - tl.load(lse + rows, mask=mask, other=0.0))
        share = tl.full((ROWS,), 1.0, dtype=tl.float32)
        for which in tl.static_range(2):
            alone = tl.load(tops + 2 * pairs + which, mask=mask, other=0) != 0
            left = number_of(tl.load(tile_tops + 2 * pairs + which, mask=mask, other=0), TILE_WIDTH)
            share = tl.where(alone, left, share)
        mass = tl.where(skipped, mass * share * (grad / peak), 0.0)
        tl.store(skipped_mass + pairs, mass.to(skipped_mass.dtype.element_ty), mask=mask)
    tl.store(skips + tile, skipping > 0)
