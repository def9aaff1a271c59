"""What the pass did to a graph, what it left alone and why: `Report`, its log lines, and collecting reports."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .compat import artifact_logger
from .options import OnRefusal

log = artifact_logger("cce_inductor", "losses that cce_inductor rewrote, and those it left alone with the reason")


class RefusedError(RuntimeError):
    """Raised under `on_refusal="raise"` where a loss was found and can't be rewritten; says why and what would help.

    What a compiled function raises is torch's `BackendCompilerFailed` with this as its `inner_exception`.
    """


@dataclass(frozen=True)
class Rewrite:
    """One classifier head whose logits are no longer computed in memory.

    location: "file:line" of the matmul in the user's program, or "" where unknown.
    losses: the reductions that were rewritten, for example ("cross_entropy", "logsumexp").
    shape: (rows N, vocabulary V, hidden width D); a size that is dynamic is printed by its symbol.
    logit_map: the pointwise function between matmul and loss, "z" where there is none.
    operator_calls: passes over the vocabulary that serve all of the losses; other heads on the same weight may share
        them.
    logits_bytes: what the logits would have taken, as they enter the loss, in this run.
    returned: what becomes of logits that the program returns too: "lazy", or "computed, because ..."; "" for none.
    chain: the way of the logits in words: "lm_head [V=50304, D=768] -> float32 -> mean cross-entropy, ignore_index -1".
    graph: which of the report's graphs it is in, from 1.
    """

    location: str
    losses: tuple[str, ...]
    shape: tuple[str, str, str]
    logit_map: str
    operator_calls: int
    logits_bytes: int | None
    returned: str = ""
    chain: str = ""
    graph: int = 1

    @property
    def saved_bytes(self) -> int | None:
        """The logits that are not stored, an estimate of what is saved; the logits' gradient and copies come on top."""
        return 0 if self.returned.startswith("computed") else self.logits_bytes

    def __str__(self) -> str:
        rows, vocab, width = self.shape
        text = f"{_prefix(self.location)}rewrote {' + '.join(self.losses)} of [{rows}, {vocab}] logits (width {width})"
        if self.logit_map != "z":
            text += f", logit map {self.logit_map}"
        if self.returned.startswith("computed"):
            return f"{text}; the logits that are returned are {self.returned}"
        if self.logits_bytes is not None:
            text += f": {self.logits_bytes / 2**20:,.1f} MiB of logits are never stored"
        return text + (", those returned are lazy" if self.returned else "")


@dataclass(frozen=True)
class Refusal:
    """One loss that was found and left as it was.

    location: "file:line" of the operation in the way, or "" where unknown.
    operation: the operation in the way, for example "softmax".
    reason: one sentence that says why.
    by_choice: nothing is in the way, but there is too little to gain; `on_refusal` is about the others.
    advice: what would make it work; "" where nothing is known to.
    chain: the way of the logits to the operation in words, as in `Rewrite`; "" where it is not known.
    matmul: "file:line" of the product that made the logits, or "" where no product is known.
    graph: which of the report's graphs it is in, from 1.
    """

    location: str
    operation: str
    reason: str
    by_choice: bool = False
    advice: str = ""
    chain: str = ""
    matmul: str = ""
    graph: int = 1

    def __str__(self) -> str:
        advice = f"; {self.advice}" if self.advice else ""
        return f"{_prefix(self.location)}{self.operation}: {self.reason}{advice}"


def _prefix(location: str) -> str:
    return f"{location}: " if location else ""


NOTHING = "no loss over the logits of a classifier head was found"
NOTHING_ADVICE = "compile head and loss together, as one function that calls the model and then the loss"
NOT_TRACED = 'Dynamo leaves a part of the program uncompiled; TORCH_LOGS="graph_breaks" prints where and why'
NO_GRAPH = "nothing was compiled; is torch.compile turned off (TORCHDYNAMO_DISABLE, TORCH_COMPILE_DISABLE)?"


