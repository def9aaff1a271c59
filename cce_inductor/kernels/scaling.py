"""A gradient times a number, in place:  grad[i] = grad[i] * scale.  Of a scale of one no gradient is read."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def scaling_kernel(
    grad,  # [count], contiguous
    scale,  # one number, float32 or float64, in which the product is computed
    count,
    BLOCK: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    factor = tl.load(scale)
    blocks = tl.where(factor == 1.0, 0, tl.cdiv(count, BLOCK))
    for block in tl.range(tl.program_id(0), blocks, NUM_PROGRAMS):
        places = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = places < count
        numbers = tl.load(grad + places, mask=mask).to(factor.dtype) * factor
        tl.store(grad + places, numbers.to(grad.dtype.element_ty), mask=mask)
