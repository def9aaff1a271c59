"""The operands of one call of the operators, validated and in the form that the implementations use."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..logit_map import LogitMap

MIB = 1 << 20
DEFAULT_WORKSPACE_MIB = 256
LEAST_LOG = -1000.0  # in no dtype has anything below it an exponential other than zero
COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Tiles(NamedTuple):
    """What the forward records of each (vocabulary tile, row) pair for a sparse backward; [0, N] without one."""

    lse: Tensor  # [tiles, N], float32
    tops: Tensor  # [tiles, N, 2], int32: places of two tokens, and the tile's share without them (`kernels/tops.py`)


class Reductions(NamedTuple):
    """What the operator gives: see `reference.py`. Vectors [N] in the dtype of sums; argmax is int64."""

    lse: Tensor
    picked: Tensor  # [N, K] for K targets a row
    total: Tensor
    maximum: Tensor  # this and the next two are empty where nobody wants them
    argmax: Tensor
    entropy: Tensor
    lse_rest: Tensor  # what rounding took from lse
    tile_lse: Tensor  # this and the next are those of `Tiles`
    tile_tops: Tensor

    @property
    def tiles(self) -> Tiles:
        return Tiles(self.tile_lse, self.tile_tops)


class RowGradients(NamedTuple):
    """What a backward starts from: the gradients of the results, [N] each, and the results that some of them refer to.

    None stands for zeros that need no work.
    """

    lse: Tensor
    picked: Tensor
    total: Tensor
    maximum: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None  # with a gradient of the maximum
    row_entropy: Tensor | None = None  # with a gradient of the entropy
    target_logit: Tensor | None = None  # the result picked, where a sparse backward can have it

    def map(self, function: Callable[[Tensor], Tensor]) -> "RowGradients":
        """The same of each vector that there is."""
        return RowGradients._make(None if vector is None else function(vector) for vector in self)


@dataclass(frozen=True)
class Problem:
    """Reductions over the vocabulary of x = f(hidden @ weight.T + bias); see `reference.py`.

    Vectors are contiguous; matrices have any strides.
    """

    hidden: Tensor  # [N, D], in the dtype of the matmuls
    weight: Tensor  # [V, D], in its own dtype: a cast copy may be as large as the logits
    bias: Tensor | None  # [V]
    target: Tensor | None  # [N], or [N, K] for K classes of each row; int64
    total_weight: Tensor | None  # [V]
    hidden_dtype: torch.dtype  # as given, and of its gradient
    logit_map: LogitMap
    want_total: bool
    ignore_index: int | None
    workspace_bytes: int
    approximate_mass: float = 0.0  # of a row, in the backward
    skip_ignored: bool = False  # nobody reads results but picked of rows whose target is ignore_index
    want_max: bool = False  # and argmax
    want_entropy: bool = False
    may_take_more: bool = False  # memory than workspace_bytes, where that is worth it: `workspace.py`
    level: Tensor | None = None  # [N]: taken from products before they are rounded to 16 bits, and added after
    weight_scale: Tensor | None = None  # []: what gradients of weight and bias are multiplied by: `float16_range.py`

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
        workspace_mib: int | None,
        approximate_mass: float = 0.0,
        skip_ignored: bool = False,
        want_max: bool = False,
        want_entropy: bool = False,
    ) -> "Problem":
        """Checks the operands as the schema gives them; the errors are of the kinds that eager PyTorch raises."""
        check(hidden, weight, bias, target, total_weight, compute_dtype)
        if not 0 <= approximate_mass < 1:
            raise ValueError(f"approximate_mass must be in [0, 1), got {approximate_mass}")
        return cls(
            hidden=hidden.to(compute_dtype),
            weight=weight,
            bias=None if bias is None else bias.contiguous(),
            target=None if target is None else target.to(torch.int64).contiguous(),
            total_weight=None if total_weight is None else total_weight.contiguous(),
            hidden_dtype=hidden.dtype,
            logit_map=LogitMap.parse(logit_map),
            want_total=want_total,
            ignore_index=ignore_index,
            workspace_bytes=(DEFAULT_WORKSPACE_MIB if workspace_mib is None else workspace_mib) * MIB,
            may_take_more=workspace_mib is None,
            approximate_mass=approximate_mass,
            skip_ignored=skip_ignored,
            want_max=want_max,
            want_entropy=want_entropy,
        )

    @classmethod
    def plain(
        cls, hidden: Tensor, weight: Tensor, target: Tensor, workspace_mib: int | None, approximate_mass: float
    ) -> "Problem":
        """That of a cross-entropy of hidden @ weight.T in the dtype of `hidden`."""
        return cls.of(
            hidden,
            weight,
            None,
            target,
            None,
            logit_map=str(LogitMap()),
            want_total=False,
            ignore_index=-100,
            compute_dtype=hidden.dtype,
            workspace_mib=workspace_mib,
            approximate_mass=approximate_mass,
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
    def is_empty(self) -> bool:
        """Whether an operand has no elements."""
        return any(t is not None and t.numel() == 0 for t in (self.hidden, self.weight, self.target))

    @property
    def logits_bytes(self) -> int:
        """What the logits would take in the dtype of the matmuls."""
        return self.num_rows * self.vocab_size * self.compute_dtype.itemsize

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the operands of the matmuls."""
        return self.hidden.dtype

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return accumulate_dtype(self.compute_dtype)

    @property
    def several_targets(self) -> bool:
        """Whether any number of classes of each row are picked, [N, K], instead of one."""
        return self.target is not None and self.target.dim() == 2

    @property
    def targets_per_row(self) -> int:
        """K, how many classes of each row are picked."""
        if self.target is None:
            return 0
        return self.target.shape[1] if self.several_targets else 1

    @property
    def leaves_out(self) -> bool:
        """Whether results of ignored rows may be left out: there may be such rows, and nobody reads theirs."""
        one_target = self.target is not None and not self.several_targets
        return self.skip_ignored and one_target and self.ignore_index is not None

    @property
    def counts(self) -> Tensor | None:
        """Which rows count [N]; None where all do, or where somebody may read the results of those that don't."""
        if not self.leaves_out:
            return None
        assert self.target is not None
        assert self.ignore_index is not None
        return torch.ne(self.target, self.ignore_index)

    @property
    def scaled_hidden(self) -> Tensor:
        """The hidden states as a factor of the weight's gradient."""
        return self.hidden if self.weight_scale is None else self.hidden * self.weight_scale

    def weight_rows(self, columns: slice) -> Tensor:
        """The classifier weight of a slice of the vocabulary, in the dtype of the matmuls."""
        return self.weight[columns].to(self.compute_dtype)

    def tiles(self, count: int) -> Tiles:
        """Room for what is recorded of so many vocabulary tiles."""
        lse = self.hidden.new_empty((count, self.num_rows), dtype=torch.float32)
        return Tiles(lse, lse.new_empty((count, self.num_rows, 2), dtype=torch.int32))

    def zeros(self, *shape: int) -> Tensor:
        """Where sums begin."""
        return self.hidden.new_zeros(shape, dtype=self.accumulate_dtype)


