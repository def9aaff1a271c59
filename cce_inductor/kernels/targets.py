"""The targets, before anything is computed: whether they are right, and which rows count."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "num_columns", "ignore_index"])
def targets_kernel(
    target,  # [N], int64
    good,  # one bool: whether each target lies in [0, V) or is ignore_index
    row_of,  # [N], int32: the rows whose target is not ignore_index, in order; where SOME_ROWS
    row_count,  # one int32: how many there are; where SOME_ROWS
    num_rows,  # N
    num_columns,  # V
    ignore_index,
    HAS_IGNORE_INDEX: tl.constexpr,
    SOME_ROWS: tl.constexpr,
    ROWS: tl.constexpr,  # at a time
):
    """One program: on the device in one launch what would be a dozen small operations.

    Where rows have several targets, each of them is a row here.
    """
    bad, count = 0, 0
    for row in range(0, num_rows, ROWS):
        rows = row + tl.arange(0, ROWS)
        counts = rows < num_rows
        targets = tl.load(target + rows, mask=counts, other=0)
        if HAS_IGNORE_INDEX:
            counts = counts & (targets != ignore_index)
        outside = (targets < 0) | (targets >= num_columns)
        bad += tl.sum((counts & outside).to(tl.int32), 0)
        if SOME_ROWS:
            here = counts.to(tl.int32)
            tl.store(row_of + count + tl.cumsum(here, 0) - 1, rows, mask=counts)
            count += tl.sum(here, 0)
    tl.store(good, bad == 0)
    if SOME_ROWS:
        tl.store(row_count, count)
