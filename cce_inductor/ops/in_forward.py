"""A loss and its gradients at once, where the weights of the rows in the loss are known beforehand.

    loss = sum over n of coefficient[n] * (lse[n] - picked[n])

The backward of `vocab_reductions` computes the logits a second time, because it has to wait for the gradient of the
loss. Here the gradients are those for a gradient of one, computed while the logits are at hand; the real one multiplies
them later. Where Triton kernels compute the logits, `cuda_loss.py` does that. Where ATen or cuBLAS does (`stored.py`),
the logits of all rows need not be at hand at once:

- where the sum over rows of the weight's gradient can be kept in its place without loss (float32 and float64 weights),
  rows are taken in groups whose logits fit in the workspace;
- else, and where there would be too many groups, all rows are one. The logits of the first slices of the vocabulary are
  kept in the memory of the weight's gradient, which is free until then; the rest is computed a second time.

On a CPU in bfloat16, `cpu_sparse.py` takes it where much may be skipped, and else `cpu_fused.py` does what is not a
product.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu, cpu_fused, cpu_sparse, cuda, cuda_loss, float16_range, stored
from .blocks import Fill, Gradients, add_rows
from .counted import counted_rows, spread, with_rows
from .fallback import first_that_runs, smaller
from .kept import KeptLogits
from .problem import MIB, Problem, Reductions, RowGradients, spans
from .workspace import for_approximate_loss, for_loss_with_gradients

LOGITS_SHARE = 5  # a workspace is no larger than a fifth of the logits, whose memory the operators are there to save
FUSED_LOGITS_SHARE = 8  # a product takes little time there, and torch.compile's logits have 16 bits too
FEWEST_ROWS = 256  # of a group: with fewer, reading and writing the sums takes longer than the matmuls
GPU_LOGITS_SHARE = 4  # there the gradient of the logits takes their place in the workspace, and no other memory
# A group reads and writes the weight's gradient once more: 8 V D bytes, at 3 TB/s on an H100. Logits of so many rows
# are computed again in that time: 2 V D operations a row, at 350 TFLOP/s in TF32.
GPU_GROUP_ROWS = 500
GPU_TILE_ROWS = 128  # of cuBLAS's products: a part of a tile takes as long as a whole one
SMALL = 32 * MIB  # logits that may be in memory at once


class _Blocks(NamedTuple):
    """How rows are taken, and logits computed, reduced and differentiated."""

    group_rows: int
    workspace: Tensor  # for a block of dz [rows, columns]
    reduce: Callable[[slice], Reductions]  # of a group of rows
    gradient_of: Callable[[Tensor, RowGradients], Fill]  # of the same group, for lse [N] and the gradients of results


def loss_and_gradients(
    problem: Problem, coefficient: Tensor, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, grad_hidden, grad_weight, grad_bias, units); gradients are empty where not needed.

    units: what multiplies the gradients of hidden states, and of weight and bias, in the end [2]; none but in float16.
    """
    if problem.compute_dtype != torch.float16:
        return *_by_some_way(problem, coefficient, needs_grad), coefficient.new_empty(0)
    problem, coefficient, rows, units = float16_range.scaled(problem, coefficient)
    loss, grad_hidden, grad_weight, grad_bias = _by_some_way(problem, coefficient, needs_grad)
    return loss / rows, grad_hidden, grad_weight, grad_bias, units