def accumulate_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and results: float32, or float64 for float64 operands."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def evenly_spaced(mask: Tensor, count: int) -> Tensor:
    """[count], int64: places where the mask [N] holds, evenly spaced among these; any places if it holds nowhere."""
    before = mask.cumsum(0)
    wanted = (2 * torch.arange(count, device=mask.device) + 1) * before[-1] // (2 * count)
    return torch.searchsorted(before, wanted + 1).clamp(max=len(mask) - 1)


def spans(stop: int, step: int, start: int = 0) -> Iterator[slice]:
    """[start, stop) in consecutive slices of at most `step`."""
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))


def check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    total_weight: Tensor | None,
    compute_dtype: torch.dtype,
) -> None:
    """Raises unless the operands fit together: RuntimeError, or ValueError for targets of a wrong shape.

    It looks at shapes, dtypes and devices only, so it also works while tracing.
    """
    _check_matrices(hidden, weight)
    for name, vector in (("bias", bias), ("class weight", total_weight)):
        if vector is not None:
            _check_vector(name, vector, weight)
    if target is not None:
        _check_target(target, hidden)
    floating = {"hidden": hidden, "weight": weight, "bias": bias, "class weight": total_weight}
    for name, tensor in floating.items():
        if tensor is not None and not tensor.is_floating_point():
            raise RuntimeError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
    if compute_dtype not in COMPUTE_DTYPES:
        supported = ", ".join(str(dtype) for dtype in COMPUTE_DTYPES)
        raise RuntimeError(f"matmuls in {compute_dtype} are not supported, only in {supported}")
    devices = {str(t.device) for t in (hidden, weight, bias, target, total_weight) if t is not None}
    if len(devices) > 1:
        found = ", ".join(sorted(devices))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {found}")


def _check_matrices(hidden: Tensor, weight: Tensor) -> None:
    shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2:
        raise RuntimeError(f"hidden states and weight must be 2-D, [N, D] and [V, D], got {shapes}")
    torch._check(
        hidden.shape[1] == weight.shape[1],
        lambda: f"hidden states and weight of shapes {shapes} cannot be multiplied: last dimensions differ",
    )


def _check_vector(name: str, vector: Tensor, weight: Tensor) -> None:
    if vector.dim() != 1:
        raise RuntimeError(f"{name} must be 1-D, got shape {tuple(vector.shape)}")
    torch._check(
        vector.shape[0] == weight.shape[0],
        lambda: f"{name} has {vector.shape[0]} entries for a vocabulary of {weight.shape[0]}",
    )


def _check_target(target: Tensor, hidden: Tensor) -> None:
    if target.dim() not in (1, 2):
        raise ValueError(f"targets must be 1-D, or 2-D for several in each row, got shape {tuple(target.shape)}")
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"expected targets of dtype int64 or uint8 (class indices), got {target.dtype}")
    rows, targets = hidden.shape[0], target.shape[0]
    torch._check_value(
        rows == targets,
        lambda: f"Expected input batch_size ({rows}) to match target batch_size ({targets}).",
    )
