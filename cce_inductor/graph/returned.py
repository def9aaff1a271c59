"""Logits that a graph returns beside the loss: it returns their operands instead, and a caller makes lazy logits.

The place of the logits among the graph's results is taken by the hidden states, replayed to the rows of the logits.
Weight and bias are arguments of the graph, or further results where it computes them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..compat import statically_equal
from ..lazy_logits import Formula, lazy_logits
from .effects import first_write, grad_modes, shares_memory, written
from .emitter import Emitter
from .logits import DeferredLogits, Refused
from .registry import operation, tensor_of
from .sites import Site, location


@dataclass(frozen=True)
class Operand:
    """Where to take a tensor from: an argument of the graph, or one of its results."""

    is_argument: bool
    index: int

    def of(self, args: Any, results: Any) -> Tensor:
        return (args if self.is_argument else results)[self.index]


@dataclass(frozen=True)
class LazyResult:
    """Lazy logits to be made of what a call of the graph was given and gave."""

    places: tuple[int, ...]  # among the results; the hidden states lie there
    weight: Operand
    bias: Operand | None
    formula: Formula
    requires_grad: bool

    def of(self, args: Any, results: Any) -> Tensor:
        rows, weight = results[self.places[0]], self.weight.of(args, results)
        bias = None if self.bias is None else self.bias.of(args, results)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.requires_grad):
            return lazy_logits(rows, weight, bias, self.formula)


class LazyResults:
    """The results of a graph that became lazy, filled by the pass: for the caller, who makes the logits."""

    def __init__(self, graph: Graph) -> None:
        self._count = len(_results(graph))
        self.found: list[LazyResult] = []

    def around(self, compiled: Callable) -> Callable:
        """The compiled graph with the results of the original one."""
        if not self.found:
            return compiled

        @functools.wraps(compiled, updated=())
        def call(*args: Any) -> tuple:
            results = list(compiled(*args))
            for lazy in self.found:
                logits = lazy.of(args, results)
                for place in lazy.places:
                    results[place] = logits
            return tuple(results[: self._count])

        return call


def _results(graph: Graph) -> tuple:
    """Flat in Dynamo's graphs; any other structure is empty here, and its logits are computed."""
    results = graph.output_node().args[0]
    return tuple(results) if isinstance(results, tuple | list) else ()


def return_operands(site: Site, node: Node, logits: DeferredLogits, emitter: Emitter) -> LazyResult:
    """Replaces logits among the results of their graph; raises `Refused` where they have to be computed in it.

    The caller restores the output node's arguments where the graph is to be as before.
    """
    graph = node.graph
    output, modes = graph.output_node(), grad_modes(graph)
    requires_grad = tensor_of(node).requires_grad
    writes = [other for other in site.chain if written(other)]  # also those after the node change what is returned
    if requires_grad and not all(modes[n] for n in (node, *site.path(node), *writes, output)):
        raise Refused("gradients are not recorded in a part of their computation")
    if logits.vocab_dim != logits.ndim - 1:
        raise Refused("the vocabulary is not their last dimension")
    others = [other for other in site.returned if other is not node]
    if any(shares_memory(other, node) for other in others):
        raise Refused("two of the results are views of them that share memory")
    _require_unwritten(site, logits)
    with emitter.at(output, modes[output], origin=logits.matmul):
        rows = logits.hidden.emit(emitter.call)
        weight = logits.weight.emit(emitter.call)
        bias = emitter.sum([bias.emit(emitter.call) for bias in logits.biases])
    shape = (*logits.row_shape, logits.vocab_size)
    computed = (*tensor_of(rows).shape[:-1], tensor_of(weight).shape[0])
    if len(shape) != len(computed) or not all(map(statically_equal, shape, computed)):
        raise Refused(f"their operands give the shape {computed}")
    places = tuple(i for i, result in enumerate(_results(graph)) if result is node)
    if not places:
        raise Refused("they are not results on their own")
    results = [rows if result is node else result for result in _results(graph)]
    lazy = LazyResult(
        places,
        _operand(weight, results),
        None if bias is None else _operand(bias, results),
        Formula(str(logits.logit_map), logits.compute_dtype, (logits.dtype,), logits.normalized),
        requires_grad,
    )
    output.args = (tuple(results),)
    return lazy


def _operand(node: Node, results: list) -> Operand:
    """Where a node's value is found; it becomes a further result where it is no argument."""
    if node.op == "placeholder":
        return Operand(True, [n for n in node.graph.nodes if n.op == "placeholder"].index(node))
    results.append(node)
    return Operand(False, len(results) - 1)


def _require_unwritten(site: Site, logits: DeferredLogits) -> None:
    nodes = list(logits.matmul.graph.nodes)
    write = first_write(nodes[nodes.index(logits.matmul) + 1 :], logits.operands())
    if write is not None:
        raise Refused(f"`{operation(write)}` at {location(write)} changes an operand in place before the end")
