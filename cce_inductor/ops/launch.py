"""Launches of kernels, and what they depend on beside their problem: the device, and how operands can be loaded."""

import functools
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels import template
from ..kernels.config import TileConfig
from .kept_tiles import Place, kept_arguments
from .problem import Problem, RowGradients
from .quick_launch import launch


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


def vocabulary_arguments(problem: Problem, columns: slice) -> dict[str, Any]:
    """What kernels are told of each class of a slice of the vocabulary."""
    return {
        "bias": None if problem.bias is None else problem.bias[columns],
        "total_weight": None if problem.total_weight is None else problem.total_weight[columns],
        "HAS_BIAS": problem.bias is not None,
        "WANT_TOTAL": problem.want_total,
        "HAS_TOTAL_WEIGHT": problem.total_weight is not None,
    }


def slope_arguments(problem: Problem) -> dict[str, Any]:
    """What kernels that compute no logits are told of f'."""
    return {
        "SAME_SLOPE": problem.logit_map.affine() is not None,
        "SLOPE_BY_VALUE": template.load(problem.logit_map).slope_by_value,
    }


def gradient_arguments(problem: Problem, lse: Tensor, grads: RowGradients, rows: slice) -> dict[str, Any]:
    """What kernels that compute the gradient of logits are told of some rows."""
    here = grads.map(lambda vector: vector[rows])
    return {
        "lse": lse[rows],
        "grad_lse": here.lse,
        "grad_picked": here.picked,
        "grad_total": here.total,
        "grad_maximum": here.maximum,
        "grad_entropy": here.entropy,
        "argmax": here.argmax if here.maximum is not None else None,
        "entropy": here.row_entropy if here.entropy is not None else None,
        "VALUE_AND_SLOPE": template.load(problem.logit_map).value_and_slope,
        "HAS_MAXIMUM": here.maximum is not None,
        "HAS_ENTROPY": here.entropy is not None,
    }


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


class Launch:
    """What the kernels of one call have in common: operands ready to be loaded, tile shapes, grid."""

    def __init__(self, problem: Problem, config: TileConfig, hidden: Tensor) -> None:
        self.problem, self.config = problem, config
        self.programs = device_properties(hidden.device)[1] * config.programs
        self.hidden = hidden if describable(hidden) else hidden.contiguous()

    def row_blocks(self, rows: slice) -> int:
        """How many tiles lie under each other in these rows."""
        return -(-(rows.stop - rows.start) // self.config.block_n)

    def __call__(
        self,
        kernel: Any,
        rows: slice,
        columns: slice,
        weight: Tensor,
        dz: Tensor | None = None,
        place: Place | None = None,
        **arguments: Any,
    ) -> None:
        """Runs a kernel over the tiles of a block of the logits; `weight` holds its columns, dz takes its result.

        place: where these logits are kept, to write or to read.
        """
        problem, config = self.problem, self.config
        hidden, weight = interpretable(self.hidden[rows]), interpretable(weight)
        tiles = self.row_blocks(rows) * -(-weight.shape[0] // config.block_v)
        tma = can_use_tma(hidden, weight)
        n, v, d = config.block_n, config.block_v, config.block_d
        if dz is not None:
            arguments["dz"] = TensorDescriptor.from_tensor(dz, [n, v]) if tma else dz
            arguments["stride_dz"] = dz.stride(0)
        operands: dict[str, Any] = {"hidden": hidden, "weight": weight}
        if arguments.get("FROM_KEPT"):
            operands = dict.fromkeys(operands)
        elif tma:
            operands = {
                "hidden": TensorDescriptor.from_tensor(hidden, [n, d]),
                "weight": TensorDescriptor.from_tensor(weight, [v, d]),
            }
        launch(
            kernel,
            min(tiles, self.programs),
            **operands,
            **vocabulary_arguments(problem, columns),
            num_rows=hidden.shape[0],
            num_columns=weight.shape[0],
            width=problem.width,
            stride_hn=hidden.stride(0),
            stride_hd=hidden.stride(1),
            stride_wv=weight.stride(0),
            stride_wd=weight.stride(1),
            USE_TMA=tma,
            BLOCK_N=n,
            BLOCK_V=v,
            BLOCK_D=d,
            NUM_PROGRAMS=self.programs,  # not how many run: that would compile a kernel for each size
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **kept_arguments(place),
            **arguments,
        )
