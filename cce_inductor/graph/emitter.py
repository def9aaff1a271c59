"""Writes new nodes into a graph and keeps track of them, with the fake value of each."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from .effects import autocast_dtype
from .logits import Refused, Replay
from .registry import tensor_of


class Emitter(GraphAppendingTracer):
    """Appends at a place of a graph. Its proxies let ordinary torch code write itself into the graph."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.nodes: list[Node] = []
        self._origin: Node | None = None
        self._grad_enabled = True

    @contextlib.contextmanager
    def at(self, node: Node, grad_enabled: bool, origin: Node | None = None) -> Iterator[None]:
        """Inside the block, new nodes go before a node of the program and are reported as its line, or origin's."""
        self._origin, self._grad_enabled = origin or node, grad_enabled
        with self.graph.inserting_before(node):
            yield

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        self.nodes.append(node)
        if self._origin is not None and "stack_trace" in self._origin.meta:
            node.meta["stack_trace"] = self._origin.meta["stack_trace"]
        node.meta["example_value"] = self._fake_value(node)
        return node

    def _fake_value(self, node: Node) -> Any:
        def value(operand: Node) -> Any:
            return operand.meta["example_value"]

        args: Any = map_arg(node.args, value)
        kwargs: Any = map_arg(node.kwargs, value)
        fake_mode = tensor_of(self._origin).fake_mode
        with fake_mode, torch.set_grad_enabled(self._grad_enabled):
            target: Any = node.target
            if node.op == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)

    def call(self, function: Callable, *args: Any, **kwargs: Any) -> Node:
        """One call as a node; its arguments may be nodes. Raises `Refused` where the program's autocast rejects it."""
        if function is torch.cat:
            self._require_cat(map(tensor_of, args[0]))
        return self.create_node("call_function", function, args, kwargs)

    def _require_cat(self, tensors: Iterable[Tensor]) -> None:
        """Autocast raises an error at 16-bit floats other than its own."""
        assert self._origin is not None
        halves = {t.dtype: t.device.type for t in tensors if t.dtype.is_floating_point and t.dtype.itemsize == 2}
        for dtype, device in halves.items():
            autocast = autocast_dtype(self._origin, device)
            if autocast not in (None, dtype):
                raise Refused(f"{dtype} operands would be concatenated under autocast to {autocast}; use one dtype")

    def proxy(self, node: Node) -> Proxy:
        return Proxy(node, self)

    def as_matrix(self, hidden: Node) -> Node:
        """Hidden states [rows..., D] as [N, D]."""
        dims = tensor_of(hidden).dim()
        if dims == 2:
            return hidden
        return self.call(torch.unsqueeze, hidden, 0) if dims == 1 else self.call(torch.flatten, hidden, 0, -2)

    def sum(self, vectors: list[Node]) -> Node | None:
        """Of vectors [V], None for none."""
        return functools.reduce(functools.partial(self.call, torch.add), vectors) if vectors else None

    def rows(self, hidden: Replay) -> Proxy:
        """A tensor of the shape that the rows of the logits have."""
        return self.proxy(self.call(torch.select, hidden.emit(self.call), -1, 0))

    def undo(self) -> None:
        """Takes all new nodes out of the graph again."""
        for node in reversed(self.nodes):
            self.graph.erase_node(node)
        self.nodes.clear()
