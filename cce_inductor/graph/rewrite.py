"""Rewrites a site: emits operator calls and loss arithmetic, compares the results, then lets the old nodes go.

Every step can be undone until the old nodes go, and by then nothing is left that could fail.
"""

import functools
import operator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy

from ..compat import fix, statically_equal
from ..ops.library import scaled_loss, vocab_reductions
from ..ops.problem import Reductions
from ..options import Options
from ..report import Rewrite
from . import in_forward, words
from .effects import first_write, with_makers, written
from .emitter import Emitter
from .logits import Refused
from .reductions import Reduction, Results
from .registry import operation, tensor_of
from .returned import LazyResult, return_operands
from .sites import Site, location, logits_bytes
from .sweeps import Sweep, sweeps_of


class Rewriting:
    """One site with the new nodes in use and the old ones still there. `undo()` or `finish` ends it."""

    def __init__(self, site: Site, options: Options, once: bool, not_lazy: str | None) -> None:
        """Raises `Refused`, or whatever went wrong, with the graph as it was.

        once: whether the gradients may be computed in the forward: it is the only head that needs some, and the
            forward does not run again for the backward, as in a checkpoint.
        not_lazy: why logits among the graph's results are to be computed; None where they may become `self.lazy`.
        """
        self._site = site
        self._graph = site.logits.matmul.graph
        self._order = list(self._graph.nodes)
        self._emitter = Emitter(self._graph)
        self._replaced: list[tuple[Node, Node, list[Node]]] = []
        self._results: Any = None  # as they were when only the reductions were replaced
        self.lazy: list[LazyResult] = []
        try:
            self.report = self._rewrite(options, once, not_lazy)
        except BaseException:
            self.undo()
            raise

    def _rewrite(self, options: Options, once: bool, not_lazy: str | None) -> Rewrite:
        sweeps = sweeps_of(self._site)
        once = once and sum(sweep.grad_enabled for sweep in sweeps) == 1
        replacements = [pair for sweep in sweeps for pair in _emit(sweep, self._site, self._emitter, options, once)]
        for node, replacement in replacements:
            _require_same(node, replacement)
        in_use = [reduction.logits for reduction in self._site.reductions] + list(self._site.returned.values())
        for number in (number for logits in in_use for number in logits.assumed):
            fix(number)
        for node, replacement in replacements:
            self._replaced.append((node, replacement, list(node.users)))
            node.replace_all_uses_with(replacement)
        return _describe(self._site, len(self.calls), self._return_logits(not_lazy))

    def _return_logits(self, not_lazy: str | None) -> str:
        """Lazily where that is possible; what became of them, in words."""
        self._results = self._graph.output_node().args
        computed = []
        for node, logits in self._site.returned.items():
            try:
                if not_lazy is not None:
                    raise Refused(not_lazy)
                self.lazy.append(return_operands(self._site, node, logits, self._emitter))
            except Refused as reason:
                computed.append(str(reason))
        if computed:
            return f"computed, because {computed[0]}"
        return "lazy" if self.lazy else ""

    def undo(self) -> None:
        """Leaves the graph as it was."""
        if self._results is not None:
            self._graph.output_node().args = self._results
        for node, replacement, users in reversed(self._replaced):
            for user in users:
                user.replace_input_with(replacement, node)
        self._emitter.undo()
        for node in self._order:  # some may have moved
            self._graph.output_node().prepend(node)

    @property
    def calls(self) -> list[Node]:
        """The operator calls that it makes."""
        return [node for node in self._emitter.nodes if node.target in (vocab_reductions, scaled_loss)]

    @property
    def loose(self) -> set[Node]:
        """The nodes that the rewrite leaves behind, or has made, some of them unused."""
        return {*with_makers(self._site.chain), *self._emitter.nodes}


def finish(graph: Graph, rewritings: list[Rewriting]) -> None:
    """Erases what is no longer used. What several sites share goes when the last of them needs it no more."""
    unused = {node for rewriting in rewritings for node in rewriting.loose}
    while True:
        # a write in place is a use of what it writes
        used = {node for node in unused if any(not unused.issuperset(n.users) for n in (node, *written(node)))}
        if not used:
            break
        unused -= used
    for node in reversed(list(graph.nodes)):
        if node in unused:
            graph.erase_node(node)


