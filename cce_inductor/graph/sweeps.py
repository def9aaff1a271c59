"""Sweeps: which reductions of a site one operator call, one pass over the vocabulary, can serve."""

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from .effects import PURE, first_write, grad_modes, never_written_after
from .logits import DeferredLogits, Refused, Replay, Step
from .reductions import Reduction
from .registry import operation, tensor_of
from .sites import Site


@dataclass
class Sweep:
    """Reductions that one operator call serves: at most one tensor of targets and one total over the classes.

    They are of the same logits, or of some of their rows.
    """

    logits: DeferredLogits
    reductions: list[Reduction]  # in graph order
    grad_enabled: bool

    def find(self, attribute: str) -> Any:
        return next((value for r in self.reductions if (value := getattr(r, attribute)) is not None), None)

    @property
    def target(self) -> Node | None:
        return self.find("target")

    @property
    def several(self) -> bool:
        """Whether the targets are several classes of each row."""
        return any(reduction.several for reduction in self.reductions)

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
        same_target = (
            self.target is None
            or other.target is None
            or (_flat_source(self.target), self.several, self.find("ignore_index"), self.targets_from_end)
            == (_flat_source(other.target), other.several, other.ignore_index, other.from_end)
        )
        same_total = not (self.want_total and other.want_total) or self.find("total_weight") is other.total_weight
        if not (same_target and same_total):
            return False
        mine, its = self.logits, other.logits
        if not tensor_of(other.node).requires_grad:  # what has no gradient can be taken from what has one
            mine, its = _attached(mine), _attached(its)
        elif self.grad_enabled != grad_enabled:
            return False
        if _classes_key(mine) != _classes_key(its):
            return False
        return mine.hidden.flat() == its.hidden.flat() or (other.target is None and _some_rows(its, mine) is not None)

    def rows_of(self, reduction: Reduction) -> Replay | None:
        """What takes the rows of a reduction out of those of the sweep; None where it reads all in the same order.

        A replay on the sweep's hidden states, or on anything else that has these rows and a last dimension.
        """
        mine, its = _attached(self.logits), _attached(reduction.logits)
        return None if its.hidden.flat() == mine.hidden.flat() else _some_rows(its, mine)


def _classes_key(logits: DeferredLogits) -> tuple:
    """Equal for logits that differ in nothing but their rows."""
    return logits.weight, logits.biases, logits.logit_map


_ON_ROWS = {
    operator.getitem, torch.chunk, torch.detach, torch.flatten, torch.index_select, torch.narrow, torch.permute,
    torch.reshape, torch.select, torch.split, torch.tensor_split, torch.unbind, torch.unflatten, torch.unsqueeze,
}  # fmt: skip


def _some_rows(part: DeferredLogits, whole: DeferredLogits) -> Replay | None:
    """What takes the rows of a part out of those of the whole; None where that is not known."""
    steps = part.hidden.flat().steps_after(whole.hidden.flat())
    if not steps or any(step.args is None or step.function not in _ON_ROWS for step in steps):
        return None
    return Replay(whole.matmul, tuple(map(_of_width_one, steps)))


def _of_width_one(step: Step) -> Step:
    """A step for a last dimension of one: a reshape names the width of the hidden states."""
    if step.function is not torch.reshape or not step.args:
        return step
    [sizes] = step.args
    return replace(step, args=((*sizes[:-1], 1),))


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
    # those of all rows first, as they serve those of some
    for reduction in sorted(site.reductions, key=lambda r: len(_attached(r.logits).hidden.flat().steps)):
        grad_enabled = modes[reduction.node]
        if grad_enabled and not all(modes[node] for node in site.path(reduction.node)):
            raise Refused("the logits are computed without gradients and reduced with gradients enabled")
        admitting = (s for s in sweeps if s.admits(reduction, grad_enabled) and _make_available(reduction, s, modes))
        home = next(admitting, None)
        if home is None:
            sweeps.append(Sweep(reduction.logits, [reduction], grad_enabled))
        else:
            home.reductions = sorted([*home.reductions, reduction], key=lambda r: r.node)
    return sorted(sweeps, key=lambda sweep: sweep.reductions[0].node)


def _make_available(reduction: Reduction, sweep: Sweep, modes: dict[Node, bool]) -> bool:
    """Moves the preparation of targets before the first reduction of a sweep; whether that was possible."""
    anchor = min(sweep.reductions[0].node, reduction.node)
    if modes[anchor] != sweep.grad_enabled:
        return False
    inputs = (sweep.target, sweep.find("total_weight"), reduction.target, reduction.total_weight)
    late = _late_ancestors([node for node in inputs if node is not None], anchor)
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
