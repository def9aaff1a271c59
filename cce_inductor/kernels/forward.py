"""Forward kernel: per row and vocabulary tile, what the losses need, without storing a logit.

    x                = f(hidden @ weight.T + bias)
    tile_lse[j, n]   = log(sum over v in tile j of exp(x[n, v]))
    tile_total[j, n] = sum over v in tile j of total_weight[v] * x[n, v]
    tile_maximum[j, n], tile_argmax[j, n] = the largest x[n, v], v in tile j, and the first v that has it
    tile_entropy[j, n] = - sum over v in tile j of q[v] * log q[v],  q[v] = exp(x[n, v] - tile_lse[j, n])
    tile_tops[j, n]    = where the two largest q[v] are in the tile, and what is left without them (`kernels/tops.py`)

The log-sum-exp over the whole vocabulary is the log-sum-exp of the tiles' (Wijmans et al., arXiv 2411.09009,
computes it with locks instead). Rows left out of `hidden` cost nothing. The kernel is persistent: as many programs as
multiprocessors, each walking over many tiles. While a tile is reduced the tensor cores wait, so every instruction per
logit counts there.
"""

import triton
import triton.language as tl

from .codes import store_codes
from .kept import store_logits
from .pointwise import LEAST_LOG, exp_of_difference, root_of_difference
from .tile import preactivations, tile_position
from .tops import heaviest


@triton.jit(do_not_specialize=["num_rows", "first_tile"])
def forward_kernel(
    hidden,
    weight,
    bias,
    total_weight,
    row_of,  # [N]: which row of the results each row of `hidden` is, where SOME_ROWS
    row_count,  # one number: how many rows of `hidden` there are, where SOME_ROWS
    tile_lse,  # [tiles, N]
    tile_total,  # [tiles, N]
    tile_maximum,  # [tiles, N]
    tile_argmax,  # [tiles, N], int32
    tile_entropy,  # [tiles, N]
    tile_tops,  # [tiles, N, 2], int32
    kept,  # what stays for the gradient: logits where KEEP (`kept.py`), codes of probabilities where CODE (`codes.py`)
    kept_base,  # [tiles of the slice, N], what logits are differences to
    num_rows,
    num_columns,  # of the slice that `weight` holds
    width,
    first_tile,  # where the slice's tiles start in tile_lse
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_kept_tile,
    stride_kept_row,
    stride_kept_base,
    VALUE: tl.constexpr,  # the generated function f
    HAS_BIAS: tl.constexpr,
    WANT_TOTAL: tl.constexpr,
    HAS_TOTAL_WEIGHT: tl.constexpr,
    WANT_MAX: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_TOPS: tl.constexpr,
    SOME_ROWS: tl.constexpr,
    KEEP: tl.constexpr,
    CODE: tl.constexpr,
    PLAIN: tl.constexpr,  # whether f(z) is z; read where KEEP
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    rows_here = num_rows
    if SOME_ROWS:
        rows_here = tl.load(row_count)
    row_blocks = tl.cdiv(rows_here, BLOCK_N)
    column_blocks = tl.cdiv(num_columns, BLOCK_V)
    for tile in tl.range(tl.program_id(0), row_blocks * column_blocks, NUM_PROGRAMS):
        row_block, column_block = tile_position(tile, row_blocks, column_blocks)
        row = row_block * BLOCK_N
        column = column_block * BLOCK_V
        rows = row + tl.arange(0, BLOCK_N)
        columns = column + tl.arange(0, BLOCK_V)
        row_mask = rows < rows_here
        column_mask = columns < num_columns
        places = rows
        if SOME_ROWS:
            places = tl.load(row_of + rows, mask=row_mask, other=0)
        results = (first_tile + column_block).to(tl.int64) * num_rows + places
        z = preactivations(
            hidden, weight, bias, row, column, num_rows, num_columns, width,
            stride_hn, stride_hd, stride_wv, stride_wd, HAS_BIAS, USE_TMA, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        x = VALUE(z)
        if WANT_TOTAL:
            weighted = x
            if HAS_TOTAL_WEIGHT:
                scale = tl.load(total_weight + columns, mask=column_mask, other=0.0).to(tl.float32)
                weighted = x * scale[None, :]
            weighted = tl.where(column_mask[None, :], weighted, 0.0)
            tl.store(tile_total + results, tl.sum(weighted, 1), mask=row_mask)
        if column + BLOCK_V > num_columns:
            x = tl.where(column_mask[None, :], x, -float("inf"))
        peak = tl.max(x, 1)
        shift = tl.where(peak == -float("inf"), 0.0, peak)
        if WANT_MAX:
            first = (first_tile + column_block) * BLOCK_V + tl.argmax(x, 1, tie_break_left=True)
            tl.store(tile_maximum + results, peak, mask=row_mask)
            tl.store(tile_argmax + results, first, mask=row_mask)
        if CODE:
            # first of all: of two numbers for each logit there is no room in registers
            root = root_of_difference(x, shift)
            store_codes(kept, root, column_block, places, row_mask, num_rows, BLOCK_V)
            exp = root * root * root
        else:
            exp = exp_of_difference(x, shift)
        total = tl.sum(exp, 1)
        if WANT_ENTROPY:
            spread = tl.sum(exp * tl.maximum(x - shift[:, None], LEAST_LOG), 1)
            tl.store(tile_entropy + results, tl.log(total) - spread / total, mask=row_mask)
        if WANT_TOPS:
            first, second = heaviest(exp, total, BLOCK_V)
            tl.store(tile_tops + 2 * results, first, mask=row_mask)
            tl.store(tile_tops + 2 * results + 1, second, mask=row_mask)
        tl.store(tile_lse + results, shift + tl.log(total), mask=row_mask)
        if KEEP:
            store_logits(
                kept, kept_base, z, x, peak, column_block, places, row_mask,
                stride_kept_tile, stride_kept_row, stride_kept_base, PLAIN, BLOCK_V,
            )  # fmt: skip
