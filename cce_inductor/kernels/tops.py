"""The tokens of a (row, vocabulary tile) pair that are computed alone where the rest is skipped: two at most.

These are the two heaviest, of which the row's target takes the place of one in its tile, and comes first. The forward
finds them. With the first goes the share of the tile's probability that is left without it, with the second what is
left without both.

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
def shares_of(first, second, TILE: tl.constexpr):
    """What both tokens and all others have of the tile's probability, by the records."""
    left, left_of_both = number_of(first, TILE), number_of(second, TILE)
    return 1.0 - left, left - left_of_both, left_of_both


@triton.jit
def number_at(packed, column, TILE: tl.constexpr):
    """The float32 where it belongs to this column, else zero."""
    number = packed - column
    return tl.where(number & (TILE - 1) == 0, number, 0).to(tl.float32, bitcast=True)


@triton.jit
def _larger_two(a, b, c, d):
    """The two largest numbers, of two in order and two in order."""
    return tl.maximum(a, c), tl.maximum(tl.minimum(a, c), tl.maximum(b, d))


@triton.jit
def heaviest(exps, total, TILE: tl.constexpr):
    """The two records of exps [rows, TILE], none negative, the largest one, and their sums."""
    # the bits of floats that are not negative are in order as integers
    packed = with_column(exps, tl.arange(0, TILE)[None, :], TILE)
    first, second = tl.reduce((packed, tl.zeros_like(packed)), 1, _larger_two)
    total = tl.maximum(total, 1.0)  # it is zero where no logit is finite
    left = total - 1.0
    left_of_both = tl.maximum(left - number_of(second, TILE), 0.0)
    first = with_column(left / total, column_of(first, TILE), TILE)
    return first, with_column(left_of_both / total, column_of(second, TILE), TILE)


@triton.jit
def with_target(first, second, column, share, TILE: tl.constexpr):
    """The records of a tile that holds the target, with its place and what it has of the tile, from those without."""
    is_first, is_second = column_of(first, TILE) == column, column_of(second, TILE) == column
    left = tl.where(is_first, number_of(first, TILE), 1.0 - share)
    # no more than the second, the target has no more than half of what the first leaves
    left_of_both = tl.where(is_first | is_second, number_of(second, TILE), number_of(first, TILE) - share)
    other = tl.where(is_first, column_of(second, TILE), column_of(first, TILE))
    return with_column(left, column, TILE), with_column(tl.minimum(tl.maximum(left_of_both, 0.0), left), other, TILE)
