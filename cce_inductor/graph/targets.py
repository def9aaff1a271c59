"""Rules for class indices that take the shape of the logits: broadcast to it, or written as one-hot rows.

    sum over v of q[n, v] * x[n, v] = (on - off) * x[n, target[n]] + off * sum over v of x[n, v]

where q is `on` at the target and `off` elsewhere. Such tensors are as large as the logits, and go with them.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import sympy
from torch.fx import Node

from ..compat import statically_equal
from .effects import never_written_after
from .logits import DeferredLogits, Refused, Shaped
from .one_hot import OneHot, one_hot_rows
from .reductions import Reduction, Results, Vector, gather, in_rows, log_probability, require_vocab, total_of
from .registry import Call, rule, tensor_of
from .softmax import Probabilities, Scaled, times


@dataclass(frozen=True)
class Widened:
    """Class indices [..., 1] broadcast along the vocabulary, or some of these equal columns."""

    index: Node
    kind: ClassVar = "widened"


@dataclass(frozen=True)
class Weighted:
    """q times logits, a multiple of their log-probabilities, or probabilities."""

    of: DeferredLogits | Scaled | Probabilities
    logits: DeferredLogits
    weights: OneHot
    factor: float
    kind: ClassVar = "weighted"


@rule("broadcast_tensors")
def broadcast_tensors(call: Call, *tensors: Any) -> tuple:
    """Of logits and one class index a row, as `Categorical.log_prob` does before it gathers."""
    widened = []
    for tensor, output in zip(tensors, call.output, strict=True):
        shape = (
            tensor.shape if isinstance(tensor, DeferredLogits) else (*tensor_of(tensor).shape[:-1], output.shape[-1])
        )
        if not _same(shape, output.shape):
            raise Refused("the logits are broadcast against a larger tensor")
        widened.append(tensor if isinstance(tensor, DeferredLogits) else Widened(tensor))
    return tuple(widened)


@rule("widened.getitem")
def getitem(call: Call, x: Widened, index: Any) -> Widened:
    """The first of the equal columns."""
    if index != (Ellipsis, slice(None, 1, None)):
        raise Refused("class indices that are broadcast with the logits are indexed; index them before")
    return x


@rule("widened.gather")
def gather_by_widened(call: Call, input: DeferredLogits, *args: Any, **kwargs: Any) -> Reduction:
    def narrow(value: Any, node: Any) -> Any:
        if not isinstance(value, Widened):
            return value
        if not _same(tensor_of(node).shape, tensor_of(value.index).shape) or not never_written_after(node, value.index):
            raise Refused("the logits are gathered by class indices that are broadcast with them; gather before")
        return value.index

    args = tuple(map(narrow, args, call.node.args[1:]))
    return gather(call, input, *args, **{key: narrow(value, call.node.kwargs[key]) for key, value in kwargs.items()})


def _same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(statically_equal, a, b))


@rule("zeros_like", "full_like")
def shaped(call: Call, *_: Any, **__: Any) -> Shaped:
    return Shaped()


@rule(
    *(f"shaped.{name}" for name in ("scatter", "fill", "add", "sub", "neg", "div", "float", "to", "type_as", "detach"))
)
def still_shaped(call: Call, *_: Any, **__: Any) -> Shaped:
    if any(not isinstance(call.values.get(node, Shaped()), Shaped) for node in call.node.all_input_nodes):
        raise Refused("the logits are combined with a tensor made in their shape, so they are needed in memory")
    return Shaped()


@rule("shaped.mul")
def times_logits(call: Call, a: Any, b: Any) -> Any:
    x, weights = (b, call.node.args[0]) if isinstance(a, Shaped) else (a, call.node.args[1])
    if isinstance(x, int | float):
        return Shaped()
    product = weighted(call, x, weights)
    if product is None:
        raise Refused("the logits are multiplied by a tensor in their shape that is no one-hot of class indices")
    return product


@rule("scaled.mul", "softmax.mul")
def function_times(call: Call, a: Any, b: Any) -> Any:
    x, other, weights = (a, b, 1) if isinstance(a, Scaled | Probabilities) else (b, a, 0)
    product = weighted(call, x, call.node.args[weights]) if isinstance(other, Node | Shaped) else None
    return times(call, a, b) if product is None else product


def weighted(call: Call, x: Any, weights: Any) -> Weighted | None:
    """The product of logits, or a function of them, and one-hot rows; None where a tensor is something else."""
    log = x.log if isinstance(x, Scaled | Probabilities) else x
    tensor = tensor_of(weights)
    if tensor is None or not isinstance(log, DeferredLogits) or log.vocab_dim != log.ndim - 1:
        return None
    one_hot = one_hot_rows(weights, call.node) if _same(tensor.shape, log.shape) else None
    if one_hot is None:
        return None
    if log.logit_map.expr.has(-sympy.oo) and not isinstance(x, Probabilities):
        raise Refused("0 * -inf, of classes that are masked with -inf, is nan; mask with a large negative number")
    return Weighted(x, log, one_hot, 1.0 if x is log else x.factor)


@rule("weighted.neg")
def neg(call: Call, x: Weighted) -> Weighted:
    return replace(x, factor=-x.factor)


@rule("weighted.mul")
def times_number(call: Call, a: Any, b: Any) -> Weighted:
    x, number = (a, b) if isinstance(a, Weighted) else (b, a)
    if not isinstance(number, int | float):
        raise Refused("logits times a one-hot are multiplied by a tensor; sum them over the vocabulary before")
    return replace(x, factor=x.factor * number)


@rule("weighted.sum")
def weighted_sum(call: Call, x: Weighted, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Reduction:
    """Over the vocabulary, or over everything."""
    logits, off = x.logits, x.weights.off
    contrast = x.weights.on - off
    if dim is not None:
        require_vocab(logits, dim)
    probabilities = isinstance(x.of, Probabilities)
    needs_total = off != 0 and not probabilities
    if needs_total and not isinstance(logits.vocab_size, int):
        raise Refused("label smoothing needs a vocabulary of a constant size")

    def build(results: Results) -> Vector:
        picked = log_probability(logits, results)
        value = contrast * (picked.exp() if probabilities else picked)
        if needs_total:
            value = value + off * total_of(logits, results)
        elif off != 0:
            value = value + off
        value = x.factor * value
        return value.sum() if dim is None else in_rows(logits, value, results, keepdim)

    return Reduction(call.node, logits, build, x.weights.target, want_total=needs_total, is_loss=logits.normalized)
