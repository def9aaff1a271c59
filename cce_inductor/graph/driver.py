"""The pass: finds the sites of a graph module, rewrites those it can, and reports on all of them."""

from dataclasses import replace

import torch
from torch.fx import Graph, GraphModule, Node

from ..compat import graph_break
from ..options import Options
from ..report import Refusal, Report, log
from .effects import grad_mode_of_calls, inside_transforms
from .logits import Refused
from .merge import merge_calls
from .returned import LazyResults
from .rewrite import Rewriting, finish
from .sites import Site, find_sites, is_worth_reporting, orphan_losses, refusal, why_not

MATERIALIZE = 'the option logits is "materialize"'
SUBGRAPH = "they leave a subgraph of the program (a checkpoint, for instance)"
BUG = "this is a bug of cce_inductor: report it with the traceback that is in the log"
NO_CALLER = "the pass runs inside Inductor here, which does not hand lazy logits on"


def rewrite_module(module: GraphModule, options: Options, lazy: LazyResults | None = None, once: bool = True) -> Report:
    """Rewrites a module of Dynamo's in place, subgraphs of higher-order operators included; never raises.

    A site that can't be rewritten leaves its part of the graph as it was, and the reason in the report.
    lazy: takes the logits among the module's results that the caller is to make; without it they are computed.
    once: whether gradients may be computed in the forward, with the loss.
    """
    not_lazy = MATERIALIZE if options.logits == "materialize" else NO_CALLER if lazy is None else None
    report = _rewrite_module(module, options, lazy, not_lazy, once)
    where = graph_break(module)
    report.breaks = [] if where is None else [where]
    return report


def _rewrite_module(
    module: GraphModule, options: Options, lazy: LazyResults | None, not_lazy: str | None, once: bool
) -> Report:
    report = Report()
    rewritings: list[Rewriting] = []
    try:
        _rewrite_graph(module.graph, options, not_lazy, report, rewritings, once)
    except Exception as error:
        log.warning("the pass failed, the graph is compiled as it is", exc_info=True)
        for rewriting in reversed(rewritings):
            rewriting.undo()
        report = _failed(error)
    else:
        if rewritings:
            _finish(module.graph, rewritings, report)
            module.recompile()
        if lazy is not None:
            lazy.found += [result for rewriting in rewritings for result in rewriting.lazy]
    for name, child in module.named_children():
        if isinstance(child, GraphModule):
            report.extend(_rewrite_child(module.graph, name, child, options, not_lazy or SUBGRAPH))
    return report


def _rewrite_child(graph: Graph, name: str, child: GraphModule, options: Options, not_lazy: str) -> Report:
    """The same for a subgraph that a graph calls by its name. It may run again for a backward, as a checkpoint does."""
    try:
        grad_enabled = grad_mode_of_calls(graph, name)
    except Exception as error:
        log.warning("the pass failed, a subgraph is compiled as it is", exc_info=True)
        return _failed(error)
    with torch.set_grad_enabled(grad_enabled):
        return _rewrite_module(child, options, None, not_lazy, once=False)


def _failed(error: Exception) -> Report:
    return Report(
        refused=[Refusal("", "cce_inductor", f"the pass failed: {type(error).__name__}: {error}", advice=BUG)]
    )


def _finish(graph: Graph, rewritings: list[Rewriting], report: Report) -> None:
    """Removes what is not used any longer, and joins operator calls. Where that fails, the program is right too."""
    try:
        finish(graph, rewritings)
        joined = merge_calls(graph)
        calls = [len({joined.get(call, call) for call in rewriting.calls}) for rewriting in rewritings]
        report.rewritten = [replace(r, operator_calls=n) for r, n in zip(report.rewritten, calls, strict=True)]
    except Exception:
        log.warning("tidying up failed, the graph stays as it is rewritten", exc_info=True)


def _rewrite_graph(
    graph: Graph, options: Options, not_lazy: str | None, report: Report, rewritings: list[Rewriting], once: bool
) -> None:
    transformed = inside_transforms(graph)
    sites = find_sites(graph)
    orphans = orphan_losses(graph, sites, transformed, options)
    worthwhile = [site for site in sites if is_worth_reporting(site, options)]
    # of two heads, two gradients of the weight would have to be kept until the backward
    once = once and len(worthwhile) == 1
    for site in worthwhile:
        joined = [other for other in worthwhile if other.logits.weight == site.logits.weight]
        result = _try_rewrite(site, joined, transformed, options, once, not_lazy)
        if isinstance(result, Refusal):
            report.refused.append(result)
        else:
            rewritings.append(result)
            report.rewritten.append(result.report)
    report.refused += orphans
    if rewritings:
        graph.lint()


def _try_rewrite(
    site: Site, joined: list[Site], transformed: set[Node], options: Options, once: bool, not_lazy: str | None
) -> Rewriting | Refusal:
    no = why_not(site, joined, transformed, options)
    if no is not None:
        return no
    name = site.reductions[0].name
    try:
        return Rewriting(site, options, once, not_lazy)
    except Refused as refused:
        return refusal(site.logits.matmul, name, str(refused), of=site)
    except Exception as error:
        log.warning("a rewrite failed, the graph stays as it was", exc_info=True)
        reason = f"the rewrite failed: {type(error).__name__}: {error}"
        return refusal(site.logits.matmul, name, reason, of=site, advice=BUG)
