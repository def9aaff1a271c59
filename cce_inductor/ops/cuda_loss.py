"""A loss and its gradients at once, on a GPU: the logits that have room are not computed a second time.

    loss = sum over n of coefficient[n] * (lse[n] - picked[n])

`kept_tiles.py` says which have, and where.
"""

import torch
from torch import Tensor

from . import cuda
from .blocks import Gradients, add_rows
from .kept_tiles import KeptTiles
from .problem import Problem, RowGradients


def supported(problem: Problem) -> bool:
    """Whether this covers the problem: one on a GPU whose products have operands of 16 bits, as what is kept has."""
    return problem.hidden.is_cuda and cuda.supported(problem) and problem.compute_dtype.itemsize == 2


def loss_and_gradients(
    problem: Problem, coefficient: Tensor, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, grad_hidden, grad_weight, grad_bias) for one target a row; gradients are empty where not needed."""
    assert problem.target is not None
    gradients = Gradients.allocate(problem, needs_grad)
    workspace = problem.hidden.new_empty(cuda.block_shape(problem))
    kept = KeptTiles()
    if problem.logit_map.is_smooth:  # a rounded logit may be on the other side of a kink
        kept = KeptTiles.within(problem, cuda.forward_config(problem).block_v, workspace, gradients.weight)
    results = cuda.reduce(problem, kept)
    losses = coefficient * (results.lse - results.picked)
    if problem.counts is not None:
        coefficient, losses = (torch.where(problem.counts, vector, 0.0) for vector in (coefficient, losses))
    grads = RowGradients(coefficient, -coefficient, torch.zeros_like(coefficient))
    fill = cuda.gradient_of(problem, results.lse, grads, kept)
    add_rows(problem, gradients, slice(0, problem.num_rows), workspace, fill)
    return losses.sum(), *gradients.results(problem)
