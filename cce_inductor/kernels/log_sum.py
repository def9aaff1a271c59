"""lse[n] = log(sum over tiles j of exp(tile_lse[j, n])): of a row, from what the forward kernel found of its tiles."""

import triton
import triton.language as tl

from .pointwise import exp


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "ignore_index"])
def log_sum_kernel(
    tile_lse,  # [tiles, N]
    target,  # [N]; read where SOME_ROWS
    lse,  # [N]: +inf in rows that are ignored, where SOME_ROWS
    num_rows,
    num_tiles,
    ignore_index,
    SOME_ROWS: tl.constexpr,
    TILES: tl.constexpr,  # at a time
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_rows
    peak = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, num_tiles, TILES):
        tiles = first + tl.arange(0, TILES)
        offsets = tiles[:, None].to(tl.int64) * num_rows + rows[None, :]
        mask = (tiles < num_tiles)[:, None] & row_mask[None, :]
        x = tl.load(tile_lse + offsets, mask=mask, other=-float("inf"))
        higher = tl.maximum(peak, tl.max(x, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * exp(peak - shift) + tl.sum(exp(x - shift[None, :]), 0)
        peak = higher
    result = tl.where(peak == -float("inf"), 0.0, peak) + tl.log(total)
    if SOME_ROWS:
        targets = tl.load(target + rows, mask=row_mask, other=ignore_index)
        result = tl.where(targets == ignore_index, float("inf"), result)
    tl.store(lse + rows, result, mask=row_mask)