@dataclass
class Report:
    """What happened to one graph, or to all graphs of a function (`explain`).

    Read it printed, as a table where rich prints it (`rich.print(report)`), or as `to_dict()` and `to_json()`.
    """

    rewritten: list[Rewrite] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    graphs: int = 1
    breaks: list[str] = field(default_factory=list)  # where and why Dynamo ended graphs early: "file:line: reason"

    @property
    def title(self) -> str:
        return f"cce_inductor: {len(self.rewritten)} rewritten, {len(self.refused)} refused, {self.graphs} graph(s)"

    def __str__(self) -> str:
        lines = [self.title]
        for graph, entries in self._by_graph().items():
            lines += [f"  graph {graph}:"] if self._tells_graphs_apart() else []
            lines += [line for entry in entries for line in _lines(entry)]
        return "\n".join(lines + [f"  {line}" for line in self._closing()])

    @property
    def _entries(self) -> list[Rewrite | Refusal]:
        return [*self.rewritten, *self.refused]

    def _by_graph(self) -> dict[int, list[Rewrite | Refusal]]:
        found: dict[int, list[Rewrite | Refusal]] = {}
        for entry in sorted(self._entries, key=lambda entry: entry.graph):
            found.setdefault(entry.graph, []).append(entry)
        return found

    def _tells_graphs_apart(self) -> bool:
        return any(entry.graph > 1 for entry in self._entries)

    def _closing(self) -> list[str]:
        """What is to be said of the program as a whole where nothing is rewritten."""
        if self.graphs == 0:
            return [NO_GRAPH]
        lines = [] if self._entries else [NOTHING, f"what to do: {NOTHING_ADVICE}"]
        if self.graphs > 1 and not self.rewritten:
            ends = [f"Dynamo ends a graph at {where}" for where in dict.fromkeys(self.breaks)]
            lines += ends or [NOT_TRACED]
        return lines

    def __rich__(self) -> Any:
        from rich.markup import escape
        from rich.table import Table

        table = Table("where", "logits", "outcome", "saved", title=self.title, title_justify="left", show_lines=True)
        table.columns[0].overflow = "fold"
        for graph, entries in self._by_graph().items():
            for entry in entries:
                where = entry.location + (f" (graph {graph})" if self._tells_graphs_apart() else "")
                row = [where, entry.chain, _outcome(entry), _saved(entry)]
                table.add_row(*map(escape, row), style="" if isinstance(entry, Rewrite) else "yellow")
        table.caption = "\n".join(self._closing()) or None
        return table

    def to_dict(self) -> dict[str, Any]:
        """All of it as dicts, lists, strings and numbers.

        {"graphs", "breaks", "saved_bytes",
        "rewritten": [the fields of `Rewrite`, "saved_bytes"], "refused": [those of `Refusal`]}
        """
        rewritten = [asdict(rewrite) | {"saved_bytes": rewrite.saved_bytes} for rewrite in self.rewritten]
        return {
            "graphs": self.graphs,
            "breaks": self.breaks,
            "saved_bytes": sum(rewrite.saved_bytes or 0 for rewrite in self.rewritten),
            "rewritten": rewritten,
            "refused": [asdict(refusal) for refusal in self.refused],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def extend(self, other: "Report") -> None:
        """Adds what happened to a part of the same graph."""
        self.rewritten += other.rewritten
        self.refused += other.refused

    def add_graph(self, other: "Report") -> None:
        """Adds what happened to one more graph."""
        self.graphs += 1
        self.breaks = [*self.breaks, *other.breaks]
        self.rewritten += [replace(rewrite, graph=self.graphs) for rewrite in other.rewritten]
        self.refused += [replace(refusal, graph=self.graphs) for refusal in other.refused]


def _lines(entry: Rewrite | Refusal) -> list[str]:
    """An entry of the printed report."""
    below = [entry.chain] if entry.chain else []
    if isinstance(entry, Rewrite):
        first = f"  {entry}"
    else:
        first = f"  left alone: {replace(entry, advice='')}"
        if entry.chain and entry.matmul not in ("", entry.location):
            below = [f"{entry.chain} (the product: {entry.matmul})"]
        below += [f"what to do: {entry.advice}"] if entry.advice else []
    return [first, *(f"      {line}" for line in below)]


def _outcome(entry: Rewrite | Refusal) -> str:
    if isinstance(entry, Refusal):
        return f"left alone: {entry.operation}: {entry.reason}" + (f"\n{entry.advice}" if entry.advice else "")
    return "rewritten" + (f"; returned logits are {entry.returned}" if entry.returned else "")


def _saved(entry: Rewrite | Refusal) -> str:
    saved = entry.saved_bytes if isinstance(entry, Rewrite) else None
    return "" if saved is None else f"{saved / 2**20:,.1f} MiB"


_collectors: list[list[Report]] = []


@contextlib.contextmanager
def capture_reports() -> Iterator[list[Report]]:
    """Collects the report of every graph that is compiled inside the block, in order; one `Report` a graph.

    A graph that comes from a cache of compiled code is not compiled and so not reported.
    """
    reports: list[Report] = []
    _collectors.append(reports)
    try:
        yield reports
    finally:
        _collectors.remove(reports)


def publish(report: Report, on_refusal: OnRefusal) -> None:
    """Logs a report, hands it to the collectors, and warns or raises `RefusedError` as the option says."""
    for rewrite in report.rewritten:
        log.info("%s", rewrite)
    for refusal in report.refused:
        log.info("left alone: %s", refusal)
    for reports in _collectors:
        reports.append(report)
    in_the_way = [refusal for refusal in report.refused if not refusal.by_choice]
    if in_the_way and on_refusal != "log":
        message = "\n".join(["cce_inductor left a loss as it was:", *map(str, in_the_way)])
        if on_refusal == "raise":
            raise RefusedError(message)
        warnings.warn(message, stacklevel=2)