def _by_some_way(
    problem: Problem, coefficient: Tensor, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given, problem = problem, for_loss_with_gradients(problem)

    def ways(name: str, compute: Callable, problem: Problem = problem) -> dict[str, Callable]:
        return {
            name: lambda: compute(problem, coefficient, needs_grad),
            f"{name} in less memory": lambda: compute(smaller(problem), coefficient, needs_grad),
        }

    through_aten = ways("the loss with its gradients", functools.partial(_in_blocks, _aten_blocks))
    if stored.supported(problem):
        in_triton = ways("the loss over stored logits", functools.partial(_in_blocks, _stored_blocks))
    elif cuda_loss.supported(problem):
        in_triton = ways("the Triton loss with its gradients", cuda_loss.exact)
        if cuda_loss.may_skip(problem, needs_grad):
            sparse = ways("the sparse loss with its gradients", cuda_loss.approximate, for_approximate_loss(given))
            in_triton = sparse | in_triton
    else:
        return first_that_runs("scaled_loss", through_aten)
    return first_that_runs(cuda.kind(problem), in_triton | through_aten)


def _in_blocks(
    blocks_of: Callable[[Problem, Tensor], _Blocks], problem: Problem, coefficient: Tensor, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert problem.target is not None
    (cuda.assert_targets if problem.hidden.is_cuda else cpu.check_targets)(problem)
    counted = counted_rows(problem)
    if counted is not None:
        part = with_rows(problem, counted)
        loss, few, grad_weight, grad_bias = _in_blocks(blocks_of, part, coefficient[counted], needs_grad)
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
    blocks = blocks_of(problem, gradients.weight)
    fill = blocks.gradient_of(lse, grads)
    for rows in spans(problem.num_rows, max(1, blocks.group_rows)):
        results = blocks.reduce(rows)
        lse[rows] = results.lse
        losses[rows] = results.lse - results.picked + results.lse_rest
        # exp(x - lse - lse_rest) without a pass over x
        grad_lse[rows] = coefficient[rows] * torch.exp(-results.lse_rest)
        add_rows(problem, gradients, rows, blocks.workspace, fill)
    loss = torch.where(counts, coefficient * losses, 0.0).sum()
    return loss, *gradients.results(problem)


def _aten_blocks(problem: Problem, grad_weight: Tensor) -> _Blocks:
    """Logits that are kept, those that are worked on and their gradient are in three places."""
    fused = cpu_fused.supported(problem)
    way, share = (cpu_fused, FUSED_LOGITS_SHARE) if fused else (cpu, LOGITS_SHARE)
    workspace_bytes = min(problem.workspace_bytes, problem.logits_bytes // share)
    if problem.hidden.is_cuda:
        group_rows = gpu_group_rows(problem, workspace_bytes, grad_weight.numel() > 0)
    else:
        group_rows = problem.num_rows if fused else _group_rows(problem, workspace_bytes)
    shape = cpu.block_shape(problem, group_rows, way.BLOCK_ROWS)
    room = grad_weight if group_rows == problem.num_rows else grad_weight[:0]
    kept = KeptLogits.within(problem, group_rows, shape[1], workspace_bytes, room)
    scratch = cpu.Scratch(problem, *shape)
    return _Blocks(
        group_rows,
        workspace=problem.hidden.new_empty(shape),
        reduce=lambda rows: way.reduce_rows(problem, rows, *shape, kept, scratch),
        gradient_of=lambda lse, grads: way.gradient_of(problem, lse, grads, kept, scratch),
    )


def _stored_blocks(problem: Problem, grad_weight: Tensor) -> _Blocks:
    """One place for the logits of a group, which become their gradient; else for slices of those of all rows."""
    most = max(problem.logits_bytes // GPU_LOGITS_SHARE, SMALL)
    problem = replace(problem, workspace_bytes=min(problem.workspace_bytes, most))
    group_rows = gpu_group_rows(problem, problem.workspace_bytes, grad_weight.numel() > 0)
    at_hand = group_rows <= _rows_that_fit(problem, problem.workspace_bytes)
    if at_hand:
        shape = group_rows, -(-problem.vocab_size // stored.ALIGNMENT) * stored.ALIGNMENT
        kept = KeptLogits()
    else:
        shape = cuda.block_shape(problem)
        kept = KeptLogits.within(problem, group_rows, shape[1], 0, grad_weight)
    workspace = problem.hidden.new_empty(shape)
    return _Blocks(
        group_rows,
        workspace,
        reduce=lambda rows: stored.reduce_rows(problem, rows, workspace, kept),
        gradient_of=lambda lse, grads: stored.gradient_of(problem, lse, grads, kept, at_hand),
    )


def _rows_that_fit(problem: Problem, workspace_bytes: int) -> int:
    """Of how many rows there is room for the logits."""
    return workspace_bytes // max(1, problem.vocab_size * problem.compute_dtype.itemsize)


def _group_rows(problem: Problem, workspace_bytes: int) -> int:
    """How many rows are taken at a time: all of them, or a block of as many as have room for their logits."""
    rows = min(cpu.BLOCK_ROWS, _rows_that_fit(problem, workspace_bytes))
    if problem.weight.dtype != problem.accumulate_dtype or rows < FEWEST_ROWS or rows >= problem.num_rows:
        return problem.num_rows
    return _evenly(problem.num_rows, rows)


def gpu_group_rows(problem: Problem, workspace_bytes: int, needs_grad_weight: bool) -> int:
    """The same on a GPU: groups if they cost less than the logits for which the weight's gradient has no room."""
    rows = min(cpu.GPU_BLOCK_ROWS, _rows_that_fit(problem, workspace_bytes))
    if problem.weight.dtype != problem.accumulate_dtype or not 1 <= rows < problem.num_rows:
        return problem.num_rows
    computed_again = problem.num_rows - (problem.width if needs_grad_weight else 0)  # rows' worth of logits
    groups = -(-problem.num_rows // rows)
    if (groups - 1) * GPU_GROUP_ROWS >= computed_again:
        return problem.num_rows
    evenly = _evenly(problem.num_rows, rows)
    whole_tiles = -(-evenly // GPU_TILE_ROWS) * GPU_TILE_ROWS
    return whole_tiles if whole_tiles <= rows else evenly


def _evenly(num_rows: int, most: int) -> int:
    """How many rows each of as few groups as possible has."""
    groups = -(-num_rows // most)
    return -(-num_rows // groups)
