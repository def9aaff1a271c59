"""Probabilities within a tile that stay in memory between the forward and a sparse backward, in 8 bits.

    code[n, v] = 255 - what lies between exp(x[n, v] - peak[n]) and 1, counted in steps of float32 numbers with four
                 bits after the point, the nearest; 0 from 2**-16 on          peak[n] = the largest x[n, v] of the tile
    p[n, v]    = number(code[n, v]) / sum over u of number(code[n, u]) * exp(tile_lse[n] - lse[n])

The largest of a tile is coded exactly; others are off by up to 1/32 of themselves, 0.013 in the root mean square. What
a tile weighs is not rounded at all. A code takes half of the memory of a logit's float16 difference (`kept.py`), and an
addition, a comparison and a shift to make, in a loop in which every instruction counts.
"""

import triton
import triton.language as tl

SHIFT = tl.constexpr(19)  # a float32 has 23 bits after the point, of which four stay
HALF = tl.constexpr(1 << 18)
ZERO = tl.constexpr((127 << 4) - 255)  # so that the code of one is 255
LEAST = tl.constexpr(2.0**-40)  # any number below what a tile with a largest number sums to


@triton.jit
def store_codes(
    codes,  # of the first of the tiles that are kept
    exps,  # [BLOCK_N, BLOCK_V]: exp(x - peak), zero beyond the vocabulary
    tile,
    rows,  # where each row of exps is among all rows
    row_mask,
    num_rows,
    BLOCK_V: tl.constexpr,
):
    # the bits of floats that are not negative are in order as integers
    code = tl.maximum(exps.to(tl.int32, bitcast=True) + (HALF - (ZERO << SHIFT)), 0) >> SHIFT
    tl.store(codes + _offsets(tile, rows, num_rows, BLOCK_V), code.to(tl.uint8), mask=row_mask[:, None])


@triton.jit
def place_of_codes(codes, codes_apart, first_apart, tile):
    """(pointer to the first of the tiles that are together with one, which of them it is)."""
    apart = tile >= first_apart
    return tl.where(apart, codes_apart, codes), tl.where(apart, tile - first_apart, tile)


@triton.jit
def load_shares(
    codes,  # of the first of the tiles that are kept
    tile,
    rows,
    row_mask,  # the others were not stored
    num_rows,
    BLOCK_V: tl.constexpr,
):
    """What each column has of its tile's probability, [rows, BLOCK_V] in float32; zero where rows are masked."""
    code = tl.load(codes + _offsets(tile, rows, num_rows, BLOCK_V), mask=row_mask[:, None], other=0).to(tl.int32)
    number = ((code + ZERO) << SHIFT).to(tl.float32, bitcast=True)
    number = tl.where(code == 0, 0.0, number)
    return number / tl.maximum(tl.sum(number, 1), LEAST)[:, None]


@triton.jit
def _offsets(tile, rows, num_rows, BLOCK_V: tl.constexpr):
    """Rows of a tile are multiples of 16 bytes, which Triton is told so that it moves so many at a time."""
    row = (tile.to(tl.int64) * num_rows + rows) * BLOCK_V
    return tl.multiple_of(row[:, None], (1, 16)) + tl.arange(0, BLOCK_V)[None, :]
