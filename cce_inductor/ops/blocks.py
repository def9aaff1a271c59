"""The exact backward over blocks of the logits: a vocabulary slice at a time, every output owned and written once.

    dx[n, v] = exp(x[n, v] - lse[n]) * g_lse[n] + [v == target[n]] * g_picked[n] + total_weight[v] * g_total[n]
    dz = dx * f'(z)
    grad_hidden = dz @ weight        grad_weight = dz.T @ hidden        grad_bias = sum over n of dz

One block of dz is held in a bounded workspace. How a block of dz is computed is the only thing that differs
between devices; `fill` is given by the implementation. Sums over blocks are kept in float32, so no rounding
grows with their number, and blocks are visited in a fixed order, so the bits are the same every run.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .problem import Problem, spans

Fill = Callable[[slice, slice, Tensor], None]
"""fill(rows, columns, out): writes the block of dz into out [rows, columns]."""


def exact_backward(
    problem: Problem, needs_grad: list[bool], block_rows: int, block_columns: int, fill: Fill
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_hidden, grad_weight, grad_bias), each in its input's dtype; empty where not needed."""
    needs_hidden, needs_weight, needs_bias = needs_grad
    empty = problem.hidden.new_empty(0)
    accumulate = {"dtype": problem.accumulate_dtype, "device": problem.hidden.device}
    grad_hidden = torch.zeros(problem.hidden.shape, **accumulate) if needs_hidden else empty
    grad_weight = (
        torch.zeros_like(problem.weight, memory_format=torch.contiguous_format) if needs_weight else empty
    )
    grad_bias = torch.zeros(problem.vocab_size, **accumulate) if needs_bias else empty
    workspace = torch.empty(
        block_rows, block_columns, dtype=problem.compute_dtype, device=problem.hidden.device
    )
    row_blocks = list(spans(problem.num_rows, block_rows))

    for columns in spans(problem.vocab_size, block_columns):
        weight = problem.weight_rows(columns)
        slice_grad = (
            _slice_accumulator(grad_weight[columns], len(row_blocks), accumulate) if needs_weight else empty
        )
        for rows in row_blocks:
            dz = workspace[: rows.stop - rows.start, : columns.stop - columns.start]
            fill(rows, columns, dz)
            if needs_hidden:
                add_matmul(grad_hidden[rows], dz, weight, first=columns.start == 0)
            if needs_weight:
                add_matmul(slice_grad, dz.T, problem.hidden_rows(rows), first=rows.start == 0)
            if needs_bias:
                grad_bias[columns] += dz.sum(0, dtype=problem.accumulate_dtype)
        if needs_weight and len(row_blocks) > 1:
            grad_weight[columns] = slice_grad
    return (
        grad_hidden.to(problem.hidden.dtype),
        grad_weight,
        grad_bias.to(problem.bias.dtype) if problem.bias is not None else empty,
    )


def _slice_accumulator(grad: Tensor, num_row_blocks: int, accumulate: dict) -> Tensor:
    """Where the weight gradient of a slice is summed: its final place where one product completes it."""
    return grad if num_row_blocks <= 1 else torch.zeros(grad.shape, **accumulate)


def add_matmul(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out += a @ b (out = a @ b where first), with float32 accumulation; out may be wider than the operands."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=0 if first else 1, out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, beta=0 if first else 1, out_dtype=out.dtype, out=out)
    elif first:
        out.copy_(a @ b)
    else:
        out.add_(a @ b)
