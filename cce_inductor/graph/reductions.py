"""Rules for what ends the logits: losses and other reductions over the vocabulary.

Each says what it needs of the operator (the log-sum-exp always, the target's logit, a total over the vocabulary, the
maximum, the entropy) and how its result follows from that, as arithmetic on vectors of length N.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..ops import losses
from .logits import DeferredLogits, Refused
from .registry import Call, operation, rule, tensor_of

Vector = Any  # a Proxy, used as the tensor that it stands for


@dataclass(frozen=True)
class Results:
    """What the operator gave, as proxies [N] of the graph, and the inputs of one reduction in the same row order.

    A reduction must give a tensor of its own: the program may write to it in place, others read the same results.
    """

    lse: Vector
    picked: Vector  # [N, K] for K classes of each row
    total: Vector
    maximum: Vector
    argmax: Vector
    entropy: Vector
    lse_rest: Vector
    target: Vector
    rows: Callable[[], Vector]  # a tensor of the shape of the logits' rows
    proxy: Callable[[Node], Vector]


@dataclass(frozen=True)
class WeightedSum:
    """A loss that is the sum over rows of a weight, known beforehand, times -log p of the target."""

    row_weights: Callable[[Vector, torch.dtype, Callable[[Node], Vector]], Vector]  # (target [N], dtype, proxy) -> [N]
    finish: Callable[[Vector, Vector], Vector]  # (sum, target [N]) -> loss


@dataclass(frozen=True)
class Reduction:
    """One operation of the program that reduces deferred logits over the vocabulary."""

    node: Node
    logits: DeferredLogits
    build: Callable[[Results], Vector]  # in the shape of the node, in the dtype of the operator's results
    target: Node | None = None  # one class for each row
    ignore_index: int | None = None
    want_total: bool = False
    total_weight: Node | None = None  # [V]
    want_max: bool = False
    want_entropy: bool = False
    is_loss: bool = True  # part of a loss by its form, not just some sum of the activations of a layer
    reads_ignored: bool = True  # whether rows whose target is ignore_index matter to it
    weighted_sum: "WeightedSum | None" = None  # the same, where it is one
    from_end: bool = False  # negative targets count from the end of the vocabulary, as in indexing
    several: bool = False  # the last dimension of the target holds several classes for each row

    @property
    def name(self) -> str:
        """The operation that the user wrote; what a pair consists of has the name of what gave the pair."""
        source = self.node.args[0] if operation(self.node) == "getitem" else self.node
        assert isinstance(source, Node)
        return operation(source)


@rule("log_softmax")
def log_softmax(
    call: Call, input: DeferredLogits, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> DeferredLogits:
    require_vocab(input, dim)
    return input.log_softmax().to(call.output.dtype)


@rule("cross_entropy")
def cross_entropy(
    call: Call,
    input: DeferredLogits,
    target: Node,
    weight: Node | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Reduction:
    if size_average is not None or reduce is not None:
        raise Refused("it uses the deprecated arguments size_average or reduce; use reduction=")
    input = _classes_in_place(input)
    _require_targets(input, target)
    if label_smoothing and not isinstance(input.vocab_size, int):
        raise Refused("label smoothing needs a vocabulary of a constant size")

    def build(results: Results) -> Vector:
        loss = losses.cross_entropy(
            results.lse,
            results.picked,
            results.total,
            results.target,
            input.vocab_size,
            weight=None if weight is None else results.proxy(weight),
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            lse_rest=results.lse_rest,
        )
        return loss.view_as(results.proxy(target)) if reduction == "none" else loss

    def row_weights(target: Vector, dtype: torch.dtype, proxy: Callable[[Node], Vector]) -> Vector:
        class_weight = None if weight is None else proxy(weight)
        return losses.row_weights(target, dtype, class_weight, reduction, ignore_index)

    def finish(loss: Vector, target: Vector) -> Vector:
        return losses.nan_without_rows(loss, target, ignore_index) if reduction == "mean" else loss

    smooth = label_smoothing > 0
    return Reduction(
        call.node,
        input,
        build,
        target,
        ignore_index,
        want_total=smooth,
        total_weight=weight if smooth else None,
        reads_ignored=False,
        weighted_sum=None if smooth or reduction == "none" else WeightedSum(row_weights, finish),
    )


@rule("nll_loss")
def nll_loss(
    call: Call,
    input: DeferredLogits,
    target: Node,
    weight: Node | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
) -> Reduction:
    if not input.normalized:
        raise Refused("it reads logits that are not log-probabilities; did you mean cross_entropy?")
    return cross_entropy(call, input, target, weight, size_average, ignore_index, reduce, reduction)


@rule("gather")
def gather(call: Call, input: DeferredLogits, *args: Any, sparse_grad: bool = False, **kwargs: Any) -> Reduction:
    dim, index = _gather_arguments(call.node, *args, **kwargs)
    shape = list(tensor_of(index).shape)
    picks = shape.pop(input.vocab_dim)
    if input.dim(dim) != input.vocab_dim or not input.has_rows(shape):
        raise Refused("it picks no classes of some rows, or along another dimension; gather along the vocabulary")
    several = not isinstance(picks, int) or picks != 1
    if several and input.vocab_dim != input.ndim - 1:
        raise Refused("it picks several classes along another dimension than the last; move the vocabulary last")
    return pick(call, input, index, several=several)


def pick(call: Call, input: DeferredLogits, index: Node, *, several: bool = False, from_end: bool = False) -> Reduction:
    """One class for each row, or several in the last dimension of the index, in the shape of the index."""

    def build(results: Results) -> Vector:
        return log_probability(input, results, several).view_as(results.proxy(index))

    return Reduction(call.node, input, build, index, several=several, is_loss=input.normalized, from_end=from_end)


def log_probability(x: DeferredLogits, results: Results, several: bool = False) -> Vector:
    """Of the target, [N] or [N, K]; its logit where no log-probabilities are asked for."""
    if not x.normalized:
        return results.picked.clone()
    lse, rest = (v.unsqueeze(-1) if several else v for v in (results.lse, results.lse_rest))
    return results.picked - lse - rest


def _gather_arguments(node: Node, *args: Any, **kwargs: Any) -> tuple[int, Node]:
    """(dim, index) of gather(input, dim, index) and take_along_dim(input, indices, dim)."""
    index = next((value for value in (*args, *kwargs.values()) if tensor_of(value) is not None), None)
    dim = next((value for value in (*args, *kwargs.values()) if isinstance(value, int)), None)
    if index is None or dim is None:
        raise Refused("it picks classes along no dimension, or by no tensor")
    return dim, index


@rule("logsumexp")
def logsumexp(call: Call, input: DeferredLogits, dim: Any, keepdim: bool = False) -> Reduction:
    require_vocab(input, dim)
    if input.normalized:
        raise Refused("it reads log-probabilities, whose logsumexp is zero")
    return Reduction(call.node, input, lambda results: in_rows(input, results.lse.clone(), results, keepdim))


@rule("sum", "mean")
def total(call: Call, input: DeferredLogits, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Reduction:
    """The sum or mean over the vocabulary, of logits or of log-probabilities (label smoothing by hand)."""
    require_vocab(input, dim)
    if not isinstance(input.vocab_size, int):
        raise Refused("a sum over the vocabulary needs a vocabulary of a constant size")
    divisor = input.vocab_size if operation(call.node) == "mean" else 1

    def build(results: Results) -> Vector:
        return in_rows(input, total_of(input, results) / divisor, results, keepdim)

    return Reduction(call.node, input, build, want_total=True, is_loss=input.normalized)


def total_of(x: DeferredLogits, results: Results) -> Vector:
    """The sum over the vocabulary, whose size is constant, of logits or of log-probabilities."""
    return results.total - x.vocab_size * results.lse if x.normalized else results.total


def in_rows(x: DeferredLogits, value: Vector, results: Results, keepdim: bool) -> Vector:
    value = value.view_as(results.rows())
    return value.unsqueeze(x.vocab_dim) if keepdim else value


def require_vocab(x: DeferredLogits, dim: Any) -> None:
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    if len(dims) != 1 or not isinstance(dims[0], int) or x.dim(dims[0]) != x.vocab_dim:
        raise Refused("it reduces another dimension than the vocabulary")


def _classes_in_place(x: DeferredLogits) -> DeferredLogits:
    """Logits whose class dimension is the vocabulary; of their transpose the rows are the classes."""
    return x if x.vocab_dim == min(1, x.ndim - 1) else x.swapped()


def _require_targets(x: DeferredLogits, target: Any) -> None:
    tensor = tensor_of(target)
    if tensor is None or tensor.dtype.is_floating_point:
        raise Refused("its targets are probabilities; only class indices are supported")
    if tensor.dtype not in (torch.int64, torch.uint8) or not x.has_rows(tensor.shape):
        raise Refused(f"its targets have dtype {tensor.dtype} or another shape than the rows of the logits")
