"""The token of a (row, vocabulary tile) pair that is computed alone where the rest is skipped.

That is the row's target in its tile, and elsewhere the heaviest token. The forward finds it, and what share of the
tile's probability is left without it.

A column and a number that belongs to it share 32 bits, as they are moved more often than looked at: the lowest bits of
a float32 give way to the column's place in its tile. In tiles of 256 columns that leaves 15 bits after the point.
"""

import triton
import triton.language as tl


@triton.jit
def with_column(number, column, TILE: tl.constexpr):
    """A float32 and a place within a tile of TILE columns, a power of two, in one int32."""
    return (number.to(tl.int32, bitcast=True) & -TILE) | column


@triton.jit
def column_of(packed, TILE: tl.constexpr):
    """The place within the tile."""
    return packed & (TILE - 1)


@triton.jit
def number_of(packed, TILE: tl.constexpr):
    """The float32, cut off."""
    return (packed & -TILE).to(tl.float32, bitcast=True)


@triton.jit
def heaviest(exps, total, TILE: tl.constexpr):
    """Of exps [rows, TILE], none negative and the largest one: the share of all but the largest, and its column."""
    # the bits of floats that are not negative are in order as integers
    largest = tl.max(with_column(exps, tl.arange(0, TILE)[None, :], TILE), 1)
    return with_column((total - 1.0) / total, column_of(largest, TILE), TILE)
