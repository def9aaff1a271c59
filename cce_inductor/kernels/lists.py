"""From which pairs of rows and vocabulary tiles are active to the lists that the sparse backward walks over.

Each tile has a list of its active rows, in order and cut into slots of BLOCK_N rows; the last slot is filled up with
-1. A slot is a block of the logits that is computed, so it costs the same whether its rows lie next to each other or
not, and whatever the other rows of the batch do. Where most rows are active the tile is *dense*: it lists every row
that has a gradient, so that the slots of all dense tiles have the same rows.

The workspace holds the slots of a round. A round takes whole tiles, so that one program can complete a tile of the
weight's gradient. How many tiles that is depends on the data; how many rounds there may be does not: where few pairs
are active, the last rounds are empty.
"""

import triton
import triton.language as tl

from .pointwise import exp


@triton.jit(do_not_specialize=["num_tiles", "usable", "rounds"])
def rounds_kernel(
    counts,  # [tiles + 1], int32: active rows of each tile; of the last, rows that have a gradient
    dense,  # [tiles], bool
    tile_start,  # [tiles + 1]: the first slot of each tile
    dense_tiles,  # [tiles + 2], zeros before: the dense tiles, in order; kernels read one further
    round_tiles,  # [rounds + 1]: the first tile of each round
    round_slots,  # [rounds + 1]: the first slot of each round
    round_dense,  # [rounds + 1]: where the dense tiles of each round start in dense_tiles
    num_tiles,
    usable,  # tiles that begin within this many slots of each other fit in the workspace
    rounds,
    dense_share,  # a tile with more than this share of the rows is dense
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,  # a power of two, at least num_tiles
):
    """One program; all results are int32."""
    tiles = tl.arange(0, TILES)
    mask = tiles < num_tiles
    live = tl.load(counts + num_tiles)
    count = tl.load(counts + tiles, mask=mask, other=0)
    is_dense = mask & (count > dense_share * live)
    slots = tl.cdiv(tl.where(is_dense, live, count), BLOCK_N)
    end = tl.cumsum(slots, 0)
    start = end - slots
    tl.store(dense + tiles, is_dense, mask=mask)
    tl.store(tile_start + tiles, start, mask=mask)
    tl.store(tile_start + num_tiles, tl.sum(slots, 0))
    tl.store(dense_tiles + tl.cumsum(is_dense.to(tl.int32), 0) - 1, tiles, mask=is_dense)
    for index in range(rounds + 1):
        before = mask & (start < index * usable)
        tl.store(round_tiles + index, tl.sum(before.to(tl.int32), 0))
        tl.store(round_slots + index, tl.sum(tl.where(before, slots, 0), 0))
        tl.store(round_dense + index, tl.sum((before & is_dense).to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def lists_kernel(
    tile_lse,  # [tiles, N]
    lse,  # [N]
    grad_lse,  # [N]
    grad_peak,  # one number: the largest |grad_lse|
    active,  # [tiles + 1, N], bool
    dense,  # [tiles], bool
    tile_start,  # [tiles + 1]
    slot_rows,  # [slots * BLOCK_N], int32: the listed rows
    slot_tile,  # [slots], int32: the tile of each slot
    skipped_mass,  # [tiles, N]: mass * grad_lse / grad_peak of rows that are not listed, else 0
    num_rows,
    num_tiles,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,  # at a time
    ROW_BLOCKS: tl.constexpr,  # a power of two, at least the slots of a tile
):
    """A program writes the list of one tile, and what the rows that are not in it skip."""
    tile = tl.program_id(0)
    start = tl.load(tile_start + tile)
    slots = tl.load(tile_start + tile + 1) - start
    first = start.to(tl.int64) * BLOCK_N
    source = tl.where(tl.load(dense + tile), num_tiles, tile).to(tl.int64) * num_rows
    peak = tl.load(grad_peak)
    listed_before = 0
    for row in range(0, num_rows, ROWS):
        rows = row + tl.arange(0, ROWS)
        mask = rows < num_rows
        listed = tl.load(active + source + rows, mask=mask, other=0).to(tl.int32)
        place = first + listed_before + tl.cumsum(listed, 0) - 1
        tl.store(slot_rows + place, rows, mask=listed != 0)
        listed_before += tl.sum(listed, 0)
        here = tile.to(tl.int64) * num_rows + rows
        grad = tl.load(grad_lse + rows, mask=mask, other=0.0)
        grad = tl.where(grad == 0.0, 0.0, grad / peak)
        mass = exp(tl.load(tile_lse + here, mask=mask, other=0.0) - tl.load(lse + rows, mask=mask, other=0.0)) * grad
        skips = (listed == 0) & (grad != 0.0)
        tl.store(skipped_mass + here, tl.where(skips, mass, 0.0).to(skipped_mass.dtype.element_ty), mask=mask)
    tail = listed_before + tl.arange(0, BLOCK_N)
    tl.store(slot_rows + first + tail, tl.full((BLOCK_N,), -1, dtype=tl.int32), mask=tail < slots * BLOCK_N)
    index = tl.arange(0, ROW_BLOCKS)
    tl.store(slot_tile + start + index, tl.zeros((ROW_BLOCKS,), dtype=tl.int32) + tile, mask=index < slots)
