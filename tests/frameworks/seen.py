"""A backend for whole models: the pass without Inductor, which takes long, and what the pass did."""

from collections.abc import Callable
from typing import Any

from helpers import EVERYTHING, Snapshot
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule

from cce_inductor import Report, Rewrite
from cce_inductor.graph.driver import rewrite_module
from cce_inductor.graph.returned import LazyResults


class Seen:
    """The backend, and what it saw: a report and a snapshot of each graph."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.graphs: list[Snapshot] = []

    def __call__(self, module: GraphModule, inputs: list[Any]) -> Callable:
        lazy = LazyResults(module.graph)
        self.reports.append(rewrite_module(module, EVERYTHING, lazy))
        self.graphs.append(Snapshot.of(module))
        return lazy.around(aot_eager(module, inputs))

    @property
    def report(self) -> Report:
        """Of all graphs."""
        total = Report(graphs=0)
        for report in self.reports:
            total.add_graph(report)
        return total

    @property
    def rewritten(self) -> list[Rewrite]:
        return self.report.rewritten
