"""Joins operator calls on one weight: heads in a row, chunked hidden states, a loop over the rows of a batch.

    call(hidden 1, weight), call(hidden 2, weight), ...  ->  call(hidden 1 above hidden 2 above ..., weight), split

One call adds up the gradient of the weight in float32. Several would each make one of [V, D], to be added afterwards.
The joint call takes the place of the last one; what is computed from the results of the others moves behind it.
"""

import contextlib
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from ..compat import constant_size
from ..ops.library import vocab_reductions
from ..ops.problem import Reductions
from ..report import log
from .effects import PURE, first_write, grad_modes, shares_memory, written
from .emitter import Emitter
from .logits import Refused
from .registry import operation, out_of_place, tensor_of

HIDDEN, WEIGHT, TARGET = 0, 1, 3  # places among the operator's arguments
RESULTS = len(Reductions._fields) - 1  # an approximate backward keeps the last one to itself
# Arithmetic on losses, beside what prepares targets.
_SINKABLE = PURE | {
    "abs", "clone", "div", "exp", "expm1", "log", "log1p", "maximum", "mean", "min", "minimum", "pow", "relu",
    "sigmoid", "sqrt", "square",
}  # fmt: skip


def merge_calls(graph: Graph) -> dict[Node, Node]:
    """Joins the calls that can be joined: (an old call, the joint one) for each of them.

    Never raises; a group of calls in which that fails stays as it was, and so do those after it.
    """
    joined: dict[Node, Node] = {}
    try:
        _merge_calls(graph, joined)
    except Exception:
        log.warning("calls of the operator could not be joined, the graph stays as it was", exc_info=True)
    return joined


def _merge_calls(graph: Graph, joined: dict[Node, Node]) -> None:
    modes = grad_modes(graph)
    groups: dict[Any, list[Node]] = {}
    for node in graph.nodes:
        if node.target is vocab_reductions:
            groups.setdefault(_key(node, modes[node]), []).append(node)
    for calls in groups.values():
        users = _users_before(calls[-1], calls[:-1])
        if len(calls) > 1 and _may_move(calls, users, modes):
            with contextlib.suppress(Refused):
                joint = _merge(calls, users, modes[calls[-1]])
                joined.update(dict.fromkeys(calls, joint))


def _key(call: Node, grad_enabled: bool) -> tuple:
    """Equal for calls that differ in nothing but their rows, and in which of the rows are read."""
    hidden, target = tensor_of(call.args[HIDDEN]), call.args[TARGET]
    shared = tuple(map(_expression, (arg for i, arg in enumerate(call.args) if i not in (HIDDEN, TARGET))))
    how = sorted((name, value) for name, value in call.kwargs.items() if name != "skip_ignored")
    picks = None if target is None else str(tensor_of(target).shape[1:])
    return shared, picks, hidden.dtype, hidden.requires_grad, grad_enabled, str(how)


def _expression(arg: Any) -> Any:
    """A weight or bias with the views that the pass took of it, each call its own."""
    if isinstance(arg, Node) and arg.target in (torch.t, torch.detach, torch.flatten, operator.getitem):
        return arg.target, *map(_expression, arg.args)
    if isinstance(arg, tuple):
        return tuple(map(_expression, arg))
    return str(arg) if isinstance(arg, slice) else arg


def _users_before(anchor: Node, calls: list[Node]) -> list[Node]:
    """What is computed from the calls' results before a node, in graph order."""
    found: dict[Node, None] = dict.fromkeys(calls)
    for node in anchor.graph.nodes:
        if node is anchor:
            break
        if any(source in found for source in node.all_input_nodes):
            found[node] = None
    return [node for node in found if node not in calls]


def _may_move(calls: list[Node], users: list[Node], modes: dict[Node, bool]) -> bool:
    """Whether the earlier calls and the users of their results may run where the last call does."""
    *earlier, last = calls
    moving = {*earlier, *users}
    if not moving.isdisjoint(last.all_input_nodes):
        return False
    nodes = list(last.graph.nodes)
    staying = [node for node in nodes[nodes.index(calls[0]) : nodes.index(last)] if node not in moving]
    reads = {source for node in moving for source in node.all_input_nodes} - moving
    return (
        all(out_of_place(operation(node)) in _SINKABLE and modes[node] == modes[last] for node in users)
        and all(target in moving for node in users for target in written(node))
        and not any(shares_memory(read, target) for node in users for target in written(node) for read in reads)
        and not any("autocast" in getattr(node.target, "__name__", "") for node in staying)
        and first_write(staying, reads) is None
    )


def _merge(calls: list[Node], users: list[Node], grad_enabled: bool) -> Node:
    last = calls[-1]
    emitter = Emitter(last.graph)
    try:
        with emitter.at(next(iter(last.users)), grad_enabled):
            joint, replacements = _emit(calls, emitter)
    except Exception:
        emitter.undo()
        raise
    for node in reversed(users):
        emitter.nodes[-1].append(node)
    for old, new in replacements:
        old.replace_all_uses_with(new)
    for call in calls:
        for node in (*call.users, call):
            last.graph.erase_node(node)
    return joint


def _emit(calls: list[Node], emitter: Emitter) -> tuple[Node, list[tuple[Node, Node]]]:
    """The joint call, and (an old result, its part of the joint one) for every result that is used."""
    last = calls[-1]
    args: list[Any] = list(last.args)
    hidden: list[Any] = [call.args[HIDDEN] for call in calls]
    args[HIDDEN] = emitter.call(torch.cat, hidden)
    if last.args[TARGET] is not None:
        args[TARGET] = emitter.call(torch.cat, [call.args[TARGET] for call in calls])
    how = {**last.kwargs, "skip_ignored": all(call.kwargs["skip_ignored"] for call in calls)}
    joint = emitter.call(vocab_reductions, *args, **how)
    lengths = [_length(rows, emitter) for rows in hidden]
    replacements = []
    for k in range(RESULTS):
        olds = [next((user for user in call.users if user.args[1] == k), None) for call in calls]
        if any(olds):
            pieces = emitter.call(torch.split, emitter.call(operator.getitem, joint, k), lengths)
            for i, old in enumerate(olds):
                if old is not None:
                    replacements.append((old, emitter.call(operator.getitem, pieces, i)))
    return joint, replacements


def _length(rows: Node, emitter: Emitter) -> int | Node:
    """The number of rows as an argument: a number, or a node where it is dynamic."""
    length = constant_size(tensor_of(rows).shape[0])
    return length if isinstance(length, int) else emitter.create_node("call_method", "size", (rows, 0), {})
