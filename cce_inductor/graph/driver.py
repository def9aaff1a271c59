"""The pass: finds the sites of a graph module, rewrites those it can, and reports on all of them."""

from torch.fx import GraphModule

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
    try:
        _rewrite_graph(module, options, report)
    except Exception as error:
        log.warning("the pass failed, the graph is compiled as it is", exc_info=True)
        report.refused.append(Refusal("", "cce_inductor", f"the pass failed: {type(error).__name__}: {error}"))
    for _, child in module.named_children():
        if isinstance(child, GraphModule):
            report.extend(rewrite_module(child, options))
    return report


def _rewrite_graph(module: GraphModule, options: Options, report: Report) -> None:
    graph = module.graph
    sites = find_sites(graph)
    transformed = inside_transforms(graph)
    orphans = orphan_losses(graph, sites, options)
    for site in sites:
        if not is_worth_reporting(site, options):
            continue
        if not transformed.isdisjoint(site.chain):
            reason = "the loss is computed under a torch.func transform; the operators have no rules for those"
            report.refused.append(refusal(site.logits.matmul, "torch.func", reason))
            continue
        _try_rewrite(site, options, report)
    report.refused += orphans
    if report.rewritten:
        graph.lint()
        module.recompile()


def _try_rewrite(site: Site, options: Options, report: Report) -> None:
    no = why_not(site, options)
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
