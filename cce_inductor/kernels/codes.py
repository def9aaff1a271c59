"""Probabilities within a tile that stay in memory between the forward and a sparse backward, in B = 8 or 16 bits.

    code[n, v] = 2**B - 1 - what lies between exp(x[n, v] - peak[n]) and 1, counted in steps of float32 numbers with F
                 bits after the point, the nearest; 0 from 2**-2**(B - F) on     peak[n] = the largest x[n, v] of the tile
    p[n, v]    = number(code[n, v]) / sum over u of number(code[n, u]) * exp(tile_lse[n] - lse[n])

The largest of a tile is coded exactly. With F = 4 others are off by up to 1/32 of themselves, 0.013 in the root mean
square, and what is smaller than 2**-16 is lost; 16 bits have F = 11, and are for gradients in float16, which tell more.
What a tile weighs is not rounded at all. A code takes an addition, a comparison and a shift to make, in a loop in which
every instruction counts; that of a logit's float16 difference (`kept.py`) takes more.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(2.0**-40)  # any number below what a tile with a largest number sums to


@triton.constexpr_function
def _shift(dtype):
    """How many of the 23 bits that a float32 has after its point are left out."""
    return 19 if dtype.primitive_bitwidth == 8 else 12


@triton.constexpr_function
def _zero(dtype):
    """What is taken from the bits that stay, so that the code of one is the largest."""
    return (127 << (23 - _shift(dtype))) - (1 << dtype.primitive_bitwidth) + 1


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
    shift: tl.constexpr = _shift(codes.dtype.element_ty)
    start: tl.constexpr = (1 << (shift - 1)) - (_zero(codes.dtype.element_ty) << shift)
    # the bits of floats that are not negative are in order as integers
    code = tl.maximum(exps.to(tl.int32, bitcast=True) + start, 0) >> shift
    offsets = _offsets(tile, rows, num_rows, BLOCK_V)
    tl.store(codes + offsets, code.to(codes.dtype.element_ty), mask=row_mask[:, None])


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
    number = ((code + _zero(codes.dtype.element_ty)) << _shift(codes.dtype.element_ty)).to(tl.float32, bitcast=True)
    number = tl.where(code == 0, 0.0, number)
    return number / tl.maximum(tl.sum(number, 1), LEAST)[:, None]


@triton.jit
def _offsets(tile, rows, num_rows, BLOCK_V: tl.constexpr):
    """Rows of a tile are multiples of 16 bytes, which Triton is told so that it moves so many at a time."""
    row = (tile.to(tl.int64) * num_rows + rows) * BLOCK_V
    return tl.multiple_of(row[:, None], (1, 16)) + tl.arange(0, BLOCK_V)[None, :]
