"""Probabilities within a tile that stay in memory between the forward and a sparse backward, in 8 bits.

    code[n, v]  = the integer nearest to 255 exp((x[n, v] - peak[n]) / 3)      peak[n] = the largest x[n, v] of the tile
    share[n, v] = left[n] code[n, v]**3 / sum over u of code[n, u]**3          left[n] = without the tile's two tops
    p[n, v]     = share[n, v] exp(tile_lse[n] - lse[n])

What a tile weighs is not rounded, nor what its tops have of it (`tops.py`): these are left out of the sum. A code is a
cube root, as that makes the smallest error of gradients: where 8 bits count the share itself, it is ten times as large,
and where they count its logarithm, twice. The cube is the exponential that the forward needs.
"""

import triton
import triton.language as tl

from .tops import column_of

LARGEST = tl.constexpr(255.0)
# From here to twice as much numbers are integers, which their lowest bits count. So one addition makes an integer of a
# number, and a number of an integer; the instruction for that takes four times as long.
ONES = tl.constexpr(2.0**23)
BITS_OF_ONES = tl.constexpr((127 + 23) << 23)
FIRST, SECOND = tl.constexpr(-1.0), tl.constexpr(-2.0)  # no cube is negative; one register a logit tells it all


@triton.jit
def store_codes(
    codes,  # of the first of the tiles that are kept
    roots,  # [BLOCK_N, BLOCK_V]: exp((x - peak) / 3), zero beyond the vocabulary
    tile,
    rows,  # where each row of roots is among all rows
    row_mask,
    num_rows,
    BLOCK_V: tl.constexpr,
):
    code = (roots * LARGEST + ONES).to(tl.int32, bitcast=True)
    tl.store(codes + _offsets(tile, rows, num_rows, BLOCK_V), code.to(tl.uint8), mask=row_mask[:, None])


@triton.jit
def place_of_codes(codes, codes_apart, first_apart, tile):
    """(pointer to the first of the tiles that are together with one, which of them it is)."""
    apart = tile >= first_apart
    return tl.where(apart, codes_apart, codes), tl.where(apart, tile - first_apart, tile)


@triton.jit
def load_cubes(
    codes,  # of the first of the tiles that are kept
    first,  # [rows]: the records of both tops
    second,
    tile,
    rows,
    row_mask,  # the others were not stored
    num_rows,
    BLOCK_V: tl.constexpr,
):
    """The cubes of the codes, [rows, BLOCK_V] in float32; in the place of the tops' what says which they are."""
    code = tl.load(codes + _offsets(tile, rows, num_rows, BLOCK_V), mask=row_mask[:, None], other=0)
    number = (code.to(tl.int32) | BITS_OF_ONES).to(tl.float32, bitcast=True) - ONES
    columns = tl.arange(0, BLOCK_V)[None, :]
    cube = tl.where(columns == column_of(second, BLOCK_V)[:, None], SECOND, number * number * number)
    return tl.where(columns == column_of(first, BLOCK_V)[:, None], FIRST, cube)


@triton.jit
def among_columns(cubes, of_first, of_second, of_others):
    """[rows, columns]: numbers of rows that belong to their tops, and to all others together by their shares."""
    # the least sum that is not zero is one
    others = of_others / tl.maximum(tl.sum(tl.maximum(cubes, 0.0), 1), 1.0)
    tops = tl.where(cubes == FIRST, of_first[:, None], of_second[:, None])
    return tl.where(cubes < 0.0, tops, cubes * others[:, None])


@triton.jit
def _offsets(tile, rows, num_rows, BLOCK_V: tl.constexpr):
    """Rows of a tile are multiples of 16 bytes, which Triton is told so that it moves so many at a time."""
    row = (tile.to(tl.int64) * num_rows + rows) * BLOCK_V
    return tl.multiple_of(row[:, None], (1, 16)) + tl.arange(0, BLOCK_V)[None, :]
