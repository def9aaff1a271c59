"""What the order of a graph matters for: in-place writes, and regions without gradients.

Dynamo's graphs are not functional yet, so moving a computation past a write, or into another region, can change it.
"""

import contextlib
import functools
import inspect
import itertools
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..compat import HigherOrderOperator, OpOverload, OpOverloadPacket, is_mutable
from .registry import operation, out_of_place, tensor_of

_INPLACE_OPERATORS = {
    getattr(operator, name) for name in dir(operator) if name.startswith("i") and name not in ("is_", "is_not", "inv")
} - {operator.index, operator.indexOf, operator.invert, operator.itemgetter, operator.is_}


# Operations that make a tensor of numbers that are known.
NEW = {"empty", "empty_like", "full", "full_like", "new_empty", "new_full", "new_zeros", "zeros", "zeros_like"}
# Operations such as prepare targets and arrange logits, which may be moved or left out: no writes, no randomness.
PURE = NEW | {
    "add", "any", "arange", "bitwise_and", "bitwise_not", "bitwise_or", "bool", "cat", "chunk", "clamp", "clamp_max",
    "clamp_min", "clone", "contiguous", "cumsum", "detach", "div", "eq", "expand", "fill", "flatten", "flip", "float",
    "floordiv", "gather", "ge", "getitem", "gt", "index_select", "int", "invert", "le", "logical_and", "logical_not",
    "logical_or", "long", "lt", "masked_fill", "movedim", "mul", "narrow", "ne", "neg", "new_ones", "one_hot", "ones",
    "ones_like", "pad", "permute", "remainder", "repeat", "reshape", "roll", "scatter", "select", "shape", "size",
    "split", "squeeze", "stack", "sub", "sum", "t", "to", "transpose", "tril", "triu", "type_as", "unbind",
    "unflatten", "unsqueeze", "view", "where", "xor",
}  # fmt: skip


def written(node: Node) -> list[Node]:
    """The tensors of the graph that a node writes in place."""
    target: Any = node.target
    if node.op == "call_method":
        return _first(node) if _ends_in_place(target) else []
    if node.op != "call_function":
        return []
    out = node.kwargs.get("out")
    if out is not None:
        return [arg for arg in (out if isinstance(out, tuple | list) else (out,)) if isinstance(arg, Node)]
    if target is operator.setitem or target in _INPLACE_OPERATORS:
        return _first(node)
    if isinstance(target, OpOverload | OpOverloadPacket):
        return node.all_input_nodes if _is_mutable(target) else []
    if isinstance(target, HigherOrderOperator):
        return node.all_input_nodes if "mutation" in target.name() else []
    name = getattr(target, "__name__", "")
    is_keyword = getattr(operator, name, None) is target  # operator.and_ and operator.or_ write nothing
    in_place = (_ends_in_place(name) and not is_keyword) or _inplace_argument(node)
    return _first(node) if in_place else []


def _ends_in_place(name: str) -> bool:
    """By torch's convention: add_, but not __add__."""
    return name.endswith("_") and not name.endswith("__")


def _first(node: Node) -> list[Node]:
    return [arg for arg in node.args[:1] if isinstance(arg, Node)]


def _is_mutable(op: OpOverload | OpOverloadPacket) -> bool:
    overloads = [op] if isinstance(op, OpOverload) else [getattr(op, name) for name in op.overloads()]
    return any(map(is_mutable, overloads))


def _inplace_argument(node: Node) -> bool:
    """Whether a call such as relu(x, inplace=True) says that it works in place."""
    signature = _signature(node.target)
    if signature is not None and "inplace" in signature.parameters:
        with contextlib.suppress(TypeError):
            return signature.bind(*node.args, **node.kwargs).arguments.get("inplace", False) is True
    return bool(node.kwargs.get("inplace", False))


@functools.lru_cache(maxsize=4096)
def _signature(target: Any) -> inspect.Signature | None:
    """Kept, because Python reads those of built-in functions from their text, which takes a millisecond."""
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):
        return None


