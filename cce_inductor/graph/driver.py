"""The pass: finds the sites of a graph module, rewrites those it can, and reports on all of them."""

from torch.fx import Graph, GraphModule, Node

from ..options import Options
from ..report import Refusal, Report, log
from .effects import inside_transforms
from .logits import Refused
from .merge import merge_calls
from .rewrite import Rewriting, finish
from .sites import Site, find_sites, is_worth_reporting, orphan_losses, refusal, why_not


def rewrite_module(module: GraphModule, options: Options, nested: bool = False) -> Report:
    """Rewrites a module of Dynamo's in place, subgraphs of higher-order operators included; never raises.

    nested: a subgraph of a higher-order operator, which may run again for a backward, as a checkpoint does.
    A site that can't be rewritten leaves its part of the graph as it was, and the reason in the report.
    """
    report = Report()
    rewritings: list[Rewriting] = []
    try:
        _rewrite_graph(module.graph, options, report, rewritings, nested)
    except Exception as error:
        log.warning("the pass failed, the graph is compiled as it is", exc_info=True)
        for rewriting in reversed(rewritings):
            rewriting.undo()
        reason = f"the pass failed: {type(error).__name__}: {error}"
        report = Report(refused=[Refusal("", "cce_inductor", reason)])
    else:
        if rewritings:
            finish(module.graph, rewritings)
            merge_calls(module.graph)
            module.recompile()
    for _, child in module.named_children():
        if isinstance(child, GraphModule):
            report.extend(rewrite_module(child, options, nested=True))
    return report


def _rewrite_graph(graph: Graph, options: Options, report: Report, rewritings: list[Rewriting], nested: bool) -> None:
    transformed = inside_transforms(graph)
    sites = find_sites(graph)
    orphans = orphan_losses(graph, sites, transformed, options)
    worthwhile = [site for site in sites if is_worth_reporting(site, options)]
    # of two heads, two gradients of the weight would have to be kept until the backward
    once = not nested and len(worthwhile) == 1
    for site in worthwhile:
        result = _try_rewrite(site, transformed, options, once)
        if isinstance(result, Refusal):
            report.refused.append(result)
        else:
            rewritings.append(result)
            report.rewritten.append(result.report)
    report.refused += orphans
    if rewritings:
        graph.lint()


def _try_rewrite(site: Site, transformed: set[Node], options: Options, once: bool) -> Rewriting | Refusal:
    no = why_not(site, transformed, options)
    if no is not None:
        return no
    try:
        return Rewriting(site, options, once)
    except Refused as refused:
        reason = str(refused)
    except Exception as error:
        log.warning("a rewrite failed, the graph stays as it was", exc_info=True)
        reason = f"the rewrite failed: {type(error).__name__}: {error}"
    return refusal(site.logits.matmul, site.reductions[0].name, reason)
