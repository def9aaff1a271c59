"""The pass: finds the sites of a graph module, rewrites those it can, and reports on all of them."""

import copy

from torch.fx import GraphModule, Node

from ..options import Options
from ..report import Refusal, Report, log
from .effects import inside_transforms
from .logits import Refused
from .rewrite import rewrite
from .sites import Site, find_sites, is_worth_reporting, orphan_losses, refusal, why_not


def rewrite_module(module: GraphModule, options: Options) -> Report:
    """Rewrites a module of Dynamo's in place, subgraphs of higher-order operators included; never raises.

    A site that can't be rewritten leaves its part of the graph as it was, and the reason in the report.
    """
    report = Report()
    original = None
    try:
        original = copy.deepcopy(module.graph)
        _rewrite_graph(module, options, report)
    except Exception as error:
        log.warning("the pass failed, the graph is compiled as it is", exc_info=True)
        reason = f"the pass failed: {type(error).__name__}: {error}"
        report = Report(refused=[Refusal("", "cce_inductor", reason)])
        if original is not None:
            module.graph = original
    for _, child in module.named_children():
        if isinstance(child, GraphModule):
            report.extend(rewrite_module(child, options))
    return report


def _rewrite_graph(module: GraphModule, options: Options, report: Report) -> None:
    graph = module.graph
    transformed = inside_transforms(graph)
    sites = find_sites(graph)
    orphans = orphan_losses(graph, sites, transformed, options)
    for site in filter(lambda site: is_worth_reporting(site, options), sites):
        _try_rewrite(site, transformed, options, report)
    report.refused += orphans
    if report.rewritten:
        graph.lint()
        module.recompile()


def _try_rewrite(site: Site, transformed: set[Node], options: Options, report: Report) -> None:
    no = why_not(site, transformed, options)
    if no is None:
        try:
            report.rewritten.append(rewrite(site, options))
            return
        except Refused as refused:
            no = refusal(site.logits.matmul, site.reductions[0].name, str(refused))
        except Exception as error:
            log.warning("a rewrite failed, the graph stays as it was", exc_info=True)
            no = refusal(
                site.logits.matmul,
                site.reductions[0].name,
                f"the rewrite failed: {type(error).__name__}: {error}",
            )
    report.refused.append(no)
