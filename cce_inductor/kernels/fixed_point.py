"""Sums of the hidden states' gradient in fixed point, where the order of additions does not matter.

Two columns go into one int64, of which an addition costs as much as one of an int32: column 2i + 1 in the upper half
and 2i in the lower one.
"""

import triton
import triton.language as tl

FIXED_POINT_ONE = tl.constexpr(2.0**30)  # of int32; the sum of all |summands| of an element stays below it
SMALLEST_UNIT = tl.constexpr(2.0**-120)  # of the fixed point, so that its reciprocal is a float32


@triton.jit
def fixed_point_unit(grad_lse, grad_picked, lse, weight_peak, slope_bound):
    """What one unit of a row of the fixed-point gradient is worth; nan in a row that is not a number.

    |grad_hidden[n, d]| <= sum over v of |dz[n, v]| * |weight[v, d]| <= (|grad_lse| + |grad_picked|) * bound * peak.
    """
    peak = tl.load(weight_peak).to(tl.float32, bitcast=True)
    largest = (tl.abs(grad_lse) + tl.abs(grad_picked)) * (slope_bound * peak)
    unit = largest / FIXED_POINT_ONE
    unit = tl.where(unit < SMALLEST_UNIT, SMALLEST_UNIT, unit)
    return tl.where(lse == lse, unit, lse)


@triton.jit
def to_fixed_point(sums, unit):
    """[R, D] float32, in units [R], to [R, D / 2] int64."""
    summand = tl.floor(sums * (1.0 / unit)[:, None] + 0.5).to(tl.int32)
    even, odd = tl.split(tl.reshape(summand, (sums.shape[0], sums.shape[1] // 2, 2)))
    return (odd.to(tl.int64) << 32) + even.to(tl.int64)


@triton.jit
def from_fixed_point(both, columns, unit):
    """The given columns of a row, each from the int64 that holds it, in float32."""
    even = both.to(tl.int32)  # the sum of the even columns may have borrowed from the upper half
    odd = ((both - even.to(tl.int64)) >> 32).to(tl.int32)
    return tl.where(columns % 2 == 0, even, odd).to(tl.float32) * unit
