"""Several targets of each row in the gradient of a tile.

They are in ascending order, so those of a row that lie in a tile are a run, which bisection finds. As many steps as the
longest run of the tile's rows has targets add their gradients: one or two where the targets are spread over the
vocabulary, and none in a tile without targets. A class that a row has several times is a run like any other.
"""

import triton
import triton.language as tl

from .tile import position_in_tile


@triton.jit
def add_targets(
    dx,  # [BLOCK_N, BLOCK_V]
    target,  # [N, num_targets], ascending in each row
    grad_picked,  # [N, num_targets], in the same order
    rows,
    row_mask,
    first_column,  # of the tile in the vocabulary
    num_targets,
    ignore_index,
    HAS_IGNORE_INDEX: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dx and the gradients of the targets that lie in the tile."""
    begin = _count_below(target, rows, row_mask, first_column, num_targets, SEARCH_STEPS)
    end = _count_below(target, rows, row_mask, first_column + BLOCK_V, num_targets, SEARCH_STEPS)
    for step in range(tl.max(end - begin, 0)):
        here = begin + step < end
        places = rows.to(tl.int64) * num_targets + begin + step
        targets = tl.load(target + places, mask=here, other=-1)
        position, inside = position_in_tile(targets, first_column, ignore_index, HAS_IGNORE_INDEX, BLOCK_V)
        target_grad = tl.load(grad_picked + places, mask=inside, other=0.0)
        hit = tl.arange(0, BLOCK_V)[None, :] == position[:, None]
        dx += tl.where(hit, target_grad[:, None], 0.0)
    return dx


@triton.jit
def _count_below(target, rows, row_mask, bound, num_targets, SEARCH_STEPS: tl.constexpr):
    """How many targets of each row are less than the bound, for num_targets < 2**SEARCH_STEPS."""
    low = tl.zeros_like(rows)
    high = tl.where(row_mask, num_targets, 0)
    for _ in tl.static_range(SEARCH_STEPS):
        middle = (low + high) // 2
        searching = low < high
        targets = tl.load(target + rows.to(tl.int64) * num_targets + middle, mask=searching, other=0)
        below = searching & (targets < bound)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low
