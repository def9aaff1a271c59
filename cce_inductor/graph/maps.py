"""Rules for pointwise operations: they compose into one expression, a bias, or a scale of the hidden states."""

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from ..compat import CLAMP_IS_FLAT_AT_BOUNDS, float_hint
from ..logit_map import clamped, constant, gt, sigmoid
from ..logit_map import where as chosen
from .effects import writes_between
from .logits import DeferredLogits, Refused
from .matmuls import is_vocab_vector, vocab_vector
from .reductions import Reduction
from .registry import Call, operation, out_of_place, rule, tensor_of
from .softmax import Floored, Probabilities, Scaled
from .targets import Weighted, weighted


def with_dtype(call: Call, x: DeferredLogits) -> DeferredLogits:
    """Type promotion may have changed the dtype; a pointwise operation must not have changed the shape."""
    if tuple(call.output.shape) != x.shape:
        raise Refused("the logits are broadcast against a larger tensor")
    return x.to(call.output.dtype)


def number_of(value: Any) -> sympy.Expr | None:
    """A Python number of the program as a constant of the map; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return constant(value)
    except ValueError as error:
        raise Refused(str(error)) from error


def _fixed(x: DeferredLogits, value: Any) -> tuple[DeferredLogits, Any]:
    """A float that Dynamo took for an input, under dynamic=True, as the constant that it mostly is."""
    symbol = value.meta.get("example_value") if isinstance(value, Node) else None
    if not isinstance(symbol, torch.SymFloat):
        return x, value
    number = float_hint(symbol)
    return (x, value) if number is None else (x.assume(symbol), number)


def _is_scalar(value: Any) -> bool:
    """Whether an operand is a single number that the graph computes: a tensor of one element, a SymInt or SymFloat."""
    if not isinstance(value, Node):
        return False
    tensor = tensor_of(value)
    if tensor is None:
        return isinstance(value.meta.get("example_value"), torch.SymInt | torch.SymFloat)
    return all(isinstance(size, int) and size == 1 for size in tensor.shape) and not tensor.dtype.is_complex


def _logits_and_other(a: Any, b: Any) -> tuple[DeferredLogits, Any]:
    """The deferred operand of a commutative operation and the other one."""
    return (a, b) if isinstance(a, DeferredLogits) else (b, a)


@rule("mul")
def mul(call: Call, a: Any, b: Any) -> DeferredLogits | Scaled | Weighted:
    x, factor = _logits_and_other(a, b)
    if x.normalized and isinstance(factor, int | float):
        return Scaled(x, factor)
    product = weighted(call, x, factor)
    return with_dtype(call, _scaled(x, factor, operator.mul, torch.mul)) if product is None else product


@rule("div")
def div(call: Call, x: Any, divisor: Any, *, rounding_mode: None = None) -> DeferredLogits | Scaled:
    if rounding_mode is not None:
        raise Refused("the logits are divided with rounding, which has no gradient; divide without rounding_mode")
    if isinstance(x, DeferredLogits):
        if x.normalized and isinstance(divisor, int | float):
            return Scaled(x, 1 / divisor)
        return with_dtype(call, _scaled(x, divisor, operator.truediv, torch.div))
    number = number_of(x)
    if number is None:
        raise Refused("a tensor is divided by the logits; only a number can be")
    return with_dtype(call, divisor.map(lambda z: number / z))


def _scaled(x: DeferredLogits, factor: Any, on_expressions: Any, on_tensors: Any) -> DeferredLogits:
    if isinstance(factor, DeferredLogits):
        return x.combine(factor, on_expressions)
    if not x.is_scalable:
        x, factor = _fixed(x, factor)
    number = number_of(factor)
    if number is not None:
        return x.map(lambda z: on_expressions(z, number))
    if _is_scalar(factor):
        return x.scale(on_tensors, factor)
    tensor = tensor_of(factor)
    if tensor is not None and is_vocab_vector(tuple(tensor.shape), x.vocab_size):
        return x.scale_classes(on_tensors, vocab_vector(factor))
    raise Refused("the logits are scaled by a tensor that differs from row to row; scale the hidden states by it")


@rule("add")
def add(call: Call, a: Any, b: Any, *, alpha: Any = 1) -> DeferredLogits:
    if alpha != 1 and not isinstance(a, DeferredLogits):
        raise Refused("the logits are added with a factor (alpha); multiply them by it")
    x, term = _logits_and_other(a, b)
    return with_dtype(call, _added(call, x, term, alpha))


@rule("sub")
def sub(call: Call, a: Any, b: Any, *, alpha: Any = 1) -> DeferredLogits:
    if isinstance(a, DeferredLogits):
        if _is_log_sum_exp(call, a, b):
            return a.log_softmax().to(call.output.dtype)
        return with_dtype(call, _added(call, a, b, -alpha))
    if alpha != 1:
        raise Refused("the logits are subtracted with a factor (alpha); multiply them by it")
    return with_dtype(call, _added(call, b.map(operator.neg), a, 1))


_SHAPES_AND_CASTS = ("unsqueeze", "view", "reshape", "to", "float", "type_as")


def _keeps_rows(node: Node) -> bool:
    """Whether a node has the numbers of its first argument in the same order: in another shape or dtype at most."""
    if operation(node) != "getitem":
        return operation(node) in _SHAPES_AND_CASTS
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(part is None or part is Ellipsis or part == slice(None) for part in index)


def _is_log_sum_exp(call: Call, x: DeferredLogits, term: Any) -> bool:
    """Whether a term is the log-sum-exp of the very logits that it is subtracted from: log_softmax spelled out."""
    node: Any = call.node.args[1] if len(call.node.args) > 1 else None
    chain = [node]
    while isinstance(node, Node) and _keeps_rows(node):
        node = node.args[0]
        chain.append(node)
    reduced = call.values.get(node)
    tensor, source = tensor_of(call.node.args[1]), tensor_of(node)
    return (
        isinstance(reduced, Reduction)
        and operation(reduced.node) == "logsumexp"
        and reduced.logits.same_products(x)
        and reduced.logits.logit_map == x.logit_map
        and not any(writes_between(link, call.node) for link in chain)
        and source.requires_grad == call.output.requires_grad
        and tensor.dim() == x.ndim
        and tuple(tensor.shape) == (*x.shape[: x.vocab_dim], 1, *x.shape[x.vocab_dim + 1 :])
    )


def _added(call: Call, x: DeferredLogits, term: Any, factor: Any) -> DeferredLogits:
    if isinstance(term, DeferredLogits):
        scale = number_of(factor)
        if scale is None:
            raise Refused("logits are added with a factor that is no number (alpha); multiply them by it")
        return x.combine(term, lambda a, b: a + scale * b)
    x, term = _fixed(x, term)
    number = number_of(term)
    if number is not None:
        return x.map(lambda z: z + factor * number)
    other = call.others.get(term) if isinstance(term, Node) else None
    if isinstance(other, DeferredLogits) and x.same_shape(other):
        return x.plus(other.map(lambda z: z * number_of(factor)))
    tensor = tensor_of(term)
    last = x.vocab_dim == x.ndim - 1
    if tensor is None or not last or not is_vocab_vector(tuple(tensor.shape), x.vocab_size):
        raise Refused("a tensor that differs from row to row is added to the logits; only a [V] bias can be")
    bias = vocab_vector(term)
    return x.add_bias(bias if factor == 1 else bias.then(torch.mul, factor))


POINTWISE: dict[str, Callable[..., sympy.Expr]] = {
    "neg": operator.neg,
    "tanh": sympy.tanh,
    "sigmoid": sigmoid,
    "expit": sigmoid,
    "exp": sympy.exp,
    "square": lambda z: z**2,
    "abs": lambda z: chosen(gt(z, 0), z, chosen(gt(0, z), -z, 0)),
    "relu": lambda z: chosen(gt(z, 0), z, 0),
    "silu": lambda z: z * sigmoid(z),
}


@rule(*POINTWISE)
def pointwise(call: Call, x: DeferredLogits, inplace: bool = False) -> DeferredLogits | Probabilities | Scaled:
    name = out_of_place(operation(call.node))
    if x.normalized and name == "neg":
        return Scaled(x, -1.0)
    if x.normalized and name == "exp":
        return Probabilities(x.to(call.output.dtype))
    return x.map(POINTWISE[name]).to(call.output.dtype)


@rule("pow")
def power(call: Call, x: DeferredLogits, exponent: Any) -> DeferredLogits:
    if not isinstance(exponent, int) or exponent == 0:
        raise Refused("the logits are raised to a power that is no whole number; only whole powers are known")
    return with_dtype(call, x.map(lambda z: z**exponent))


@rule("leaky_relu")
def leaky_relu(call: Call, x: DeferredLogits, negative_slope: float = 0.01, inplace: bool = False) -> DeferredLogits:
    slope = constant(negative_slope)
    return x.map(lambda z: chosen(gt(z, 0), z, slope * z))


@rule("clamp", "clamp_min", "clamp_max")
def clamp(call: Call, x: DeferredLogits, *args: Any, **named: Any) -> DeferredLogits | Floored:
    name = out_of_place(operation(call.node))
    bounds = dict(zip(("max",) if name == "clamp_max" else ("min", "max"), args, strict=False)) | named
    low, high = bounds.get("min"), bounds.get("max")
    if x.normalized and high is None and low == torch.finfo(x.dtype).min:
        return Floored(x)
    return with_dtype(call, _clamped(x, low, high, CLAMP_IS_FLAT_AT_BOUNDS))


@rule("hardtanh")
def hardtanh(
    call: Call, x: DeferredLogits, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> DeferredLogits:
    return with_dtype(call, _clamped(x, min_val, max_val, True))


def _clamped(x: DeferredLogits, low: Any, high: Any, flat_bounds: bool) -> DeferredLogits:
    low, high = (None if bound is None else _bound(bound) for bound in (low, high))
    return x.map(lambda z: clamped(z, low, high, flat_bounds))


def _bound(value: Any) -> sympy.Expr:
    number = number_of(value)
    if number is None:
        raise Refused("the logits are clamped by tensors; clamp them by numbers")
    return number
