"""Sweeps: which reductions of a site one operator call, one pass over the vocabulary, can serve."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from .effects import PURE, first_write, grad_modes, never_written_after
from .logits import DeferredLogits, Refused, Step
from .reductions import Reduction
from .registry import operation, tensor_of
from .sites import Site


@dataclass
class Sweep:
    """Reductions that one operator call serves: at most one target and one total over the classes.

    The logits are the same, those of the first one; of reductions without a target they may be a part of the rows.
    """

    reductions: list[Reduction]
    grad_enabled: bool

    def find(self, attribute: str) -> Any:
        return next((value for r in self.reductions if (value := getattr(r, attribute)) is not None), None)

    @property
    def target(self) -> Node | None:
        return self.find("target")

    @property
    def targets_from_end(self) -> bool:
        return any(reduction.from_end for reduction in self.reductions)

    @property
    def want_total(self) -> bool:
        return any(reduction.want_total for reduction in self.reductions)

    @property
    def want_max(self) -> bool:
        return any(reduction.want_max for reduction in self.reductions)

    @property
    def want_entropy(self) -> bool:
        return any(reduction.want_entropy for reduction in self.reductions)

    @property
    def reads_ignored(self) -> bool:
        return any(reduction.reads_ignored for reduction in self.reductions)

    def admits(self, other: Reduction, grad_enabled: bool) -> bool:
        """Whether the call can serve another reduction too."""
        mine = self.reductions[0].logits
        same_target = (
            self.target is None
            or other.target is None
            or (_flat_source(self.target), self.find("ignore_index"), self.targets_from_end)
            == (_flat_source(other.target), other.ignore_index, other.from_end)
        )
        same_total = not (self.want_total and other.want_total) or self.find("total_weight") is other.total_weight
        if not (same_target and same_total):
            return False
        theirs = other.logits
        if not tensor_of(other.node).requires_grad:  # what has no gradient can be taken from what has one
            mine, theirs = _attached(mine), _attached(theirs)
        elif self.grad_enabled != grad_enabled:
            return False
        if _but_for_rows(mine) != _but_for_rows(theirs):
            return False
        if mine.hidden.flat() == theirs.hidden.flat():
            return True
        steps = theirs.hidden.beyond(mine.hidden.flat())
        return other.target is None and steps is not None and all(step.args is not None for step in steps)

    def part(self, other: Reduction) -> tuple[Step, ...]:
        """The calls that take the rows of a reduction that it admits from its own; none where they are the same."""
        mine, theirs = (_attached(logits).hidden for logits in (self.reductions[0].logits, other.logits))
        return () if mine.flat() == theirs.flat() else theirs.beyond(mine.flat()) or ()


def _but_for_rows(logits: DeferredLogits) -> tuple:
    return logits.weight, logits.biases, logits.logit_map


def _attached(logits: DeferredLogits) -> DeferredLogits:
    """Without `detach`."""
    attached = (replay.without(torch.detach) for replay in (logits.hidden, logits.weight, *logits.biases))
    hidden, weight, *biases = attached
    return replace(logits, hidden=hidden, weight=weight, biases=tuple(biases))


def _flat_source(node: Any) -> Node:
    """The tensor that a target is a reshape of: equal for two targets with the same elements in the same order.

    A reshape may be a copy, so what it reads stands for it only where nothing is written to that later.
    """
    reshapes = ("view", "reshape", "flatten", "contiguous", "squeeze", "unsqueeze")
    while operation(node) in reshapes and never_written_after(node, node.args[0]):
        node = node.args[0]
    return node


def sweeps_of(site: Site) -> list[Sweep]:
    """The fewest operator calls, in graph order; raises `Refused` where gradients would differ from the program's."""
    modes = grad_modes(site.logits.matmul.graph)
    sweeps: list[Sweep] = []
    for reduction in site.reductions:
        grad_enabled = modes[reduction.node]
        if grad_enabled and not all(modes[node] for node in site.path(reduction.node)):
            raise Refused("the logits are computed without gradients and reduced with gradients enabled")
        admitting = (s for s in sweeps if s.admits(reduction, grad_enabled) and _make_available(reduction, s))
        home = next(admitting, None)
        if home is None:
            sweeps.append(Sweep([reduction], grad_enabled))
        else:
            home.reductions.append(reduction)
    return sweeps


def _make_available(reduction: Reduction, sweep: Sweep) -> bool:
    """Moves the preparation of a target before the first reduction of a sweep; whether that was possible."""
    anchor = sweep.reductions[0].node
    late = _late_ancestors([n for n in (reduction.target, reduction.total_weight) if n is not None], anchor)
    if not late:
        return True
    nodes = list(anchor.graph.nodes)
    between = nodes[nodes.index(anchor) : nodes.index(late[-1])]
    reads = {source for node in late for source in (node, *node.all_input_nodes)}
    if any(operation(node) not in PURE for node in late) or first_write(between, reads) is not None:
        return False
    for node in late:
        anchor.prepend(node)
    return True


def _late_ancestors(nodes: list[Node], anchor: Node) -> list[Node]:
    """The nodes, and what they are computed from, from the anchor on, in graph order."""
    late: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in late and not node < anchor:
            late.add(node)
            stack += node.all_input_nodes
    return [node for node in anchor.graph.nodes if node in late]
