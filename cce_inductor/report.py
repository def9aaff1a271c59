"""What the pass did to a graph, what it left alone and why: `Report`, its log lines, and collecting reports."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

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
    operator_calls: passes over the vocabulary that serve all of the losses.
    logits_bytes: what the logits would have taken, as they enter the loss, in this run.
    returned: what becomes of logits that the program returns too: "lazy", or "computed, because ..."; "" for none.
    """

    location: str
    losses: tuple[str, ...]
    shape: tuple[str, str, str]
    logit_map: str
    operator_calls: int
    logits_bytes: int | None
    returned: str = ""

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
    reason: one sentence that says why, and what would make it work where something would.
    by_choice: nothing is in the way, but there is too little to gain; `on_refusal` is about the others.
    """

    location: str
    operation: str
    reason: str
    by_choice: bool = False

    def __str__(self) -> str:
        return f"{_prefix(self.location)}{self.operation}: {self.reason}"


def _prefix(location: str) -> str:
    return f"{location}: " if location else ""


@dataclass
class Report:
    """What happened to one graph, or to all graphs of a function (`explain`)."""

    rewritten: list[Rewrite] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    graphs: int = 1

    def __str__(self) -> str:
        lines = [f"cce_inductor: {len(self.rewritten)} rewritten, {len(self.refused)} refused, {self.graphs} graph(s)"]
        lines += [f"  {rewrite}" for rewrite in self.rewritten]
        lines += [f"  left alone: {refusal}" for refusal in self.refused]
        if not self.rewritten and not self.refused:
            lines.append("  no loss over the logits of a classifier head was found")
        return "\n".join(lines)

    def extend(self, other: "Report") -> None:
        self.rewritten += other.rewritten
        self.refused += other.refused


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
