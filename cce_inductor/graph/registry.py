"""The registry of rules: how each torch operation acts on deferred logits.

A rule is a function with the signature of the operation behind a `Call`. Its deferred operands arrive as
`DeferredLogits`, or as a value of another `kind`, which begins the names of the rules for it. It returns the value that
the operation has on them, or a `Reduction` where the operation ends the logits, or raises `Refused`. An operation
without a rule is an escape: the logits are needed in memory.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ..compat import nn_functions
from .logits import Refused

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
# The rules of these take the logits in any place; those of all others take them first.
ANY_OPERAND = ("mul", "div", "add", "sub", "where", "stack", "broadcast_tensors", "gather", "type_as")

# Operations under another name, in torch, in Python or as a method of a tensor.
ALIASES = {
    "truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "negative": "neg",
    "swapaxes": "transpose", "swapdims": "transpose", "moveaxis": "movedim", "take_along_dim": "gather",
    "__getitem__": "getitem", "view_as": "view", "reshape_as": "view", "clip": "clamp",
    "absolute": "abs", "greater": "gt", "less": "lt", "and_": "bitwise_and", "or_": "bitwise_or",
}  # fmt: skip
# Attributes of tensors as Dynamo writes them from torch 2.14 on; before, as getattr(x, "T").
ATTRIBUTES = {torch.ops.aten.numpy_T: "T", torch.ops.aten.mT: "mT"}
NAMESPACES = (torch, F, nn_functions, torch.special, torch.functional, operator, torch.Tensor)


@dataclass(frozen=True)
class Call:
    """One operation of the graph that reads deferred logits.

    values: what is known of the site's nodes before it: deferred logits, and reductions of them.
    others: the same of the products before the site's.
    output: the fake value that the operation has in the program: shapes, dtypes and devices, no data.
    """

    node: Node
    values: dict[Node, Any]
    others: dict[Node, Any]
    output: Any


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operations, by their name in torch."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def operation(node: Node) -> str:
    """What a node calls, under its name in torch, or a qualified name where it is not torch's."""
    target: Any = node.target
    if node.op == "call_method":
        return ALIASES.get(target, target)
    if node.op != "call_function":
        return node.op
    if target is getattr and isinstance(node.args[1], str):
        return node.args[1]
    return _name(target)


def out_of_place(name: str) -> str:
    """The operation that another does in place: "div" for "div_" and for "itruediv"."""
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    elif name in ("iadd", "isub", "imul", "itruediv", "ipow"):
        name = name[1:]
    return ALIASES.get(name, name)


@functools.lru_cache(maxsize=4096)
def _name(function: Callable) -> str:
    """Under its name in torch, if it is torch's (or Python's operator) and not somebody's of the same name."""
    if function in ATTRIBUTES:
        return ATTRIBUTES[function]
    name = getattr(function, "__name__", str(function)).removeprefix("special_")
    if not any(getattr(namespace, name, None) is function for namespace in NAMESPACES):
        return f"{getattr(function, '__module__', '')}.{name}".lstrip(".")
    return ALIASES.get(name, name)


def apply(node: Node, values: dict[Node, Any], others: dict[Node, Any] | None = None) -> Any:
    """What a node does to the deferred values among its operands; raises `Refused` where nobody knows.

    others: deferred values that other products have, which it may be combined with.
    """
    name = operation(node)
    base = out_of_place(name)
    first: Any = node.args[0] if node.args else node.kwargs.get("input")
    kinds = [kind for source in node.all_input_nodes if (kind := getattr(values.get(source), "kind", None))]
    function = RULES.get(f"{kinds[0]}.{base}" if kinds else base)
    if function is None:
        logits = f"the logits ({kinds[0]})" if kinds else "the logits"
        raise Refused(f"`{name}` of {logits} is not understood, so they are needed in memory")
    args = [_operand(arg, values, base == "stack") for arg in (node.args[:1] if node.target is getattr else node.args)]
    kwargs = {key: _operand(arg, values) for key, arg in node.kwargs.items()}
    further = any(operand is not first for operand in node.all_input_nodes if operand in values)
    others = others or {}
    writes_another = name != base and first not in values and first not in others
    if further and (base not in ANY_OPERAND or writes_another):
        raise Refused(f"the logits are not what `{name}` works on but another argument, so they are needed in memory")
    args = [kwargs.pop("input"), *args] if "input" in kwargs else args
    args = [*args, kwargs.pop("other")] if "other" in kwargs else args
    try:
        return function(Call(node, values, others, node.meta.get("example_value")), *args, **kwargs)
    except Refused:
        raise
    except Exception as error:
        raise Refused(
            f"`{name}` is called in a way that is not understood ({type(error).__name__}: {error})"
        ) from error


def _operand(arg: Any, values: dict[Node, Any], lists: bool = False) -> Any:
    if isinstance(arg, Node):
        return values.get(arg, arg)
    nested: list[Node] = []
    torch.fx.node.map_arg(arg, nested.append)
    if any(node in values for node in nested) and not lists:
        raise Refused("the logits are combined with other tensors, so they are needed in memory")
    return arg


def tensor_of(arg: Any) -> Any:
    """The fake tensor that an operand stands for, None where it is no tensor."""
    value = arg.meta.get("example_value") if isinstance(arg, Node) else None
    return value if isinstance(value, torch.Tensor) else None
