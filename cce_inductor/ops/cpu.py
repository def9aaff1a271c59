"""The operators on any device through ATen: blocks of logits sized for the cache, never all of them.

It serves the CPU, and on a GPU the dtypes that the Triton kernels don't cover (float64).
"""

import torch
from torch import Tensor

from .blocks import ALIGNMENT, Fill, exact_backward
from .counted import counted_rows, spread, with_rows
from .kept import KeptLogits
from .problem import MIB, Problem, spans

BLOCK_ROWS = 1024
BLOCK_BYTES = 4 * MIB  # of one block of logits in float32: stays in a last-level cache while it is worked on
GPU_BLOCK_ROWS = 4096  # there the workspace bounds a block, and matmuls want more of everything


def block_shape(problem: Problem, most_rows: int | None = None) -> tuple[int, int]:
    """(rows, columns) of a block: many rows, so that each slice of the weight is read a few times only."""
    if problem.hidden.is_cuda:
        rows, size = GPU_BLOCK_ROWS, problem.workspace_bytes
    else:
        rows, size = BLOCK_ROWS, min(BLOCK_BYTES, problem.workspace_bytes)
    rows = max(1, min(problem.num_rows if most_rows is None else most_rows, rows))
    columns = size // problem.accumulate_dtype.itemsize // rows
    return rows, min(max(1, columns // ALIGNMENT) * ALIGNMENT, -(-problem.vocab_size // ALIGNMENT) * ALIGNMENT)


def _preactivations(
    problem: Problem, rows: slice, columns: slice, weight: Tensor, kept: Tensor | None, again: bool
) -> Tensor:
    """z = hidden @ weight.T + bias of one block, in the dtype of the sums.

    kept: where the product goes the first time and is found again; it must not be written to.
    """
    if kept is None:
        product = problem.hidden[rows] @ weight.T
    else:
        product = kept if again else torch.mm(problem.hidden[rows], weight.T, out=kept)
    z = product.to(problem.accumulate_dtype)
    if problem.bias is not None:
        z = z + problem.bias[columns] if z is kept else z.add_(problem.bias[columns])
    return z


def bad_targets(problem: Problem) -> Tensor:
    """Which targets [N] lie outside the vocabulary and count."""
    assert problem.target is not None
    bad = (problem.target < 0) | (problem.target >= problem.vocab_size)
    return bad if problem.ignore_index is None else bad & (problem.target != problem.ignore_index)


def check_targets(problem: Problem) -> None:
    """Raises eager's error for a target outside the vocabulary: cross_entropy's, or gather's without ignore_index."""
    if problem.target is None:
        return
    bad = bad_targets(problem)
    if bad.any():
        first = problem.target[bad][0].item()
        if problem.ignore_index is None:
            raise RuntimeError(f"index {first} is out of bounds for dimension 1 with size {problem.vocab_size}")
        raise IndexError(f"Target {first} is out of bounds.")


def _target_columns(problem: Problem, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """(index [rows, 1] into the block, whether [rows, 1] the row's target lies in the block and counts)."""
    assert problem.target is not None
    target = problem.target[rows]
    inside = (target >= columns.start) & (target < columns.stop)
    if problem.ignore_index is not None:
        inside &= target != problem.ignore_index
    return torch.where(inside, target - columns.start, 0).unsqueeze(1), inside.unsqueeze(1)


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lse, picked, total and lse_rest, each [N]; an empty tile_lse."""
    if not problem.hidden.is_cuda:
        check_targets(problem)
    counted = counted_rows(problem)
    if counted is not None:
        vectors = forward(with_rows(problem, counted))[:4]
        lse, picked, total, lse_rest = (spread(vector, counted, problem.num_rows) for vector in vectors)
        return lse, picked, total, lse_rest, problem.tile_lse(0)
    results = reduce_rows(problem, slice(0, problem.num_rows), *block_shape(problem), KeptLogits())
    return *results, problem.tile_lse(0)


def reduce_rows(
    problem: Problem, group: slice, block_rows: int, block_columns: int, kept: KeptLogits
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, picked, total and lse_rest of a group of rows, reduced from those of the vocabulary slices."""
    slices = list(spans(problem.vocab_size, block_columns))
    row_count = group.stop - group.start
    picked = problem.zeros(row_count)
    slice_peak, slice_sum, slice_total = (problem.zeros(len(slices), row_count) for _ in range(3))
    for number, columns in enumerate(slices):
        weight = problem.weight_rows(columns)
        for rows in spans(group.stop, block_rows, group.start):
            here = slice(rows.start - group.start, rows.stop - group.start)
            place = kept.block(rows, columns)
            x = problem.logit_map(_preactivations(problem, rows, columns, weight, place, again=False))
            if problem.target is not None:
                index, inside = _target_columns(problem, rows, columns)
                picked[here] += torch.where(inside, x.gather(1, index), 0.0).squeeze(1)
            if problem.want_total:
                slice_total[number, here] = _weighted_sum(problem, x, columns)
            slice_peak[number, here], slice_sum[number, here] = _sum_exp(x, None if x is place else x)
    lse, lse_rest = _log_sum(slice_peak, slice_sum)
    return lse, picked, slice_total.sum(0), lse_rest


def _sum_exp(x: Tensor, scratch: Tensor | None) -> tuple[Tensor, Tensor]:
    """(shift, sum over columns of exp(x - shift)), the shift the largest x or 0; the sum is nan where x has a nan or
    +inf. The scratch, where there is one, is overwritten; it may be x itself."""
    peak = x.amax(1, keepdim=True)
    shift = peak.masked_fill(peak == -torch.inf, 0.0)
    return shift.squeeze(1), torch.sub(x, shift, out=scratch).exp_().sum(1)


def _log_sum(peaks: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """(lse, lse_rest): the log of the sum over slices of exp(peak) * sum, and what rounding took from it.

    Where one logit stands out, the log-sum-exp exceeds it by less than a rounding of either. Losses of confident rows
    are nothing but that difference, and `torch.log_softmax` keeps it.
    """
    if len(peaks) == 0:
        nothing = sums.sum(0)
        return nothing.log(), nothing
    peak = torch.where(sums == 0, -torch.inf, peaks).amax(0)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    log_sum = (sums * torch.exp(peaks - peak)).sum(0).log()
    lse = peak + log_sum
    return lse, torch.where(lse.isfinite(), log_sum - (lse - peak), 0.0)


def _weighted_sum(problem: Problem, x: Tensor, columns: slice) -> Tensor:
    return x.sum(1) if problem.total_weight is None else x @ problem.total_weight[columns].to(x.dtype)


def backward(
    problem: Problem, lse: Tensor, tile_lse: Tensor, grads: list[Tensor], needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias for the gradients [lse, picked, total] of the results; always exact."""
    counted = counted_rows(problem)
    if counted is not None:
        part = with_rows(problem, counted)
        few, grad_weight, grad_bias = backward(part, lse[counted], tile_lse, [g[counted] for g in grads], needs_grad)
        return spread(few, counted, problem.num_rows) if needs_grad[0] else few, grad_weight, grad_bias
    return exact_backward(problem, needs_grad, *block_shape(problem), gradient_of(problem, lse, grads, KeptLogits()))


def gradient_of(problem: Problem, lse: Tensor, grads: list[Tensor], kept: KeptLogits) -> Fill:
    """Computes blocks of dz for the gradients of lse, picked and total, each [N]: from kept logits, or anew."""
    grad_lse, grad_picked, grad_total = (g.unsqueeze(1) for g in grads)

    def fill(rows: slice, columns: slice, weight: Tensor, dz: Tensor, grad_bias: Tensor | None) -> None:
        z = _preactivations(problem, rows, columns, weight, kept.block(rows, columns), again=True)
        x, slope = problem.logit_map.value_and_derivative(z)
        spare = None if slope is not None else x  # of another dtype than dz, x is a copy; it and the slope may be one
        place = dz if dz.dtype == x.dtype else spare
        dx = torch.sub(x, lse[rows].unsqueeze(1), out=place).exp_().mul_(grad_lse[rows])
        if problem.target is not None:
            index, inside = _target_columns(problem, rows, columns)
            dx.scatter_add_(1, index, torch.where(inside, grad_picked[rows], 0.0))
        if problem.want_total:
            total_weight = 1.0 if problem.total_weight is None else problem.total_weight[columns].to(dx.dtype)
            dx += grad_total[rows] * total_weight
        if slope is not None:
            dx *= slope
        if grad_bias is not None:
            grad_bias += dx.sum(0)
        if dx is not dz:
            dz.copy_(dx)

    return fill
