"""What a block of logits needs beside its products, in one pass each way: on a CPU in bfloat16, for `scaled_loss`.

    shift[n]  = the largest x[n, v],  sum[n] = sum over v of exp(x[n, v] - shift[n])
    dz[n, v]  = exp(x[n, v] - lse[n]) * grad_lse[n] * f'(z[n, v])          x = f(z), z = product + bias

Where products are fast, ten passes of ATen over a block in float32 take longer than they do. Inductor makes one loop of
each of the two functions, from products in 16 bits to dz in 16 bits, once for each logit map. Targets, one a row, are
put in afterwards. Where nothing can be compiled the same functions run as they are.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from .. import compat
from ..logit_map import LogitMap
from .blocks import Fill
from .combine import log_sum
from .cpu import Scratch, in_block, product_of
from .fallback import warn_once
from .kept import KeptLogits
from .problem import Problem, Reductions, RowGradients, spans

BLOCK_ROWS = 2048  # more than elsewhere, as no block is in memory in float32: one product makes a slice of dC
LEAST_FLOPS = 10**10  # of the logits; below, compiling takes too long for what it saves


def supported(problem: Problem) -> bool:
    """Whether this covers the problem, and is worth it. Of a float32 weight rows are taken in groups instead."""
    flops = 2 * problem.num_rows * problem.vocab_size * problem.width
    dtypes = {problem.compute_dtype, problem.weight.dtype}
    return not problem.hidden.is_cuda and dtypes == {torch.bfloat16} and flops >= LEAST_FLOPS


@functools.lru_cache(maxsize=256)
def _functions(logit_map: LogitMap, has_bias: bool) -> tuple[Callable, Callable]:
    """(sums, gradient), compiled where that is possible."""

    def preactivations(product: Tensor, bias: tuple[Tensor, ...]) -> Tensor:
        return sum(bias, product.float())

    def sums(product: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        x = logit_map(preactivations(product, bias))
        peak = x.amax(1)
        shift = torch.where(peak == -torch.inf, 0.0, peak)
        return shift, (x - shift.unsqueeze(1)).exp().sum(1)

    def gradient(product: Tensor, lse: Tensor, grad_lse: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor | None]:
        x, slope = logit_map.value_and_derivative(preactivations(product, bias))
        dx = (x - lse.unsqueeze(1)).exp() * grad_lse.unsqueeze(1)
        dx = dx if slope is None else dx * slope
        return dx.to(product.dtype), dx.sum(0) if bias else None

    rows, columns = 6, 10  # any
    product, bias = torch.zeros(rows, columns, dtype=torch.bfloat16), [torch.zeros(columns)] * has_bias
    lse, grad_lse = torch.zeros(rows), torch.zeros(rows)
    return _compiled(sums, product, *bias), _compiled(gradient, product, lse, grad_lse, *bias)


def _compiled(function: Callable, *example: Tensor) -> Callable:
    """The function, compiled when it is first called. Where that fails, for want of a compiler, it runs as it is."""
    graph = make_fx(function, tracing_mode="symbolic")(*example)
    compiled = compat.compiled_alone(graph)

    def run(*arguments: Tensor) -> Any:
        try:
            return compiled(*arguments)
        except Exception as error:
            warn_once("a compiled pass over logits", error)
            return function(*arguments)

    return run


def reduce_rows(
    problem: Problem, group: slice, block_rows: int, block_columns: int, kept: KeptLogits, scratch: Scratch
) -> Reductions:
    """lse and picked of a group, which is all rows; the products go where `kept` has room for them."""
    sums, _ = _functions(problem.logit_map, problem.bias is not None)
    slices, rows = list(spans(problem.vocab_size, block_columns)), group.stop
    picked, slice_shift, slice_sum = (problem.zeros(*shape) for shape in ((rows,), *[(len(slices), rows)] * 2))
    for number, columns in enumerate(slices):
        weight = problem.weight_rows(columns)
        for here in spans(rows, block_rows):
            product = product_of(problem, here, weight, kept.block(here, columns), again=False, scratch=scratch)
            slice_shift[number, here], slice_sum[number, here] = sums(product, *_bias(problem, columns))
            at_target = _Targets.of(problem, here, columns, product)
            picked[here] += torch.where(at_target.inside, problem.logit_map(at_target.z), 0.0).squeeze(1)
    lse, lse_rest = log_sum(slice_shift, slice_sum)
    nothing, none = problem.zeros(0), problem.tiles(0)
    return Reductions(lse, picked, nothing, nothing, nothing.long(), nothing, lse_rest, none.lse, none.tops)


def gradient_of(problem: Problem, lse: Tensor, grads: RowGradients, kept: KeptLogits, scratch: Scratch) -> Fill:
    """Computes blocks of dz for the gradients of lse and picked: from kept products, or anew."""
    _, gradient = _functions(problem.logit_map, problem.bias is not None)

    def fill(rows: slice, columns: slice, weight: Tensor, dz: Tensor, grad_bias: Tensor | None) -> None:
        product = product_of(problem, rows, weight, kept.block(rows, columns), again=True, scratch=scratch)
        block, sums = gradient(product, lse[rows], grads.lse[rows], *_bias(problem, columns))
        dz.copy_(block)
        at_target = _Targets.of(problem, rows, columns, product)
        x, slope = problem.logit_map.value_and_derivative(at_target.z)
        log_p, scale = x - lse[rows].unsqueeze(1), grads.lse[rows].unsqueeze(1)
        # a certain row's p * scale + grad_picked is nothing but what p lacks of 1, which rounding takes from p
        right = log_p.expm1().mul_(scale).add_(scale + grads.picked[rows].unsqueeze(1))
        right = right if slope is None else right.mul_(slope)
        otherwise = dz.gather(1, at_target.column)
        dz.scatter_(1, at_target.column, torch.where(at_target.inside, right.to(dz.dtype), otherwise))
        if grad_bias is not None:
            there = log_p.exp_().mul_(scale)  # what the sums have at the targets
            there = there if slope is None else there.mul_(slope)
            missing = torch.where(at_target.inside, right - there, 0.0)
            grad_bias += sums.index_add_(0, at_target.column.squeeze(1), missing.squeeze(1))

    return fill


class _Targets(NamedTuple):
    """The targets of some rows in a block of the logits."""

    column: Tensor  # [rows, 1], of the block
    inside: Tensor  # [rows, 1], bool: whether the target lies in the block and counts
    z: Tensor  # [rows, 1], the products there, with the bias

    @classmethod
    def of(cls, problem: Problem, rows: slice, columns: slice, product: Tensor) -> "_Targets":
        assert problem.target is not None
        index, inside = in_block(problem.target[rows], columns, problem.ignore_index)
        z = product.gather(1, index).to(problem.accumulate_dtype)
        return cls(index, inside, z if problem.bias is None else z + problem.bias[columns][index])


def _bias(problem: Problem, columns: slice) -> list[Tensor]:
    return [] if problem.bias is None else [problem.bias[columns].to(problem.accumulate_dtype)]
