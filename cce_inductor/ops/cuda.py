"""The operators on a GPU: Triton kernels for 16-bit logits, cuBLAS for the plain matmuls of the backward.

`stored.py` has the way of float32. All else goes through ATen.
"""

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .. import compat
from ..kernels import template
from ..kernels.backward import gradient_kernel
from ..kernels.config import TileConfig, kept_config, tile_config
from ..kernels.forward import forward_kernel
from ..kernels.picked import picked_kernel
from ..kernels.targets import targets_kernel
from . import cpu, sparse, stored
from .blocks import ALIGNMENT, Fill, exact_backward
from .fallback import first_that_runs, smaller
from .kept_tiles import KeptTiles, Place
from .launch import Launch, device_properties, gradient_arguments, ignore_arguments
from .problem import Problem, Reductions, RowGradients, Tiles, spans
from .quick_launch import launch
from .tile_results import TileResults

COLUMN_MULTIPLE = 256  # vocabulary slices are multiples of the widest tile
NARROWEST_SLICE = 8 * COLUMN_MULTIPLE  # below this, the matmuls of the backward would be short of work
BAD_TARGET = "cce_inductor: a target lies outside [0, vocabulary size) and is not ignore_index"


def supported(problem: Problem) -> bool:
    """Whether the Triton kernels that multiply cover the problem.

    Not covered: float64; float32, where cuBLAS is faster than a Triton kernel without tensor cores, and its TF32
    rounds the operands where Triton cuts them off; empty operands.
    """
    on_gpu = problem.hidden.is_cuda  # elsewhere Triton's interpreter runs the kernels, and float32 is its best dtype
    dtypes = (torch.bfloat16, torch.float16) if on_gpu else (torch.bfloat16, torch.float16, torch.float32)
    return problem.compute_dtype in dtypes and not problem.is_empty