def first_write(nodes: Iterable[Node], tensors: Iterable[Node]) -> Node | None:
    """The first of the nodes that writes to memory that one of the tensors may share."""
    storages = {_storage(tensor) for tensor in tensors if tensor_of(tensor) is not None}
    for node in nodes:
        if any(_storage(tensor) in storages for tensor in written(node) if tensor_of(tensor) is not None):
            return node
    return None


def dead_nodes(graph: Graph) -> set[Node]:
    """Nodes whose values nothing needs: Dynamo keeps what a program computes and then drops."""
    dead: set[Node] = set()
    for node in reversed(graph.nodes):
        if dead.issuperset(node.users) and operation(node) in PURE and not written(node):
            dead.add(node)
    return dead


def with_makers(nodes: Iterable[Node]) -> set[Node]:
    """Nodes, and those that need not run where only these read what they make, as the one-hot rows of labels."""
    found = set(nodes)
    stack = list(found)
    while stack:
        node = stack.pop()
        makers = [*node.all_input_nodes, *(user for user in node.users if node in written(user))]
        new = {maker for maker in makers if _only_makes(maker)} - found
        found |= new
        stack += new
    return found


def _only_makes(node: Node) -> bool:
    """Whether a node has no effect but its value; it may write to a tensor that the graph has made."""
    return out_of_place(operation(node)) in PURE and all(operation(target) in NEW for target in written(node))


def never_written_after(node: Node, tensor: Node) -> bool:
    """Whether a tensor that a node reads, and may copy, keeps its value to the end of the graph."""
    return first_write(_from(node), [tensor]) is None


def writes_between(node: Node, reader: Node) -> list[Node]:
    """The nodes that write to the memory of a node's value before another node."""
    later = itertools.takewhile(lambda n: n is not reader, _from(node.next))
    return [n for n in later if any(shares_memory(node, target) for target in written(n))]


def _from(node: Node) -> Iterator[Node]:
    """A node and those after it."""
    while node.op != "root":
        yield node
        node = node.next


def shares_memory(node: Node, tensor: Node) -> bool:
    """Whether a node's value, or a tensor of the tuple that it is, shares memory with a tensor."""
    value = node.meta.get("example_value")
    parts = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(p, torch.Tensor) and p.untyped_storage()._cdata == _storage(tensor) for p in parts)


def _storage(node: Node) -> int:
    """Fake tensors share their storage where the real ones will."""
    return tensor_of(node).untyped_storage()._cdata


def grad_modes(graph: Graph) -> dict[Node, bool]:
    """Whether gradients are recorded, for every node."""
    enabled, outer, modes = torch.is_grad_enabled(), [], {}
    for node in graph.nodes:
        modes[node] = enabled
        name = getattr(node.target, "__name__", "")
        if name == "_set_grad_enabled":
            enabled = bool(node.args[0])
        elif name == "_enter_inference_mode":
            outer.append(enabled)
            enabled = enabled and not node.args[0]
        elif name == "_exit_inference_mode":
            enabled = outer.pop()
    return modes


def grad_mode_of_calls(graph: Graph, subgraph: str) -> bool:
    """Whether gradients are recorded where a graph calls a subgraph, an attribute of its module."""
    modes = grad_modes(graph)
    uses = (node for node in graph.nodes if node.op == "get_attr" and node.target == subgraph)
    return all(modes[call] for node in uses for call in node.users)


def autocast_dtype(node: Node, device: str) -> torch.dtype | None:
    """The dtype that autocast gives to matmuls on a device where a node runs; None where autocast is off."""
    if not torch.amp.is_autocast_available(device):
        return None
    dtypes = [torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None]  # one a region
    for other in node.graph.nodes:
        if other is node:
            break
        name = getattr(other.target, "__name__", "")
        if name == "_enter_autocast":
            kind, dtype, enabled, *_ = other.args
            inside = (dtype or torch.get_autocast_dtype(device)) if enabled else None
            dtypes.append(inside if kind == device else dtypes[-1])
        elif name == "_exit_autocast":
            dtypes.pop()
    return dtypes[-1]


def inside_transforms(graph: Graph) -> set[Node]:
    """The nodes that run under a torch.func transform (grad, vmap, ...): Dynamo marks where each begins and ends."""
    depth, inside = 0, set()
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        depth += name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")
        if depth > 0:
            inside.add(node)
    return inside
