"""The exact backward over blocks of the logits: a vocabulary slice at a time, every output owned and written once.

    dx[n, v] = p[n, v] * g_lse[n] + [v == target[n]] * g_picked[n] + total_weight[v] * g_total[n]
               + [v == argmax[n]] * g_maximum[n] - p[n, v] * (log p[n, v] + entropy[n]) * g_entropy[n]
    p[n, v] = exp(x[n, v] - lse[n])
    dz = dx * f'(z)
    grad_hidden = dz @ weight        grad_weight = dz.T @ hidden        grad_bias = sum over n of dz

One block of dz is held in a bounded workspace. How a block of dz is computed is the only thing that differs
between devices; `fill` is given by the implementation. Sums over blocks are kept in float32, so no rounding
grows with their number, and blocks are visited in a fixed order, so the bits are the same every run.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Problem, spans

ALIGNMENT = 8  # matmuls in 16 bits and TF32 are up to six times slower where the vocabulary's side is no multiple

Fill = Callable[[slice, slice, Tensor, Tensor, Tensor | None], None]
"""fill(rows, columns, weight, dz, grad_bias): writes the block of dz [rows, columns], `weight` holding its columns,
and adds its sum over rows, taken before dz is rounded, to grad_bias [columns] unless that is None."""


@dataclass
class Gradients:
    """The sums of hidden's, weight's and bias's gradient; empty where no gradient is needed."""

    hidden: Tensor  # [N, D], in the dtype of sums
    weight: Tensor  # [V, D], in its own dtype
    bias: Tensor  # [V], in the dtype of sums

    @classmethod
    def allocate(cls, problem: Problem, needs_grad: list[bool]) -> "Gradients":
        """Room for the sums, not yet written to but for the bias."""
        needs_hidden, needs_weight, needs_bias = needs_grad
        hidden, weight = problem.hidden, problem.weight
        # with no row or no column nothing is ever written
        allocate = hidden.new_empty if min(hidden.shape[0], problem.vocab_size) > 0 else hidden.new_zeros
        return cls(
            hidden=allocate(hidden.shape if needs_hidden else 0, dtype=problem.accumulate_dtype),
            weight=allocate(weight.shape if needs_weight else 0, dtype=weight.dtype),
            bias=problem.zeros(problem.vocab_size if needs_bias else 0),
        )

    def results(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Each in its input's dtype."""
        bias_dtype = problem.hidden_dtype if problem.bias is None else problem.bias.dtype
        bias = self.bias if problem.weight_scale is None else self.bias * problem.weight_scale
        return self.hidden.to(problem.hidden_dtype), self.weight, bias.to(bias_dtype)


def exact_backward(
    problem: Problem, needs_grad: list[bool], block_rows: int, block_columns: int, fill: Fill
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_hidden, grad_weight, grad_bias), each in its input's dtype; empty where not needed."""
    gradients = Gradients.allocate(problem, needs_grad)
    add_rows(problem, gradients, slice(0, problem.num_rows), problem.hidden.new_empty(block_rows, block_columns), fill)
    return gradients.results(problem)


def add_rows(problem: Problem, gradients: Gradients, group: slice, workspace: Tensor, fill: Fill) -> None:
    """Adds what a group of rows gives; the first group begins the sums.

    All rows in one group, or groups of one block of rows each and a weight in the dtype of sums. The workspace has room
    for a block of dz [rows, columns].
    """
    hidden, sums = problem.scaled_hidden, problem.accumulate_dtype
    needs_hidden, needs_weight, needs_bias = (
        g.numel() > 0 for g in (gradients.hidden, gradients.weight, gradients.bias)
    )
    block_rows, block_columns = workspace.shape
    row_blocks = list(spans(group.stop, block_rows, group.start))
    # one product completes a slice of the weight's gradient: it goes to its place without a sum in between
    direct = len(row_blocks) == 1 and gradients.weight.dtype in (hidden.dtype, sums)
    factors = [_right_factor(hidden[rows]) if needs_weight else hidden for rows in row_blocks]

    for columns in spans(problem.vocab_size, block_columns):
        weight = problem.weight_rows(columns)
        width = weight.shape[0]
        parts = fast_parts(width)
        if needs_weight:
            slice_grad = gradients.weight[columns] if direct else hidden.new_empty(weight.shape, dtype=sums)
        for rows, factor in zip(row_blocks, factors, strict=True):
            dz = workspace[: rows.stop - rows.start, :width]
            fill(rows, columns, weight, dz, gradients.bias[columns] if needs_bias else None)
            for part in parts:
                if needs_hidden:
                    first = columns.start + part.start == 0
                    add_matmul(gradients.hidden[rows], dz[:, part], weight[part], first)
                if needs_weight:
                    add_matmul(slice_grad[part], dz.T[part], factor, first=rows.start == 0)
        if needs_weight and row_blocks and not direct:
            gradients.weight[columns] = slice_grad


def fast_parts(width: int) -> list[slice]:
    """The columns of a block, for two products: up to a multiple of `ALIGNMENT`, and the rest. None is empty."""
    aligned = width // ALIGNMENT * ALIGNMENT
    return [part for part in (slice(0, aligned), slice(aligned, width)) if part.start < part.stop]


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """out [N, C] = hidden @ weight.T, returned."""
    for part in fast_parts(weight.shape[0]):
        torch.mm(hidden, weight[part].T, out=out[:, part])
    return out


def _right_factor(hidden: Tensor) -> Tensor:
    """Hidden states for a product with dz.T, laid out for TF32 where their products round to it.

    Tensor cores take TF32 only along the inner side of a product. Where neither factor lies in memory like that, cuBLAS
    takes half as long again, for the same bits. Hidden states are small beside dz: laying them out anew costs little.
    """
    in_tf32 = hidden.is_cuda and hidden.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return column_by_column(hidden) if in_tf32 else hidden


def column_by_column(matrix: Tensor) -> Tensor:
    """The same matrix with its columns contiguous in memory, each beginning at a multiple of `ALIGNMENT`."""
    rows, columns = matrix.shape
    return matrix.new_empty(columns, -(-rows // ALIGNMENT) * ALIGNMENT)[:, :rows].copy_(matrix.T).T


def add_matmul(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out += a @ b (out = a @ b where first), with float32 accumulation; out may be wider than the operands."""
    if out.numel() == 0:
        return
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=0 if first else 1, out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, beta=0 if first else 1, out_dtype=out.dtype, out=out)
    elif first:
        out.copy_(a @ b)
    else:
        out.add_(a @ b)