def recorded_tiles(
    device: torch.device,
    vocab_size: int,
    compute_dtype: torch.dtype,
    want_total: bool,
    several_targets: bool,
    approximate_mass: float,
) -> int:
    """Of how many tiles the forward keeps records for the backward; of none unless that may be sparse."""
    if device.type != "cuda" or compute_dtype.itemsize != 2 or approximate_mass == 0:
        return 0
    if want_total or several_targets:
        return 0
    return -(-vocab_size // tile_config(device_properties(device)[0], backward=False).block_v)


def forward(problem: Problem) -> Reductions:
    """With a record of each tile for a sparse backward.

    lse_rest is zero in 16 bits: the rounding of the operands outweighs it by far.
    """
    ways = {}
    if stored.supported(problem):
        ways["the forward over stored logits"] = lambda: _stored_forward(problem)
        ways["the forward over stored logits in less memory"] = lambda: _stored_forward(smaller(problem))
    elif supported(problem):
        ways["the Triton forward"] = lambda: reduce(problem)
    return first_that_runs(
        kind(problem),
        {
            **ways,
            "the forward through ATen": lambda: _aten_forward(problem),
            "the forward through ATen in less memory": lambda: _aten_forward(smaller(problem)),
        },
    )


def kind(problem: Problem) -> Hashable:
    """What decides which kernels are compiled."""
    return problem.logit_map, problem.compute_dtype, problem.hidden.device, problem.several_targets


def _recorded_tiles(problem: Problem) -> int:
    return recorded_tiles(
        problem.hidden.device,
        problem.vocab_size,
        problem.compute_dtype,
        problem.want_total,
        problem.several_targets,
        problem.approximate_mass,
    )


def may_skip(problem: Problem) -> bool:
    """Whether the backward for hidden states and weight is sparse."""
    return _recorded_tiles(problem) > 0 and sparse.worthwhile(problem, [True, True, False])


def _stored_forward(problem: Problem) -> Reductions:
    assert_targets(problem)
    return stored.forward(problem, *block_shape(problem))


def _aten_forward(problem: Problem) -> Reductions:
    """Of tiles it knows nothing; infinite ones, and all of it left, make an approximate backward skip none."""
    assert_targets(problem)
    tiles = problem.tiles(_recorded_tiles(problem))
    tiles.tops.view(torch.float32).fill_(1.0)
    return cpu.forward(problem)._replace(tile_lse=tiles.lse.fill_(float("inf")), tile_tops=tiles.tops)


def reduce(problem: Problem, kept: KeptTiles | None = None) -> Reductions:
    """The forward in Triton. What `kept` has room for goes there, but for that of rows that are left out."""
    rows, every_row = _Rows.of(problem), slice(0, problem.num_rows)
    launch = Launch(problem, forward_config(problem), hidden=rows.hidden)
    tiles = -(-problem.vocab_size // launch.config.block_v)
    results = TileResults.allocate(problem, tiles, _recorded_tiles(problem) > 0)
    slices, parts = _forward_slices(problem), (kept or KeptTiles()).parts
    for columns, place in itertools.chain.from_iterable(parts(every_row, part) for part in slices):
        launch(
            forward_kernel,
            every_row,
            columns,
            problem.weight_rows(columns),
            place=place,
            KEEP=place is not None and place.base is not None,
            CODE=place is not None and place.base is None,
            PLAIN=problem.logit_map.is_identity,
            row_of=rows.row_of,
            row_count=rows.count,
            SOME_ROWS=rows.row_of is not None,
            tile_lse=results.lse,
            tile_total=results.total,
            tile_maximum=results.maximum,
            tile_argmax=results.argmax,
            tile_entropy=results.entropy,
            tile_tops=results.tops,
            WANT_TOPS=results.tops is not None,
            WANT_MAX=problem.want_max,
            WANT_ENTROPY=problem.want_entropy,
            first_tile=columns.start // launch.config.block_v,
            VALUE=template.load(problem.logit_map).value,
        )
    combined = results.combined(problem)
    return combined._replace(picked=_picked(problem, combined, launch.config.block_v))


@dataclass(frozen=True)
class _Rows:
    """The rows that the forward computes."""

    hidden: Tensor  # [N, D], of which the first `count` rows are computed
    row_of: Tensor | None  # [N], int32: their places in the results; None if all are computed, in order
    count: Tensor | None  # [], int32

    @classmethod
    def of(cls, problem: Problem) -> "_Rows":
        """Asserts, on the device and without a synchronisation, that the targets are right, as eager's kernels do."""
        if problem.target is None:
            return cls(problem.hidden, None, None)
        some = problem.leaves_out
        good = torch.empty((), dtype=torch.bool, device=problem.target.device)
        # where fewer rows count than there are, the places that are left point to some row
        row_of = torch.zeros_like(problem.target, dtype=torch.int32) if some else None
        count = torch.empty((), dtype=torch.int32, device=problem.target.device) if some else None
        launch(
            targets_kernel,
            1,
            target=problem.target,
            good=good,
            row_of=row_of,
            row_count=count,
            num_rows=problem.target.numel(),
            num_columns=problem.vocab_size,
            **ignore_arguments(problem),
            SOME_ROWS=some,
            ROWS=8192 if problem.several_targets else 1024,
        )
        compat.assert_on_device(good, BAD_TARGET)
        return cls(problem.hidden if row_of is None else problem.hidden[row_of], row_of, count)


def assert_targets(problem: Problem) -> None:
    """The same assertion through ATen."""
    if problem.target is not None:
        compat.assert_on_device(~cpu.bad_targets(problem).any(), BAD_TARGET)


def _picked(problem: Problem, results: Reductions, tile_width: int) -> Tensor:
    """The logits of the targets, in their shape, or zeros [N]. Where tiles are recorded, targets are their tops."""
    if problem.target is None:
        return torch.zeros_like(results.lse)
    picked = torch.empty_like(problem.target, dtype=results.lse.dtype)
    launch(
        picked_kernel,
        problem.target.numel(),
        hidden=problem.hidden,
        weight=problem.weight,
        bias=problem.bias,
        target=problem.target,
        lse=results.lse,
        picked=picked,
        tile_lse=results.tile_lse,
        tile_tops=results.tile_tops,
        num_rows=problem.num_rows,
        num_targets=problem.targets_per_row,
        width=problem.width,
        **ignore_arguments(problem),
        stride_hn=problem.hidden.stride(0),
        stride_hd=problem.hidden.stride(1),
        stride_wv=problem.weight.stride(0),
        stride_wd=problem.weight.stride(1),
        VALUE=template.load(problem.logit_map).value,
        HAS_BIAS=problem.bias is not None,
        WANT_TOPS=len(results.tile_lse) > 0,
        TILE=tile_width,
        BLOCK_D=min(1024, triton.next_power_of_2(problem.width)),
    )
    return picked


def backward(
    problem: Problem, lse: Tensor, tiles: Tiles, grads: RowGradients, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias for those of the results."""
    saved = lse, tiles, grads, needs_grad

    def exact(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        return _exact_backward(problem, lse, grads, needs_grad)

    def over_stored_logits(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        return stored.backward(problem, lse, grads, needs_grad, *block_shape(problem))

    ways: dict[str, Callable] = {}
    if stored.supported(problem):
        ways["the backward over stored logits"] = lambda: over_stored_logits(problem)
        ways["the backward over stored logits in less memory"] = lambda: over_stored_logits(smaller(problem))
    elif supported(problem):
        plain = grads.maximum is None and grads.entropy is None
        if len(tiles.lse) > 0 and plain and sparse.worthwhile(problem, needs_grad):
            ways["the sparse backward"] = lambda: sparse.backward(problem, *saved)
        ways["the exact Triton backward"] = lambda: exact(problem)
        ways["the exact Triton backward in less memory"] = lambda: exact(smaller(problem))
    else:
        ways["the backward through ATen"] = lambda: cpu.backward(problem, *saved)
    ways["the backward through ATen in less memory"] = lambda: cpu.backward(smaller(problem), *saved)
    return first_that_runs(kind(problem), ways)


def _exact_backward(
    problem: Problem, lse: Tensor, grads: RowGradients, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return exact_backward(problem, needs_grad, *block_shape(problem), gradient_of(problem, lse, grads))


def gradient_of(problem: Problem, lse: Tensor, grads: RowGradients, kept: KeptTiles | None = None) -> Fill:
    """Computes blocks of dz for the gradients of the results: from kept logits, or anew."""
    capability, _ = device_properties(problem.hidden.device)
    anew = Launch(problem, tile_config(capability, backward=True), problem.hidden)
    from_kept = Launch(problem, kept_config(capability), problem.hidden)
    parts = (kept or KeptTiles()).parts
    targets, several = problem.target, problem.targets_per_row > 1
    if targets is not None and several:
        targets, order = targets.sort(dim=1, stable=True)
        grads = grads._replace(picked=grads.picked.gather(1, order))

    def fill(rows: slice, columns: slice, weight: Tensor, dz: Tensor, grad_bias: Tensor | None) -> None:
        for part, place in parts(rows, columns):
            here = slice(part.start - columns.start, part.stop - columns.start)
            bias_here = None if grad_bias is None else grad_bias[here]
            fill_part(rows, part, weight[here], dz[:, here], bias_here, place)

    def fill_part(
        rows: slice, columns: slice, weight: Tensor, dz: Tensor, grad_bias: Tensor | None, place: Place | None
    ) -> None:
        launch = anew if place is None else from_kept
        tile_bias = None
        if grad_bias is not None:
            tile_bias = problem.zeros(launch.row_blocks(rows), weight.shape[0])
        launch(
            gradient_kernel,
            rows,
            columns,
            weight,
            place=place,
            **gradient_arguments(problem, lse, grads, rows),
            target=None if targets is None else targets[rows],
            num_targets=problem.targets_per_row,
            first_column=columns.start,
            **ignore_arguments(problem),
            dz=dz,
            tile_bias=tile_bias,
            HAS_TARGET=problem.targets_per_row == 1,
            SEARCH_STEPS=problem.targets_per_row.bit_length() if several else 0,
            WANT_BIAS=grad_bias is not None,
            FROM_KEPT=place is not None,
        )
        if grad_bias is not None and tile_bias is not None:
            grad_bias += tile_bias.sum(0)

    return fill


def forward_config(problem: Problem) -> TileConfig:
    """The tiles of the forward."""
    return tile_config(device_properties(problem.hidden.device)[0], backward=False)


def _forward_slices(problem: Problem) -> list[slice]:
    """One slice, unless the weight has to be cast: then slices whose cast fits in the workspace."""
    if problem.weight.dtype == problem.compute_dtype:
        return [slice(0, problem.vocab_size)]
    columns = problem.workspace_bytes // (problem.compute_dtype.itemsize * problem.width)
    return list(spans(problem.vocab_size, max(1, columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE))


def block_shape(problem: Problem) -> tuple[int, int]:
    """(rows, columns) of a block of dz that fits in the workspace: all rows, unless slices would get too narrow."""
    elements = problem.workspace_bytes // problem.compute_dtype.itemsize
    rows = max(1, min(problem.num_rows, elements // min(problem.vocab_size, NARROWEST_SLICE)))
    columns = max(1, elements // rows // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    return rows, min(columns, -(-problem.vocab_size // ALIGNMENT) * ALIGNMENT)
