"""A loss and its gradients at once, where the weights of the rows in the loss are known beforehand.

    loss = sum over n of coefficient[n] * (lse[n] - picked[n])

The backward of `vocab_reductions` computes the logits a second time, because it has to wait for the gradient of the
loss. Here the gradients are those for a gradient of one, computed while the logits are at hand; the real one multiplies
them later. Where Triton kernels compute the logits, `cuda_loss.py` does that. Through ATen, the logits of all rows need
not be at hand at once:

- where the sum over rows of the weight's gradient can be kept in its place without loss (float32 and float64 weights),
  rows are taken in groups whose logits fit in the workspace;
- else all rows are one group. The logits of the first slices of the vocabulary are kept in the memory of the weight's
  gradient, which is free until then, and in the workspace; the rest is computed a second time.

Where much may be skipped on a CPU, `cpu_sparse.py` takes it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import cpu, cpu_sparse, cuda, cuda_loss, workspace
from .blocks import Gradients, add_rows
from .counted import counted_rows, spread, with_rows
from .fallback import first_that_runs, smaller
from .kept import KeptLogits
from .problem import Problem, RowGradients, spans

LOGITS_SHARE = 5  # a workspace is no larger than a fifth of the logits, whose memory the operators are there to save
FEWEST_ROWS = 256  # of a group: with fewer, reading and writing the sums takes longer than the matmuls
GPU_FEWEST_ROWS = 4096


def loss_and_gradients(
    problem: Problem, coefficient: Tensor, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, grad_hidden, grad_weight, grad_bias); gradients are empty where not needed."""
    problem = workspace.for_loss_with_gradients(problem)

    def ways(name: str, compute: Callable) -> dict[str, Callable]:
        return {
            name: lambda: compute(problem, coefficient, needs_grad),
            f"{name} in less memory": lambda: compute(smaller(problem), coefficient, needs_grad),
        }

    through_aten = ways("the loss with its gradients", _loss_and_gradients)
    if not cuda_loss.supported(problem):
        return first_that_runs("scaled_loss", through_aten)
    in_triton = ways("the Triton loss with its gradients", cuda_loss.loss_and_gradients)
    return first_that_runs(cuda.kind(problem), in_triton | through_aten)


def _loss_and_gradients(
    problem: Problem, coefficient: Tensor, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert problem.target is not None
    (cuda.assert_targets if problem.hidden.is_cuda else cpu.check_targets)(problem)
    counted = counted_rows(problem)
    if counted is not None:
        part = with_rows(problem, counted)
        loss, few, grad_weight, grad_bias = _loss_and_gradients(part, coefficient[counted], needs_grad)
        return loss, spread(few, counted, problem.num_rows) if needs_grad[0] else few, grad_weight, grad_bias
    counts = torch.ones_like(problem.target, dtype=torch.bool)
    if problem.ignore_index is not None:
        counts = problem.target != problem.ignore_index
    coefficient = torch.where(counts, coefficient, 0.0)
    gradients = Gradients.allocate(problem, needs_grad)
    if cpu_sparse.may_skip(problem) and cpu_sparse.skips_enough(problem, coefficient):
        share = cpu_sparse.token_shares(problem, coefficient, gradients.weight)
        return cpu_sparse.loss_and_gradients(problem, coefficient, share, gradients)
    losses, lse, grad_lse = (problem.zeros(problem.num_rows) for _ in range(3))
    grads = RowGradients(grad_lse, -coefficient, torch.zeros_like(grad_lse))
    workspace_bytes = _workspace_bytes(problem)
    group_rows = _group_rows(problem, workspace_bytes)
    block_rows, block_columns = cpu.block_shape(problem, group_rows)
    room = gradients.weight if group_rows == problem.num_rows else gradients.weight[:0]
    kept = KeptLogits.within(problem, group_rows, block_columns, workspace_bytes, room)
    scratch = cpu.Scratch(problem, block_rows, block_columns)
    fill = cpu.gradient_of(problem, lse, grads, kept, scratch)
    block = problem.hidden.new_empty(block_rows, block_columns)
    for rows in spans(problem.num_rows, max(1, group_rows)):
        results = cpu.reduce_rows(problem, rows, block_rows, block_columns, kept, scratch)
        lse[rows] = results.lse
        losses[rows] = results.lse - results.picked + results.lse_rest
        # exp(x - lse - lse_rest) without a pass over x
        grad_lse[rows] = coefficient[rows] * torch.exp(-results.lse_rest)
        add_rows(problem, gradients, rows, block, fill)
    loss = torch.where(counts, coefficient * losses, 0.0).sum()
    return loss, *gradients.results(problem)


def _workspace_bytes(problem: Problem) -> int:
    logits_bytes = problem.num_rows * problem.vocab_size * problem.compute_dtype.itemsize
    return min(problem.workspace_bytes, logits_bytes // LOGITS_SHARE)


def _group_rows(problem: Problem, workspace_bytes: int) -> int:
    """How many rows are taken at a time: all of them, or a block of as many as have room for their logits."""
    fewest, most = (
        (FEWEST_ROWS, cpu.BLOCK_ROWS) if not problem.hidden.is_cuda else (GPU_FEWEST_ROWS, cpu.GPU_BLOCK_ROWS)
    )
    rows = min(most, workspace_bytes // max(1, problem.vocab_size * problem.compute_dtype.itemsize))
    if problem.weight.dtype != problem.accumulate_dtype or rows < fewest or rows >= problem.num_rows:
        return problem.num_rows
    groups = -(-problem.num_rows // rows)
    return -(-problem.num_rows // groups)
