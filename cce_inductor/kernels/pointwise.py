"""The functions that a logit map may contain, in Triton and accurate to a few units in the last place of float32.

They are written out because the vendor's math library is neither in Triton's interpreter nor the same on every GPU.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST_NORMAL = tl.constexpr(2.0**-126)
LEAST_LOG = tl.constexpr(-1000.0)  # the exponential of anything below is zero


@triton.jit
def exp(x):
    """One multiplication and one instruction; `tl.exp` spends three more to keep results below 2**-126."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def log(x):
    """Of a number that is not negative; of zero as of the least that is normal."""
    return tl.log2(tl.maximum(x, LEAST_NORMAL)) / LOG2_E


@triton.jit
def exp_of_difference(x, row):
    """exp(x[n, v] - row[n]) as a fused multiply-add and an instruction; rounding row * LOG2_E costs half an ulp."""
    return tl.exp2(x * LOG2_E - (row * LOG2_E)[:, None])


@triton.jit
def root_of_difference(x, row):
    """The cube root of that."""
    return tl.exp2(x * (LOG2_E / 3) - (row * (LOG2_E / 3))[:, None])


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to infinity for very negative x, which gives the right 0."""
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2 |x|), and near zero, where 1 - e cancels, the Taylor series up to x**9."""
    e = exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    s = x * x
    series = -0.05396825396825397 + s * 0.021869488536155203
    series = 1.0 + s * (-0.3333333333333333 + s * (0.13333333333333333 + s * series))
    return tl.where(tl.abs(x) < 0.25, x * series, far)


@triton.jit
def expm1(x):
    """exp(x) - 1, which cancels near zero where tanh does not."""
    return tanh(0.5 * x) * (exp(x) + 1.0)


@triton.jit
def gt(a, b):
    return a > b


@triton.jit
def ge(a, b):
    return a >= b


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)
