"""The gradients that a forward computed, times the gradient of its loss, which is nearly always one.

    cce_inductor::scaled(grad, scale [], may_reuse) -> grad * scale, in grad's dtype; scale is not rounded to it before
    cce_inductor::scale_(grad, scale [])               the same in place

The gradients of a large vocabulary are most of what a backward reads and writes, and where the loss is what `backward`
is called on, the product changes nothing. In place it need not look at them. That takes a gradient whose memory nobody
else reads: where Inductor hands the saved tensors of a forward over to its backward, `scaled` becomes `scale_`. Whether
it may is an argument, for Inductor's cache of compiled backwards does not look at that.
"""

import torch
from torch import Tensor

from .. import compat
from ..kernels.scaling import scaling_kernel
from .launch import device_properties
from .problem import spans
from .quick_launch import launch

BLOCK = 8192  # numbers that a program multiplies at a time
PROGRAMS = 8  # at a time on a multiprocessor
CPU_NUMBERS = 1 << 20  # at a time, so that those in the dtype of the scale take no memory to speak of

_library = torch.library.Library("cce_inductor", "FRAGMENT")
_library.define("scaled(Tensor grad, Tensor scale, bool may_reuse) -> Tensor")
_library.define("scale_(Tensor(a!) grad, Tensor scale) -> ()")


def _scaled(grad: Tensor, scale: Tensor, may_reuse: bool = False) -> Tensor:
    return (grad.to(scale.dtype) * scale).to(grad.dtype)


def _scale_on_cpu(grad: Tensor, scale: Tensor) -> None:
    if scale != 1:
        numbers = grad.view(-1)
        for part in spans(grad.numel(), CPU_NUMBERS):
            numbers[part] = _scaled(numbers[part], scale)


def _scale_on_gpu(grad: Tensor, scale: Tensor) -> None:
    programs = PROGRAMS * device_properties(grad.device)[1]
    with torch.cuda.device_of(grad):
        launch(scaling_kernel, programs, grad=grad, scale=scale, count=grad.numel(), BLOCK=BLOCK, NUM_PROGRAMS=programs)


_library.impl("scaled", _scaled, "CompositeExplicitAutograd")
_library.impl("scale_", _scale_on_cpu, "CPU")
_library.impl("scale_", _scale_on_gpu, "CUDA")
torch.library.register_fake("cce_inductor::scaled", lambda grad, *_: torch.empty_like(grad), lib=_library)
torch.library.register_fake("cce_inductor::scale_", lambda *_: None, lib=_library)

scaled = torch.ops.cce_inductor.scaled.default
scale_ = torch.ops.cce_inductor.scale_.default


def compile_in_place() -> None:
    """To be called before Inductor compiles a backward with `scaled` in it."""
    compat.reuse_handed_over(scaled, scale_)
