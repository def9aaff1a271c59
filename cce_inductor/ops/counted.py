"""On a CPU, rows that nobody reads are taken out of the operands. A GPU would have to be waited for to know them."""

from dataclasses import replace

import torch
from torch import Tensor

from .problem import Problem


def counted_rows(problem: Problem) -> Tensor | None:
    """The rows that count [M], int64; None where all of them are computed."""
    if problem.hidden.is_cuda or problem.counts is None:
        return None
    rows = problem.counts.nonzero().squeeze(1)
    return rows if len(rows) < problem.num_rows else None


def with_rows(problem: Problem, rows: Tensor) -> Problem:
    """The problem of some rows, all of which count."""
    target = None if problem.target is None else problem.target[rows]
    return replace(problem, hidden=problem.hidden[rows], target=target, skip_ignored=False)


def spread(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """The values [M, ...] of some rows in their places among all rows [N, ...]; zero elsewhere."""
    return torch.zeros(num_rows, *values.shape[1:], dtype=values.dtype).index_copy_(0, rows, values)