def _emit(sweep: Sweep, site: Site, emitter: Emitter, options: Options, once: bool) -> list[tuple[Node, Node]]:
    """(old node, its replacement) for each reduction of a sweep."""
    anchor = sweep.reductions[0].node
    logits = sweep.logits
    _require_unwritten(logits.operands(), site.logits.matmul, anchor)
    if sweep.grad_enabled:  # our backward reads the biases, which the program's does not
        biases = [node for bias in logits.biases for node in bias.operands()]
        _require_unwritten(biases, anchor, anchor.graph.output_node())
    with emitter.at(anchor, sweep.grad_enabled):
        flat_target = _flat_target(sweep, emitter)
        factors = (
            emitter.as_matrix(logits.hidden.flat().emit(emitter.call)),
            logits.weight.emit(emitter.call),
            emitter.sum([bias.emit(emitter.call) for bias in logits.biases]),
        )
        if flat_target is not None and once and in_forward.applies(sweep, factors, options):
            loss = in_forward.emit(sweep.reductions[0], factors, flat_target, emitter, options)
            return [(anchor, _in_dtype_of(anchor, loss))]
        outputs = emitter.call(
            vocab_reductions,
            *factors,
            flat_target,
            sweep.find("total_weight"),
            logit_map=str(logits.logit_map),
            want_total=sweep.want_total,
            ignore_index=sweep.find("ignore_index"),
            compute_dtype=logits.compute_dtype,
            workspace_mib=options.workspace_mib,
            approximate_mass=float(options.approximate_mass),
            skip_ignored=not sweep.reads_ignored,
            want_max=sweep.want_max,
            want_entropy=sweep.want_entropy,
        )
        given = {
            name: emitter.proxy(emitter.call(operator.getitem, outputs, i))
            for i, name in enumerate(Reductions._fields)
            if name not in ("tile_lse", "tile_tops")
        }
    pairs = []
    for reduction in sweep.reductions:
        node = reduction.node
        reads = [n for n in node.all_input_nodes if n not in site.chain and tensor_of(n) is not None]
        _require_unwritten(reads, anchor, node)
        with emitter.at(node, sweep.grad_enabled):
            results = Results(
                **_rows_of(reduction, sweep, given, emitter),
                target=None if flat_target is None else emitter.proxy(flat_target),
                rows=functools.partial(emitter.rows, reduction.logits.hidden),
                proxy=emitter.proxy,
            )
            value = _in_dtype_of(node, reduction.build(results))
            if tensor_of(value).requires_grad and not tensor_of(node).requires_grad:
                value = emitter.call(torch.detach, value)
            pairs.append((node, value))
    return pairs


def _rows_of(reduction: Reduction, sweep: Sweep, given: dict[str, Proxy], emitter: Emitter) -> dict[str, Proxy]:
    """The results for the rows that a reduction reads: what took them from the hidden states takes them from these."""
    taken = sweep.rows_of(reduction)
    if taken is None:
        return given
    wanted = {"lse", "lse_rest"}
    wanted |= {"total"} if reduction.want_total else set()
    wanted |= {"maximum", "argmax"} if reduction.want_max else set()
    wanted |= {"entropy"} if reduction.want_entropy else set()
    _require_unwritten(taken.operands(), sweep.logits.matmul, reduction.node)
    rows = emitter.rows(sweep.logits.hidden.flat())
    of_all = {name: given[name].view_as(rows).unsqueeze(-1).node for name in wanted}
    of_some = {name: replace(taken, source=node).emit(emitter.call) for name, node in of_all.items()}
    return given | {name: emitter.proxy(node).flatten() for name, node in of_some.items()}


def _in_dtype_of(node: Node, value: Proxy) -> Node:
    dtype = tensor_of(node).dtype
    return value.node if tensor_of(value.node).dtype == dtype else value.to(dtype).node


def _flat_target(sweep: Sweep, emitter: Emitter) -> Node | None:
    """The classes [N], or [N, K], as the operator takes them: int64, none negative but what is ignored."""
    if sweep.target is None:
        return None
    flat = emitter.as_matrix(sweep.target) if sweep.several else emitter.call(torch.flatten, sweep.target)
    flat = flat if tensor_of(flat).dtype == torch.int64 else emitter.call(torch.Tensor.long, flat)
    if not sweep.targets_from_end:
        return flat
    from_start = emitter.call(torch.add, flat, sweep.logits.vocab_size)
    return emitter.call(torch.where, emitter.call(torch.lt, flat, 0), from_start, flat)


def _require_unwritten(tensors: list[Node], after: Node, before: Node) -> None:
    """An operand must not change between the place where the program reads it and the place where we do."""
    nodes = list(after.graph.nodes)
    write = first_write(nodes[nodes.index(after) + 1 : nodes.index(before)], tensors)
    if write is not None:
        raise Refused(
            f"`{operation(write)}` at {location(write)} changes an operand in place that the loss is computed from; "
            "write after the loss, or to a clone"
        )


def _require_same(node: Node, replacement: Node) -> None:
    old, new = tensor_of(node), tensor_of(replacement)
    same_shape = old.dim() == new.dim() and all(map(statically_equal, old.shape, new.shape))
    if not same_shape or (old.dtype, old.device, old.requires_grad) != (
        new.dtype,
        new.device,
        new.requires_grad,
    ):
        raise AssertionError(
            f"{operation(node)} gives {tuple(old.shape)} {old.dtype} {old.device} requires_grad={old.requires_grad}, "
            f"its replacement {tuple(new.shape)} {new.dtype} {new.device} requires_grad={new.requires_grad}"
        )


def _describe(site: Site, operator_calls: int, returned: str) -> Rewrite:
    logits = site.logits
    rows = " x ".join(str(size) for size in logits.row_shape) or "1"
    return Rewrite(
        location=location(logits.matmul),
        losses=tuple(dict.fromkeys(reduction.name for reduction in site.reductions)),
        shape=(rows, str(site.reductions[0].logits.vocab_size), str(logits.width)),
        logit_map=str(site.reductions[0].logits.logit_map),
        operator_calls=operator_calls,
        logits_bytes=logits_bytes(site),
        returned=returned,
        chain=words.chain(site),
    )
