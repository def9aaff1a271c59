"""A loss and its gradients at once, on a GPU: the logits that have room are not computed a second time.

    loss = sum over n of coefficient[n] * (lse[n] - picked[n])

`kept_tiles.py` says which have, and where. `sparse.py` is what computes approximate gradients.
"""

import torch
from torch import Tensor

from ..kernels.config import product_config, tile_config
from . import cuda, sparse
from .blocks import Gradients, add_rows
from .kept_tiles import KeptTiles
from .launch import device_properties
from .problem import Problem, Reductions, RowGradients
from .sparse_rounds import room_for_codes


def supported(problem: Problem) -> bool:
    """Whether this covers the problem: one on a GPU whose products have operands of 16 bits, as what is kept has."""
    return problem.hidden.is_cuda and cuda.supported(problem) and problem.compute_dtype.itemsize == 2


def may_skip(problem: Problem, needs_grad: list[bool]) -> bool:
    """Whether gradients may be approximate, and are worth a sparse backward."""
    return supported(problem) and cuda.may_skip(problem) and sparse.worthwhile(problem, needs_grad)


def exact(problem: Problem, coefficient: Tensor, needs_grad: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, grad_hidden, grad_weight, grad_bias) for one target a row; gradients are empty where not needed."""
    assert problem.target is not None
    gradients = Gradients.allocate(problem, needs_grad)
    workspace = problem.hidden.new_empty(cuda.block_shape(problem))
    kept = KeptTiles()
    if problem.logit_map.is_smooth:  # a rounded logit may be on the other side of a kink
        kept = KeptTiles.within(problem, cuda.forward_config(problem).block_v, workspace, gradients.weight)
    results = cuda.reduce(problem, kept)
    loss, grads = _loss_and_row_gradients(problem, results, coefficient)
    fill = cuda.gradient_of(problem, results.lse, grads, kept)
    add_rows(problem, gradients, slice(0, problem.num_rows), workspace, fill)
    return loss, *gradients.results(problem)


def approximate(problem: Problem, coefficient: Tensor, needs_grad: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with a sparse backward."""
    grad_weight = problem.weight.new_empty(problem.weight.shape if needs_grad[1] else 0)
    kept = KeptTiles()
    if sparse.keeps_codes(problem):
        capability, processors = device_properties(problem.hidden.device)
        config = tile_config(capability, backward=True)
        room_bytes = room_for_codes(problem, config, product_config(capability), processors)
        kept = KeptTiles.coded(problem, config.block_v, room_bytes, grad_weight)
    results = cuda.reduce(problem, kept)
    loss, grads = _loss_and_row_gradients(problem, results, coefficient)
    return loss, *sparse.backward(problem, results.lse, results.tiles, grads, needs_grad, kept, grad_weight)


def _loss_and_row_gradients(problem: Problem, results: Reductions, coefficient: Tensor) -> tuple[Tensor, RowGradients]:
    losses = coefficient * (results.lse - results.picked)
    if (counts := problem.counts) is not None:
        coefficient, losses = (torch.where(counts, vector, 0.0) for vector in (coefficient, losses))
    zeros = torch.zeros_like(coefficient)
    return losses.sum(), RowGradients(coefficient, -coefficient, zeros, target_logit=results.picked)
