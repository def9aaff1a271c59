"""The operators on a GPU in float32: cuBLAS puts blocks of logits in memory, two Triton kernels pass over them.

In float32 no product is faster than cuBLAS's, and `torch.backends.cuda.matmul` says how exact it is. One pass reduces a
block, one turns it into dz, in its place.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import template
from ..kernels.config import stored_config
from ..kernels.stored import gradient_stored_kernel, reduce_stored_kernel
from .blocks import Fill, exact_backward, logits_into
from .combine import entropy_of, largest, log_sum
from .kept import KeptLogits
from .launch import device_properties, gradient_arguments, ignore_arguments, vocabulary_arguments
from .problem import Problem, Reductions, RowGradients, spans
from .quick_launch import launch

ALIGNMENT = 16  # rows of a block that begin at multiples of so many numbers are read in the largest pieces


def supported(problem: Problem) -> bool:
    """Whether this is the way to take: on a GPU, for what it covers, and for maps in which the kernels round like ATen.

    Their exp and tanh err by two or three units in the last place, which shows in the gradients of certain rows.
    """
    return problem.hidden.is_cuda and covers(problem) and problem.logit_map.affine() is not None


def covers(problem: Problem) -> bool:
    """Not covered: other dtypes than float32, several targets of each row, empty operands."""
    return problem.compute_dtype == torch.float32 and not problem.several_targets and not problem.is_empty


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


class _TileResults(NamedTuple):
    """What the kernel stores of each vocabulary tile and row, [tiles, N]; None where nobody wants it."""

    tile_peak: Tensor
    tile_sum: Tensor
    tile_spread: Tensor | None
    tile_total: Tensor | None
    tile_argmax: Tensor | None  # int32

    @classmethod
    def allocate(cls, problem: Problem, tiles: int, num_rows: int) -> "_TileResults":
        peak, sums = (problem.hidden.new_empty(tiles, num_rows) for _ in range(2))
        return cls(
            peak,
            sums,
            torch.empty_like(peak) if problem.want_entropy else None,
            torch.empty_like(peak) if problem.want_total else None,
            torch.empty_like(peak, dtype=torch.int32) if problem.want_max else None,
        )

    def of(self, first_tile: int, rows: slice) -> dict[str, Tensor | None]:
        """Those of some rows and of the tiles from one on, by the names that the kernel has for them."""
        return {name: None if of_all is None else of_all[first_tile:, rows] for name, of_all in self._asdict().items()}

    def combined(self, problem: Problem, picked: Tensor) -> Reductions:
        """Of the whole vocabulary."""
        peaks, sums, spreads, totals, places = self
        lse, lse_rest = log_sum(peaks, sums)
        maximum, argmax = problem.zeros(0), problem.zeros(0).long()
        if places is not None:
            maximum, argmax = largest(torch.where(sums == 0, -torch.inf, peaks), places, lse)
        entropy = problem.zeros(0) if spreads is None else entropy_of(peaks, sums, spreads)
        total = torch.zeros_like(lse) if totals is None else totals.sum(0)
        return Reductions(lse, picked, total, maximum, argmax, entropy, lse_rest, *problem.tiles(0))


def reduce_rows(problem: Problem, group: slice, workspace: Tensor, kept: KeptLogits) -> Reductions:
    """The reductions of a group of rows. Logits that are not kept go to the workspace, [rows, columns] at a time."""
    block_rows, block_columns = workspace.shape
    tile_columns = stored_config(device_properties(workspace.device)[0]).block_v
    whole_slices, columns_left = divmod(problem.vocab_size, block_columns)
    slice_tiles = -(-block_columns // tile_columns)
    num_rows = group.stop - group.start
    tiles = _TileResults.allocate(problem, whole_slices * slice_tiles - (-columns_left // tile_columns), num_rows)
    picked = problem.zeros(num_rows)
    for number, columns in enumerate(spans(problem.vocab_size, block_columns)):
        weight = problem.weight_rows(columns)
        for rows in spans(group.stop, block_rows, group.start):
            here = slice(rows.start - group.start, rows.stop - group.start)
            place = kept.block(rows, columns)
            z = workspace[: rows.stop - rows.start, : len(weight)] if place is None else place
            logits_into(z, problem.hidden[rows], weight)
            _launch(
                reduce_stored_kernel,
                problem,
                rows,
                columns,
                z,
                picked=picked[here],
                stride_tile=num_rows,
                VALUE=template.load(problem.logit_map).value,
                WANT_MAX=problem.want_max,
                WANT_ENTROPY=problem.want_entropy,
                **tiles.of(number * slice_tiles, here),
            )
    return tiles.combined(problem, picked)


def gradient_of(problem: Problem, lse: Tensor, grads: RowGradients, kept: KeptLogits, at_hand: bool) -> Fill:
    """Computes blocks of dz for the gradients of the results: from kept logits, or anew.

    at_hand: the logits are where their gradient goes, as `reduce_rows` leaves them of a single block.
    """

    def fill(rows: slice, columns: slice, weight: Tensor, dz: Tensor, grad_bias: Tensor | None) -> None:
        z = kept.block(rows, columns)
        if z is None:
            z = dz if at_hand else logits_into(dz, problem.hidden[rows], weight)
        _launch(
            gradient_stored_kernel,
            problem,
            rows,
            columns,
            z,
            dz=dz,
            stride_dz=dz.stride(0),
            **gradient_arguments(problem, lse, grads, rows),
        )
        if grad_bias is not None:
            grad_bias += dz.sum(0)

    return fill


def _launch(kernel: Any, problem: Problem, rows: slice, columns: slice, z: Tensor, **arguments: Any) -> None:
    """Runs a kernel over the tiles of a block of logits z."""
    config = stored_config(device_properties(z.device)[0])
    num_rows, num_columns = z.shape
    launch(
        kernel,
        -(-num_rows // config.block_n) * -(-num_columns // config.block_v),
        z=z,
        target=None if problem.target is None else problem.target[rows],
        num_rows=num_rows,
        num_columns=num_columns,
        first_column=columns.start,
        stride_z=z.stride(0),
        HAS_TARGET=problem.target is not None,
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **vocabulary_arguments(problem, columns),
        **ignore_arguments(problem),
        **arguments,
    )
