"""What a launch depends on beside its problem: the device, and how its operands can be loaded."""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from .problem import Problem


@functools.lru_cache
def device_properties(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    """(compute capability, multiprocessors); on the CPU Triton's interpreter runs the kernels: None and a few."""
    if device.type == "cpu":
        return None, 4
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


@functools.lru_cache
def l2_cache_bytes(device: torch.device) -> int:
    """The size of the L2 cache of a GPU; of a CPU it does not matter."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 20


def interpretable(tensor: Tensor) -> Tensor:
    """The tensor as Triton's interpreter can multiply it: bfloat16 it takes for integers."""
    return tensor.float() if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" else tensor


def has_tma(device: torch.device) -> bool:
    """Whether a device has a tensor memory accelerator; Triton's interpreter has."""
    capability, _ = device_properties(device)
    return capability is None or capability >= (9, 0)


def ignore_arguments(problem: Problem) -> dict[str, Any]:
    """How kernels that look at targets are told of `ignore_index`."""
    return {"ignore_index": problem.ignore_index or 0, "HAS_IGNORE_INDEX": problem.ignore_index is not None}


def can_use_tma(*tensors: Tensor) -> bool:
    """Whether the device has a tensor memory accelerator and its descriptors can describe the tensors."""
    return has_tma(tensors[0].device) and all(map(describable, tensors))


def describable(tensor: Tensor) -> bool:
    """TMA needs contiguous rows that start at multiples of 16 bytes."""
    return (
        tensor.stride(1) == 1
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.data_ptr() % 16 == 0
    )


class Rounds:
    """Launches of one kernel that differ in `round_index` only.

    Triton looks at each of some thirty arguments before a launch, which takes longer than the launch and, for small
    problems, than the kernel. Here it does so once.
    """

    def __init__(self, kernel: Any, programs: int, **arguments: Any) -> None:
        """arguments: all but round_index, which the kernel must list in do_not_specialize."""
        self._kernel, self._programs, self._arguments = kernel, programs, arguments
        self._compiled: Any = None

    def __call__(self, round_index: int) -> None:
        """Launches the kernel for a round."""
        arguments = {**self._arguments, "round_index": round_index}
        if isinstance(self._compiled, triton.compiler.CompiledKernel):
            self._compiled[self._programs, 1, 1](*(arguments[name] for name in self._kernel.arg_names))
        else:  # the first time, and always in Triton's interpreter
            self._compiled = self._kernel[(self._programs,)](**arguments)
