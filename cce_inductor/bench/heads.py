"""The main measurement: every method on every combination of shape, data and share of masked rows."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cce_inductor

from ..ops.activity import activity
from . import measure
from .data import make_data, mask_targets, read_head
from .measure import Inputs, Reference
from .methods import BASELINE, METHODS, Method, UnavailableError, logit_map
from .shapes import Shape

Row = dict[str, Any]

BARE = "product"
"""The name of the row of the one matrix product that the others are compared with."""


@dataclass
class Budget:
    """Seconds that may be spent; what comes later is skipped."""

    seconds: float

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.seconds

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise UnavailableError("the time budget is spent")


@dataclass(frozen=True)
class Case:
    """One problem. head: a file to read hidden, weight and target from, instead of making them. softcap: of logits."""

    shape: Shape
    data: str
    masked: float
    head: Path | None = None
    softcap: float | None = None

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        """(hidden, weight, target) on the device, the first two with requires_grad."""
        if self.head:
            hidden, weight, target = read_head(self.head, device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        else:
            hidden, weight, target = make_data(self.data, self.shape, dtype, device)
        return hidden.requires_grad_(), weight.requires_grad_(), mask_targets(target, self.masked)

    def about(self, inputs: Inputs) -> Row:
        (rows, width), vocab = inputs[0].shape, inputs[1].shape[0]
        data = self.data if self.softcap is None else f"{self.data}, logits capped at {self.softcap:g}"
        return {"rows": rows, "vocab": vocab, "width": width, "data": data, "masked": self.masked}


def run(
    cases: list[Case], names: list[str], dtype: torch.dtype, device: str, seconds: float, budget: Budget
) -> Iterator[Row]:
    """Rows as they are measured. Each method is built, measured and freed before the next."""
    done: list[Row] = []
    for case in cases:
        try:
            budget.check()
        except UnavailableError as error:
            yield {"data": case.data, "masked": case.masked, "method": "all", "skipped": str(error)}
            continue
        for row in _run_case(case, names, dtype, device, seconds, budget):
            row |= _ratios(row, done)
            done.append(row)
            yield row


def _run_case(
    case: Case, names: list[str], dtype: torch.dtype, device: str, seconds: float, budget: Budget
) -> Iterator[Row]:
    inputs = case.inputs(dtype, device)
    hidden, weight, target = (tensor.detach() for tensor in inputs)
    reference = Reference.of(hidden, weight, target, case.softcap)
    about = case.about(inputs)
    product, ceiling = measure.bare_product(hidden, weight, seconds)
    yield about | {"method": BARE, "tflops": ceiling} | _timed("forward", product)
    for name in names:
        measured = attempt(budget, _measure, METHODS[name], case.softcap, inputs, reference, seconds, ceiling)
        yield about | {"method": name} | measured


def attempt(budget: Budget, measurement: Callable[..., Row], *arguments: Any) -> Row:
    """The figures, or why there are none; whatever a method raises, the others are measured."""
    torch.compiler.reset()
    measure.free_memory()
    try:
        budget.check()
        return measurement(*arguments)
    except UnavailableError as error:
        return {"skipped": str(error)}
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        return {"skipped": f"{type(error).__name__}: {reason[0][:200]}"}


def _measure(
    method: Method, softcap: float | None, inputs: Inputs, reference: Reference, seconds: float, ceiling: float
) -> Row:
    device = inputs[0].device.type
    loss = method.make(softcap)

    def both() -> tuple[Tensor, Tensor, Tensor]:
        return measure.forward_and_backward(loss, inputs)

    with cce_inductor.capture_reports() as reports:
        begin = time.perf_counter()
        first = both()
        errors = reference.errors(*first)
        compile_seconds = time.perf_counter() - begin
    del first
    peak = measure.peak_mib(both, device)
    both_times = measure.times(both, device, seconds)
    forward_times = measure.times(lambda: measure.forward(loss, inputs), device, seconds)
    sizes = (inputs[0].shape[0], *inputs[1].shape)
    tflops = measure.teraflops(3, sizes, both_times.median)
    row = _timed("forward", forward_times) | _timed("both", both_times)
    row |= {"peak_mib": peak, "first_call_s": compile_seconds, "tflops": tflops, "of_ceiling": tflops / ceiling}
    if method.ours:
        if reports:
            row["rewrites"] = sum(len(report.rewritten) for report in reports)
        if (active := activity(*inputs, method.approximate_mass, logit_map(softcap))) is not None:
            row |= {f"active_{name}": share for name, share in active._asdict().items()}
    return row | errors


def _timed(name: str, times: measure.Times) -> Row:
    return {f"{name}_ms": times.median, f"{name}_spread_ms": times.spread, f"{name}_runs": times.runs}


def _ratios(row: Row, done: list[Row]) -> Row:
    """Times as multiples of torch.compile's on the same problem, and of the same method's without masked rows."""
    if "skipped" in row or row["method"] == BARE:
        return {}
    keys = ("rows", "vocab", "width", "data")
    same = [r for r in [*done, row] if "both_ms" in r and all(r[key] == row[key] for key in keys)]
    ratios: Row = {}
    for other in same:
        if other["method"] == BASELINE and other["masked"] == row["masked"]:
            ratios |= {f"{name}_of_compile": row[f"{name}_ms"] / other[f"{name}_ms"] for name in ("forward", "both")}
        if other["method"] == row["method"] and other["masked"] == 0 < row["masked"]:
            ratios["both_of_unmasked"] = row["both_ms"] / other["both_ms"]
    return ratios
