"""The operands of one call of the operators, validated and in the form that the implementations use."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..logit_map import LogitMap

MIB = 1 << 20


@dataclass(frozen=True)
class Problem:
    """Reductions over the vocabulary of x = f(hidden @ weight.T + bias); see `reference.py`."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    target: Tensor | None  # [N], int64
    total_weight: Tensor | None  # [V]
    logit_map: LogitMap
    want_total: bool
    ignore_index: int | None
    compute_dtype: torch.dtype  # of the operands of the matmuls
    workspace_bytes: int

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor | None,
        total_weight: Tensor | None,
        *,
        logit_map: str,
        want_total: bool,
        ignore_index: int | None,
        compute_dtype: torch.dtype,
        workspace_mib: int,
    ) -> "Problem":
        """Checks the operands as the schema gives them; the errors are of the kinds that eager PyTorch raises."""
        check(hidden, weight, bias, target, total_weight, compute_dtype)
        if target is not None:
            target = target.to(torch.int64)
        parsed = LogitMap.parse(logit_map)
        return cls(
            hidden,
            weight,
            bias,
            target,
            total_weight,
            parsed,
            want_total,
            ignore_index,
            compute_dtype,
            workspace_mib * MIB,
        )

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        return self.hidden.shape[1]

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return accumulate_dtype(self.compute_dtype)

    def hidden_rows(self, rows: slice) -> Tensor:
        """Rows of the hidden states, in the dtype of the matmuls."""
        return self.hidden[rows].to(self.compute_dtype)

    def weight_rows(self, columns: slice) -> Tensor:
        """The classifier weight of a slice of the vocabulary, in the dtype of the matmuls."""
        return self.weight[columns].to(self.compute_dtype)


def accumulate_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and results: float32, or float64 for float64 operands."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def spans(size: int, step: int) -> Iterator[slice]:
    """[0, size) in consecutive slices of at most `step`."""
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    total_weight: Tensor | None,
    compute_dtype: torch.dtype,
) -> None:
    """Raises unless the operands fit together; uses shapes, dtypes and devices only, so it also works while tracing."""
    if hidden.dim() != 2 or weight.dim() != 2:
        raise RuntimeError(
            f"hidden states and weight must be 2-D, [N, D] and [V, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    torch._check(
        hidden.shape[1] == weight.shape[1],
        lambda: (
            f"hidden states of shape {tuple(hidden.shape)} and weight of shape {tuple(weight.shape)} cannot be multiplied: "
            "their last dimensions must agree"
        ),
    )
    for name, vector in (("bias", bias), ("class weight", total_weight)):
        if vector is not None:
            if vector.dim() != 1:
                raise RuntimeError(f"{name} must be 1-D, got shape {tuple(vector.shape)}")
            torch._check(
                vector.shape[0] == weight.shape[0],
                lambda name=name, vector=vector: (
                    f"{name} has {vector.shape[0]} entries for a vocabulary of {weight.shape[0]}"
                ),
            )
    if target is not None:
        if target.dim() != 1:
            raise ValueError(f"targets must be 1-D, got shape {tuple(target.shape)}")
        if target.dtype not in (torch.int64, torch.uint8):
            raise RuntimeError(
                f"expected targets of dtype int64 or uint8 (class indices), got {target.dtype}"
            )
        torch._check_value(
            target.shape[0] == hidden.shape[0],
            lambda: (
                f"Expected input batch_size ({hidden.shape[0]}) to match target batch_size ({target.shape[0]})."
            ),
        )
    for name, tensor in (
        ("hidden", hidden),
        ("weight", weight),
        ("bias", bias),
        ("class weight", total_weight),
    ):
        if tensor is not None and not tensor.is_floating_point():
            raise RuntimeError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
    if compute_dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(
            f"matmuls in {compute_dtype} are not supported; use bfloat16, float16, float32 or float64"
        )
    devices = {t.device for t in (hidden, weight, bias, target, total_weight) if t is not None}
    if len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {', '.join(sorted(map(str, devices)))}"
        )
