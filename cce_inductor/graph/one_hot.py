"""Recognizes one-hot rows that a program makes: `one_hot`, or a constant tensor into which numbers are scattered."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from .effects import never_written_after, writes_between, written
from .registry import operation, out_of_place, tensor_of


@dataclass(frozen=True)
class OneHot:
    """`on` at the target of each row, `off` elsewhere."""

    target: Node  # [rows...] or [rows..., 1]
    on: float
    off: float


_VIEWS = ("detach", "contiguous")
_CASTS = ("float", "to", "type_as", "half", "bfloat16", "double")
_ARITHMETIC: dict[str, Callable[..., float]] = {
    "neg": operator.neg,
    "mul": operator.mul,
    "div": operator.truediv,
    "add": operator.add,
    "sub": operator.sub,
}


def one_hot_rows(node: Any, reader: Node) -> OneHot | None:
    """What a tensor holds when a node reads it; None for anything but one-hot rows along its last dimension."""
    if not isinstance(node, Node):
        return None
    if written(node):  # its result is what it wrote to
        return one_hot_rows(written(node)[0], reader)
    writes, name = writes_between(node, reader), operation(node)
    if writes:
        return _after_writes(node, writes)
    source: Any = node.args[0] if node.args else None
    if name == "one_hot" and never_written_after(node, source):
        return OneHot(source, 1.0, 0.0)
    if name == "scatter" and not writes_between(source, node):
        return _scattered(node, _constant(source))
    if name in _VIEWS or (name in _CASTS and tensor_of(node).is_floating_point()):
        return one_hot_rows(source, node)
    if name in _ARITHMETIC and not node.kwargs:
        return _after_arithmetic(node, _ARITHMETIC[name])
    return None


def _after_writes(node: Node, writes: list[Node]) -> OneHot | None:
    """A constant tensor that is filled with other numbers, then scattered into."""
    *fills, scatter = writes
    number = _constant(node)
    for fill in fills:
        number = _number(fill.args[1]) if out_of_place(operation(fill)) == "fill" and len(fill.args) == 2 else None
    return _scattered(scatter, number) if out_of_place(operation(scatter)) == "scatter" else None


def _scattered(scatter: Node, off: float | None) -> OneHot | None:
    """scatter(base, -1, index [..., 1], number)."""
    named: dict[str, Any] = dict(zip(("input", "dim", "index", "value"), scatter.args, strict=False)) | scatter.kwargs
    dim, index, on = named.get("dim"), tensor_of(named.get("index")), _number(named.get("value"))
    last = tensor_of(scatter).dim() - 1
    if off is None or on is None or index is None or dim not in (-1, last) or "reduce" in named:
        return None
    one_a_row = index.dim() == last + 1 and index.shape[-1] == 1
    return OneHot(named["index"], on, off) if one_a_row and never_written_after(scatter, named["index"]) else None


def _constant(node: Node) -> float | None:
    """The number that a new tensor is full of."""
    name = operation(node)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return 0.0
    if name in ("full", "full_like", "new_full"):
        return _number(node.kwargs.get("fill_value", node.args[-1]))
    return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _after_arithmetic(node: Node, function: Callable[..., float]) -> OneHot | None:
    """A function of one-hot rows and numbers; all rows are those of one target."""
    operands = [arg if isinstance(arg, int | float) else one_hot_rows(arg, node) for arg in node.args]
    rows = [operand for operand in operands if isinstance(operand, OneHot)]
    if not rows or None in operands or any(other.target is not rows[0].target for other in rows):
        return None
    try:
        on, off = (
            function(*(getattr(operand, name) if isinstance(operand, OneHot) else operand for operand in operands))
            for name in ("on", "off")
        )
    except ZeroDivisionError:
        return None
    return OneHot(rows[0].target, on, off)
