"""Rules for comparisons and masks: a choice by the logits joins the map, a mask over the vocabulary fills classes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch.fx import Node

from ..logit_map import ge, gt
from ..logit_map import where as chosen
from .logits import DeferredLogits, Refused, Replay
from .maps import number_of, with_dtype
from .matmuls import is_vocab_vector, vocab_vector
from .registry import Call, operation, rule, tensor_of
from .rows import FULL


@dataclass(frozen=True)
class Condition:
    """A comparison of the logits with a number, as an expression in z."""

    logits: DeferredLogits
    holds: sympy.Expr


COMPARISONS: dict[str, Callable[[sympy.Expr, sympy.Expr], sympy.Expr]] = {
    "gt": gt,
    "ge": ge,
    "lt": lambda z, number: gt(number, z),
    "le": lambda z, number: ge(number, z),
}


@rule(*COMPARISONS)
def compare(call: Call, x: DeferredLogits, other: Any) -> Condition:
    number = number_of(other)
    if number is None or x.normalized:
        raise Refused("the logits are compared with a tensor; compare them with a number")
    return Condition(x, COMPARISONS[operation(call.node)](x.logit_map.expr, number))


@rule("where")
def where(call: Call, condition: Any, a: Any, b: Any) -> DeferredLogits:
    """A choice by the logits themselves, or a mask over the vocabulary."""
    if call.node.op == "call_method":  # x.where(condition, other)
        condition, a = a, condition
    if isinstance(condition, Condition):
        x = condition.logits
        branches = [_branch(x, value) for value in (a, b)]
        return x.map(lambda z: chosen(condition.holds, *branches)).to(call.output.dtype)
    if isinstance(a, DeferredLogits) and not isinstance(b, DeferredLogits):
        return _masked(call, a, vocab_mask(a, condition, inverted=True), b)
    if isinstance(b, DeferredLogits) and not isinstance(a, DeferredLogits):
        return _masked(call, b, vocab_mask(b, condition), a)
    raise Refused("a mask chooses between two logits; mask by a number")


def _branch(x: DeferredLogits, value: Any) -> sympy.Expr:
    if isinstance(value, DeferredLogits) and x.same_products(value):
        return value.logit_map.expr
    number = number_of(value)
    if number is None:
        raise Refused("torch.where of the logits chooses a tensor; choose numbers, or functions of the same logits")
    return number


@rule("masked_fill")
def masked_fill(call: Call, x: DeferredLogits, mask: Any, value: Any) -> DeferredLogits:
    return _masked(call, x, vocab_mask(x, mask), value)


def vocab_mask(x: DeferredLogits, mask: Any, inverted: bool = False) -> Replay:
    """A boolean mask as a vector [V], true where classes are filled."""
    tensor = tensor_of(mask)
    last = x.vocab_dim == x.ndim - 1
    if tensor is None or not last or tensor.dtype != torch.bool or not is_vocab_vector(tensor.shape, x.vocab_size):
        raise Refused("a mask that differs from row to row is put on the logits; only a boolean mask [V] can be")
    vector = vocab_vector(mask)
    return vector.then(torch.logical_not) if inverted else vector


def _masked(call: Call, x: DeferredLogits, mask: Replay, value: Any) -> DeferredLogits:
    return with_dtype(call, x.fill(mask, _fill_number(value)))


def _fill_number(value: Any) -> sympy.Expr:
    """-inf or a number, also as torch.tensor(number)."""
    if isinstance(value, Node) and operation(value) == "tensor" and isinstance(value.args[0], int | float):
        value = value.args[0]
    if isinstance(value, float) and value == -math.inf:
        return -sympy.oo
    number = number_of(value)
    if number is None:
        raise Refused("masked classes are filled with a tensor; fill them with a number")
    return number


@rule("setitem")
def setitem(call: Call, x: DeferredLogits, index: Any, value: Any) -> DeferredLogits:
    """x[..., classes] = number, in place."""
    entries = index if isinstance(index, tuple) else (index,)
    *rows, classes = entries
    every_row = all(entry is Ellipsis or entry == FULL for entry in rows if not isinstance(entry, Node))
    whole = every_row and not any(isinstance(entry, Node) for entry in rows)
    if not whole or x.vocab_dim != x.ndim - 1 or not (Ellipsis in rows or len(entries) == x.ndim):
        raise Refused("some rows of the logits are written in place; write classes of all rows: x[..., classes]")
    return x.fill(_mask_of_classes(x, classes), _fill_number(value))


@rule("index_fill")
def index_fill(call: Call, x: DeferredLogits, dim: int, index: Node, value: Any) -> DeferredLogits:
    if x.dim(dim) != x.vocab_dim:
        raise Refused("rows of the logits are filled; set their labels to ignore_index")
    return _masked(call, x, _mask_of_classes(x, index), value)


def _mask_of_classes(x: DeferredLogits, classes: Any) -> Replay:
    """Classes, as they are written in an index, as a mask [V]."""
    tensor = tensor_of(classes)
    if tensor is not None and tensor.dtype == torch.bool:
        return vocab_mask(x, classes)
    size = x.vocab_size
    if not isinstance(size, int):
        raise Refused("classes of a vocabulary of a dynamic size are written; keep its size constant")
    on_device = Replay(x.weight.operands()[0])
    if isinstance(classes, list) and all(type(number) is int for number in classes):
        classes = on_device.then(torch.Tensor.new_tensor, classes, dtype=torch.int64)
    if isinstance(classes, Replay) or (tensor is not None and tensor.dim() == 1):
        return on_device.then(torch.Tensor.new_zeros, (size,)).then(torch.index_fill, 0, classes, 1.0).then(torch.gt, 0)
    if isinstance(classes, int):
        classes = slice(classes, classes + 1 or None)
    if not isinstance(classes, slice) or _has_nodes(classes):
        raise Refused("classes are written that are no slice, list, index tensor or mask [V]; write one of these")
    chosen_ones = range(*classes.indices(size))
    if chosen_ones.step != 1:
        raise Refused("classes are written with a step; write a mask [V]")
    padding = (chosen_ones.start, size - chosen_ones.start - len(chosen_ones))
    return on_device.then(torch.Tensor.new_ones, (len(chosen_ones),)).then(F.pad, padding).then(torch.gt, 0)


def _has_nodes(part: slice) -> bool:
    return any(isinstance(number, Node) for number in (part.start, part.stop, part.step))
