"""The operators on any device through ATen: blocks of logits sized for the cache, never all of them.

It serves the CPU, and on a GPU the dtypes that the Triton kernels don't cover (float64).
"""

import functools

import torch
from torch import Tensor

from .blocks import ALIGNMENT, Fill, exact_backward
from .combine import entropy_of, log_sum
from .counted import counted_rows, spread, with_rows
from .kept import KeptLogits
from .problem import LEAST_LOG, MIB, Problem, Reductions, RowGradients, Tiles, spans

BLOCK_ROWS = 1024
BLOCK_BYTES = 4 * MIB  # of one block of logits in float32: stays in a last-level cache while it is worked on
GPU_BLOCK_ROWS = 4096  # there the workspace bounds a block, and matmuls want more of everything


def block_shape(problem: Problem, most_rows: int | None = None, block_rows: int | None = None) -> tuple[int, int]:
    """(rows, columns) of a block: many rows, so that each slice of the weight is read a few times only."""
    if problem.hidden.is_cuda:
        rows, size = GPU_BLOCK_ROWS, problem.workspace_bytes
    else:
        rows, size = block_rows or BLOCK_ROWS, min(BLOCK_BYTES, problem.workspace_bytes)
    rows = max(1, min(problem.num_rows if most_rows is None else most_rows, rows))
    columns = size // problem.accumulate_dtype.itemsize // rows
    return rows, min(max(1, columns // ALIGNMENT) * ALIGNMENT, -(-problem.vocab_size // ALIGNMENT) * ALIGNMENT)


class Scratch:
    """Memory for a block of logits that all blocks use: a system takes as long to hand out pages as to fill them."""

    def __init__(self, problem: Problem, rows: int, columns: int) -> None:
        self._product = problem.hidden.new_empty(rows * columns)
        self._sums_dtype = problem.accumulate_dtype

    @functools.cached_property
    def _sums(self) -> Tensor:
        """Not before it is asked for: not every way has a block in memory in this dtype."""
        product = self._product
        return product if product.dtype == self._sums_dtype else torch.empty_like(product, dtype=self._sums_dtype)

    def product(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] in the dtype of the matmuls."""
        return self._product[: rows * columns].view(rows, columns)

    def sums(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] in the dtype of sums; the same memory, where the dtype is."""
        return self._sums[: rows * columns].view(rows, columns)


def _preactivations(
    problem: Problem, rows: slice, columns: slice, weight: Tensor, kept: Tensor | None, again: bool, scratch: Scratch
) -> Tensor:
    """z = hidden @ weight.T + bias of one block, in the dtype of the sums.

    kept: where the product goes the first time and is found again; it must not be written to.
    """
    product = product_of(problem, rows, weight, kept, again, scratch)
    z = product if product.dtype == problem.accumulate_dtype else scratch.sums(*product.shape).copy_(product)
    if problem.level is not None:
        z += problem.level[rows].unsqueeze(1)
    if problem.bias is not None:
        z = z + problem.bias[columns] if z is kept else z.add_(problem.bias[columns])
    return z


def product_of(
    problem: Problem, rows: slice, weight: Tensor, kept: Tensor | None, again: bool, scratch: Scratch
) -> Tensor:
    """hidden @ weight.T of one block, in the dtype of the matmuls; `kept` as above."""
    if again and kept is not None:
        return kept
    out = scratch.product(rows.stop - rows.start, len(weight)) if kept is None else kept
    hidden = problem.hidden[rows]
    if problem.level is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(problem.level[rows].unsqueeze(1), hidden, weight.T, beta=-1, out=out)


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


def in_block(index: Tensor, columns: slice, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """(index [rows, K] into the block's columns, whether [rows, K] it lies in them and counts), for K classes a row."""
    inside = (index >= columns.start) & (index < columns.stop)
    if ignore_index is not None:
        inside &= index != ignore_index
    return _as_columns(torch.where(inside, index - columns.start, 0)), _as_columns(inside)


def _as_columns(values: Tensor) -> Tensor:
    """[rows] as [rows, 1]; [rows, K] as it is."""
    return values.unsqueeze(1) if values.dim() == 1 else values


def forward(problem: Problem) -> Reductions:
    """With nothing recorded of tiles."""
    if not problem.hidden.is_cuda:
        check_targets(problem)
    counted = counted_rows(problem)
    if counted is not None:
        return _spread(problem, counted, forward(with_rows(problem, counted)))
    shape = block_shape(problem)
    return reduce_rows(problem, slice(0, problem.num_rows), *shape, KeptLogits(), Scratch(problem, *shape))


def _spread(problem: Problem, counted: Tensor, few: Reductions) -> Reductions:
    """The results of the rows that count in their places among all rows."""
    wanted = ["lse", "picked", "total", "lse_rest"]
    wanted += ["maximum", "argmax"] * problem.want_max + ["entropy"] * problem.want_entropy
    vectors = {name: spread(getattr(few, name), counted, problem.num_rows) for name in wanted}
    none = problem.tiles(0)
    return few._replace(**vectors, tile_lse=none.lse, tile_tops=none.tops)


def reduce_rows(
    problem: Problem,
    group: slice,
    block_rows: int,
    block_columns: int,
    kept: KeptLogits,
    scratch: Scratch,
    tile: int = 0,
) -> Reductions:
    """The reductions of a group of rows, from those of the vocabulary slices.

    tile: of how many columns each the log-sum-exps are kept (with all rows in one group, and no entropy), which divides
    block_columns; 0 for none.
    """
    slices = list(spans(problem.vocab_size, block_columns))
    row_count = group.stop - group.start
    picked = problem.zeros(row_count, *(() if problem.target is None else problem.target.shape[1:]))
    slice_peak, slice_sum, slice_total = (problem.zeros(len(slices), row_count) for _ in range(3))
    slice_spread = problem.zeros(len(slices) if problem.want_entropy else 0, row_count)
    maximum = problem.zeros(row_count if problem.want_max else 0).fill_(-torch.inf)
    argmax = torch.zeros_like(maximum, dtype=torch.int64)
    tile_lse = slice_sum.new_empty(-(-problem.vocab_size // tile) if tile else 0, row_count, dtype=torch.float32)
    for number, columns in enumerate(slices):
        weight = problem.weight_rows(columns)
        for rows in spans(group.stop, block_rows, group.start):
            here = slice(rows.start - group.start, rows.stop - group.start)
            place = kept.block(rows, columns)
            x = problem.logit_map(_preactivations(problem, rows, columns, weight, place, again=False, scratch=scratch))
            if problem.target is not None:
                index, inside = in_block(problem.target[rows], columns, problem.ignore_index)
                _as_columns(picked)[here] += torch.where(inside, x.gather(1, index), 0.0)
            if problem.want_total:
                slice_total[number, here] = _weighted_sum(problem, x, columns)
            if problem.want_max:
                _keep_larger(maximum[here], argmax[here], x, columns)
            spread = slice_spread[number, here] if problem.want_entropy else None
            difference = scratch.sums(*x.shape) if x is place else x
            slice_peak[number, here], slice_sum[number, here] = _sum_exp(x, difference, spread)
            if tile:
                sums = _tile_sums(difference, tile).log_().add_(slice_peak[number, here])
                tile_lse[columns.start // tile :, here][: len(sums)] = sums
    lse, lse_rest = log_sum(slice_peak, slice_sum)
    entropy = entropy_of(slice_peak, slice_sum, slice_spread) if problem.want_entropy else problem.zeros(0)
    tile_tops = problem.tiles(0).tops
    return Reductions(lse, picked, slice_total.sum(0), maximum, argmax, entropy, lse_rest, tile_lse, tile_tops)


def _keep_larger(maximum: Tensor, argmax: Tensor, x: Tensor, columns: slice) -> None:
    """Takes the largest logit of a block, and the first place that has it, where it is larger than those before it."""
    value, index = x.max(1)
    larger = (value > maximum) | (value.isnan() & ~maximum.isnan())  # nan counts as the largest, as in torch.max
    argmax.copy_(torch.where(larger, index + columns.start, argmax))
    maximum.copy_(torch.where(larger, value, maximum))


def _sum_exp(x: Tensor, difference: Tensor, spread: Tensor | None) -> tuple[Tensor, Tensor]:
    """(shift, sum over columns of exp(x - shift)), the shift the largest x or 0; the sum is nan where x has a nan or
    +inf. The difference is memory to be overwritten; it may be x itself. The spread, where it is wanted, becomes
    the sum over columns of exp(x - shift) * (x - shift)."""
    peak = x.amax(1, keepdim=True)
    shift = peak.masked_fill(peak == -torch.inf, 0.0)
    torch.sub(x, shift, out=difference)
    if spread is None:
        return shift.squeeze(1), difference.exp_().sum(1)
    exp = difference.exp()
    spread.copy_(difference.clamp_(min=LEAST_LOG).mul_(exp).sum(1))
    return shift.squeeze(1), exp.sum(1)


def _tile_sums(exp: Tensor, tile: int) -> Tensor:
    """[tiles, rows]: the sums of as many columns each, the last ones of those that are left."""
    whole = exp.shape[1] // tile * tile
    sums = exp[:, :whole].unflatten(1, (-1, tile)).sum(2)
    return sums.T if whole == exp.shape[1] else torch.cat([sums, exp[:, whole:].sum(1, keepdim=True)], 1).T


def _weighted_sum(problem: Problem, x: Tensor, columns: slice) -> Tensor:
    return x.sum(1) if problem.total_weight is None else x @ problem.total_weight[columns].to(x.dtype)


def backward(
    problem: Problem, lse: Tensor, tiles: Tiles, grads: RowGradients, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias for those of the results; always exact."""
    counted = counted_rows(problem)
    if counted is not None:
        part = with_rows(problem, counted)
        part_grads = grads.map(lambda vector: vector[counted] if len(vector) > 0 else vector)  # or nobody wants it
        few, grad_weight, grad_bias = backward(part, lse[counted], tiles, part_grads, needs_grad)
        return spread(few, counted, problem.num_rows) if needs_grad[0] else few, grad_weight, grad_bias
    shape = block_shape(problem)
    return exact_backward(
        problem, needs_grad, *shape, gradient_of(problem, lse, grads, KeptLogits(), Scratch(problem, *shape))
    )


def gradient_of(problem: Problem, lse: Tensor, grads: RowGradients, kept: KeptLogits, scratch: Scratch) -> Fill:
    """Computes blocks of dz for the gradients of the results: from kept logits, or anew."""
    grad_lse, grad_picked, grad_total = map(_as_columns, (grads.lse, grads.picked, grads.total))

    def fill(rows: slice, columns: slice, weight: Tensor, dz: Tensor, grad_bias: Tensor | None) -> None:
        z = _preactivations(problem, rows, columns, weight, kept.block(rows, columns), again=True, scratch=scratch)
        x, slope = problem.logit_map.value_and_derivative(z)
        spare = None if slope is not None else x  # of another dtype than dz, x is a copy; it and the slope may be one
        place = dz if dz.dtype == x.dtype else spare
        log_p = torch.sub(x, lse[rows].unsqueeze(1), out=place)
        scale = grad_lse[rows] if grads.entropy is None else _with_entropy(log_p, grads, rows)
        if problem.target is None:
            dx = log_p.exp_().mul_(scale)
        else:
            index, inside = in_block(problem.target[rows], columns, problem.ignore_index)
            log_picked = log_p.gather(1, index)
            dx = log_p.exp_().mul_(scale)
            _add_picked(dx, log_picked, scale, grad_picked[rows], index, inside)
        if grads.maximum is not None and grads.argmax is not None:
            index, inside = in_block(grads.argmax[rows], columns)
            dx.scatter_add_(1, index, torch.where(inside, grads.maximum[rows].unsqueeze(1), 0.0))
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


def _add_picked(
    dx: Tensor, log_picked: Tensor, scale: Tensor, grad_picked: Tensor, index: Tensor, inside: Tensor
) -> None:
    """Adds the gradients of picked logits to dx = p * scale, at the places `index` [rows, K] where `inside` holds.

    A certain row's p * scale + grad_picked is nothing but what p lacks of 1, which rounding takes from p.
    """
    if index.shape[1] > 1:  # of which several may be the same
        dx.scatter_add_(1, index, torch.where(inside, grad_picked, 0.0))
        return
    here = scale.expand_as(dx).gather(1, index)
    sums = log_picked.expm1_().mul_(here).add_(here + grad_picked)
    dx.scatter_(1, index, torch.where(inside, sums, dx.gather(1, index)))


def _with_entropy(log_p: Tensor, grads: RowGradients, rows: slice) -> Tensor:
    """What multiplies the probabilities p of a block in dx, as dH / dx = -p * (log p + H) of the entropy H."""
    assert grads.entropy is not None
    assert grads.row_entropy is not None
    grad_lse, grad_entropy, entropy = (
        vector[rows].unsqueeze(1) for vector in (grads.lse, grads.entropy, grads.row_entropy)
    )
    return grad_lse - grad_entropy * (log_p.clamp(min=LEAST_LOG) + entropy)
