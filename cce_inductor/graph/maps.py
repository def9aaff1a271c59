"""Rules for pointwise operations: they compose into one expression, a bias, or a scale of the hidden states."""

import operator
from typing import Any

import sympy
import torch
from torch.fx import Node

from ..compat import float_hint
from ..logit_map import constant, sigmoid
from .logits import DeferredLogits, Refused
from .matmuls import is_vocab_vector, vocab_vector
from .registry import Call, logits_and_other, rule, tensor_of


def _with_dtype(call: Call, x: DeferredLogits) -> DeferredLogits:
    """Type promotion may have changed the dtype; a pointwise operation must not have changed the shape."""
    if tuple(call.output.shape) != x.shape:
        raise Refused("the logits are broadcast against a larger tensor")
    return x.to(call.output.dtype)


def _number(value: Any) -> sympy.Expr | None:
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


@rule("mul")
def mul(call: Call, a: Any, b: Any) -> DeferredLogits:
    x, factor = logits_and_other(a, b)
    return _with_dtype(call, _scaled(x, factor, operator.mul, torch.mul))


@rule("div")
def div(call: Call, x: Any, divisor: Any, *, rounding_mode: None = None) -> DeferredLogits:
    if not isinstance(x, DeferredLogits) or isinstance(divisor, DeferredLogits) or rounding_mode is not None:
        raise Refused("something is divided by the logits, or with rounding")
    return _with_dtype(call, _scaled(x, divisor, operator.truediv, torch.div))


def _scaled(x: DeferredLogits, factor: Any, on_expressions: Any, on_tensors: Any) -> DeferredLogits:
    if not x.is_scalable:
        x, factor = _fixed(x, factor)
    number = _number(factor)
    if number is not None:
        return x.map(lambda z: on_expressions(z, number))
    if _is_scalar(factor):
        return x.scale(on_tensors, factor)
    raise Refused("the logits are scaled by a tensor of more than one number")


@rule("add")
def add(call: Call, a: Any, b: Any, *, alpha: Any = 1) -> DeferredLogits:
    x, term = logits_and_other(a, b)
    return _with_dtype(call, _added(x, term, 1 if alpha == 1 else None))


@rule("sub")
def sub(call: Call, x: Any, term: Any, *, alpha: Any = 1) -> DeferredLogits:
    if not isinstance(x, DeferredLogits) or isinstance(term, DeferredLogits):
        raise Refused("the logits are subtracted from something")
    return _with_dtype(call, _added(x, term, -1 if alpha == 1 else None))


def _added(x: DeferredLogits, term: Any, sign: int | None) -> DeferredLogits:
    if sign is None:
        raise Refused("a scaled tensor is added to the logits (alpha)")
    x, term = _fixed(x, term)
    number = _number(term)
    if number is not None:
        return x.map(lambda z: z + sign * number)
    tensor = tensor_of(term)
    last = x.vocab_dim == x.ndim - 1
    if tensor is None or not last or not is_vocab_vector(tuple(tensor.shape), x.vocab_size):
        raise Refused("a tensor that differs from row to row is added to the logits; only a [V] bias can be")
    bias = vocab_vector(term)
    return x.add_bias(bias if sign == 1 else bias.then(torch.neg))


@rule("neg")
def neg(call: Call, x: DeferredLogits) -> DeferredLogits:
    return x.map(operator.neg)


@rule("tanh")
def tanh(call: Call, x: DeferredLogits) -> DeferredLogits:
    return x.map(sympy.tanh)


@rule("sigmoid", "expit")
def sigmoid_of(call: Call, x: DeferredLogits) -> DeferredLogits:
    return x.map(sigmoid)
