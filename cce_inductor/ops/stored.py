"""The operators on a GPU in float32: cuBLAS puts blocks of logits in memory, two Triton kernels pass over them.

In float32 no product is faster than cuBLAS's, and `torch.backends.cuda.matmul` says how exact it is. One pass reduces a
block, one turns it into dz, in its place.
"""

from typing import Any

import torch
from torch import Tensor

from ..kernels import template
from ..kernels.config import stored_config
from ..kernels.stored import gradient_stored_kernel, reduce_stored_kernel
from .blocks import Fill, exact_backward
from .combine import entropy_of, largest, log_sum
from .kept import KeptLogits
from .launch import device_properties, ignore_arguments
from .problem import Problem, Reductions, RowGradients, spans

ALIGNMENT = 16  # rows of a block that begin at multiples of so many numbers are read in the largest pieces


def supported(problem: Problem) -> bool:
    """Whether this is the way to take: on a GPU, for what it covers."""
    return problem.hidden.is_cuda and covers(problem)


def covers(problem: Problem) -> bool:
    """Not covered: other dtypes than float32, several targets of each row, empty operands."""
    empty = min(problem.num_rows, problem.vocab_size, problem.width) == 0
    return problem.compute_dtype == torch.float32 and not problem.several_targets and not empty


def forward(problem: Problem, block_rows: int, block_columns: int) -> Reductions:
    """With nothing recorded of tiles."""
    workspace = problem.hidden.new_empty(block_rows, block_columns)
    return reduce_rows(problem, slice(0, problem.num_rows), workspace, KeptLogits())


def backward(
    problem: Problem, lse: Tensor, grads: RowGradients, needs_grad: list[bool], block_rows: int, block_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias for those of the results; always exact."""
    fill = gradient_of(problem, lse, grads, KeptLogits(), at_hand=False)
    return exact_backward(problem, needs_grad, block_rows, block_columns, fill)


def reduce_rows(problem: Problem, group: slice, workspace: Tensor, kept: KeptLogits) -> Reductions:
    """The reductions of a group of rows. Logits that are not kept go to the workspace, [rows, columns] at a time."""
    block_rows, block_columns = workspace.shape
    tile_columns = stored_config(device_properties(workspace.device)[0]).block_v
    num_rows, slices = group.stop - group.start, list(spans(problem.vocab_size, block_columns))
    tiles_of = [-(-(columns.stop - columns.start) // tile_columns) for columns in slices]
    peak, sums = (problem.hidden.new_empty(sum(tiles_of), num_rows) for _ in range(2))
    spread = torch.empty_like(peak) if problem.want_entropy else None
    total = torch.empty_like(peak) if problem.want_total else None
    argmax = torch.empty_like(peak, dtype=torch.int32) if problem.want_max else None
    picked = problem.zeros(num_rows)
    first_tile = 0
    for columns, tiles in zip(slices, tiles_of, strict=True):
        weight = problem.weight_rows(columns)
        for rows in spans(group.stop, block_rows, group.start):
            here = slice(rows.start - group.start, rows.stop - group.start)
            place = kept.block(rows, columns)
            z = workspace[: rows.stop - rows.start, : len(weight)] if place is None else place
            torch.mm(problem.hidden[rows], weight.T, out=z)

            def of_tiles(results: Tensor | None, first: int = first_tile, here: slice = here) -> Tensor | None:
                return None if results is None else results[first:, here]

            _launch(
                reduce_stored_kernel,
                problem,
                rows,
                columns,
                z,
                picked=picked[here],
                tile_peak=of_tiles(peak),
                tile_sum=of_tiles(sums),
                tile_spread=of_tiles(spread),
                tile_total=of_tiles(total),
                tile_argmax=of_tiles(argmax),
                stride_tile=num_rows,
                VALUE=template.load(problem.logit_map).value,
                WANT_MAX=problem.want_max,
                WANT_ENTROPY=problem.want_entropy,
            )
        first_tile += tiles
    lse, lse_rest = log_sum(peak, sums)
    nothing = problem.zeros(0)
    maximum, places = nothing, nothing.long()
    if argmax is not None:
        maximum, places = largest(torch.where(sums == 0, -torch.inf, peak), argmax, lse)
    return Reductions(
        lse=lse,
        picked=picked,
        total=torch.zeros_like(lse) if total is None else total.sum(0),
        maximum=maximum,
        argmax=places,
        entropy=nothing if spread is None else entropy_of(peak, sums, spread),
        lse_rest=lse_rest,
        tile_lse=problem.tiles(0).lse,
        tile_top=problem.tiles(0).top,
    )


def gradient_of(problem: Problem, lse: Tensor, grads: RowGradients, kept: KeptLogits, at_hand: bool) -> Fill:
    """Computes blocks of dz for the gradients of the results: from kept logits, or anew.

    at_hand: the logits are where their gradient goes, as `reduce_rows` leaves them of a single block.
    """

    def fill(rows: slice, columns: slice, weight: Tensor, dz: Tensor, grad_bias: Tensor | None) -> None:
        z = kept.block(rows, columns)
        if z is None:
            z = dz if at_hand else torch.mm(problem.hidden[rows], weight.T, out=dz)
        here = grads.map(lambda vector: vector[rows])
        _launch(
            gradient_stored_kernel,
            problem,
            rows,
            columns,
            z,
            dz=dz,
            lse=lse[rows],
            grad_lse=here.lse,
            grad_picked=here.picked,
            grad_total=here.total,
            grad_maximum=here.maximum,
            grad_entropy=here.entropy,
            argmax=here.argmax if here.maximum is not None else None,
            entropy=here.row_entropy if here.entropy is not None else None,
            stride_dz=dz.stride(0),
            VALUE_AND_SLOPE=template.load(problem.logit_map).value_and_slope,
            HAS_MAXIMUM=here.maximum is not None,
            HAS_ENTROPY=here.entropy is not None,
        )
        if grad_bias is not None:
            grad_bias += dz.sum(0)

    return fill


def _launch(kernel: Any, problem: Problem, rows: slice, columns: slice, z: Tensor, **arguments: Any) -> None:
    """Runs a kernel over the tiles of a block of logits z."""
    config = stored_config(device_properties(z.device)[0])
    num_rows, num_columns = z.shape
    kernel[(-(-num_rows // config.block_n) * -(-num_columns // config.block_v),)](
        z=z,
        bias=None if problem.bias is None else problem.bias[columns],
        target=None if problem.target is None else problem.target[rows],
        total_weight=None if problem.total_weight is None else problem.total_weight[columns],
        num_rows=num_rows,
        num_columns=num_columns,
        first_column=columns.start,
        stride_z=z.stride(0),
        HAS_BIAS=problem.bias is not None,
        HAS_TARGET=problem.target is not None,
        WANT_TOTAL=problem.want_total,
        HAS_TOTAL_WEIGHT=problem.total_weight is not None,
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **ignore_arguments(problem),
        **arguments,
    )
