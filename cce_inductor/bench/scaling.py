"""`--scaling`: time and memory of one head as N grows, and as V grows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import measure
from .data import make_data
from .heads import Budget, Row, attempt
from .measure import Inputs
from .methods import METHODS
from .shapes import Shape
from .show import new_figure

MOST_DISTINCT_ROWS = 8192  # made; a longer batch repeats them
FEWEST_ROWS, MOST_ROWS, FEWEST_VOCAB = 1024, 131072, 8192


def run(
    shape: Shape, data: str, names: list[str], dtype: torch.dtype, device: str, seconds: float, budget: Budget
) -> Iterator[Row]:
    """Rows as they are measured: N from 1024 to 131072 at the shape's V, then V from 8192 to the shape's at its N.

    Both ranges are cut to what a small shape has room for. A method that ran out of memory is not tried on more.
    """
    row_counts = _doublings(min(FEWEST_ROWS, shape.rows), MOST_ROWS if shape.rows >= MOST_DISTINCT_ROWS else shape.rows)
    vocabs = _doublings(min(FEWEST_VOCAB, shape.vocab), shape.vocab)
    made = Shape(min(shape.rows, MOST_DISTINCT_ROWS), shape.vocab, shape.width)
    hidden, weight, target = make_data(data, made, dtype, device)
    exhausted: set[str] = set()
    for rows in row_counts:
        places = torch.arange(rows, device=device) % made.rows
        yield from _at("N", (hidden[places], weight, target[places]), names, exhausted, seconds, budget)
    exhausted.clear()
    del weight
    for vocab in vocabs:
        inputs = make_data(data, Shape(made.rows, vocab, shape.width), dtype, device)
        yield from _at("V", inputs, names, exhausted, seconds, budget)


def _doublings(first: int, last: int) -> list[int]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return [*sizes, last]


def _at(
    sweep: str, inputs: Inputs, names: list[str], exhausted: set[str], seconds: float, budget: Budget
) -> Iterator[Row]:
    hidden, weight, target = inputs
    inputs = hidden.requires_grad_(), weight.requires_grad_(), target
    about = {"sweep": sweep, "rows": hidden.shape[0], "vocab": weight.shape[0], "width": weight.shape[1]}
    for name in names:
        if name in exhausted:
            figures: Row = {"skipped": "out of memory with less"}
        else:
            figures = attempt(budget, _measure, name, inputs, seconds)
        if figures.get("skipped") == "out of memory":
            exhausted.add(name)
        yield about | {"method": name} | figures


def _measure(name: str, inputs: Inputs, seconds: float) -> Row:
    loss, device = METHODS[name].make(None), inputs[0].device.type
    measure.forward_and_backward(loss, inputs)
    peak = measure.peak_mib(lambda: measure.forward_and_backward(loss, inputs), device)
    taken = measure.times(lambda: measure.forward_and_backward(loss, inputs), device, seconds)
    size = inputs[0].shape[0] * inputs[1].shape[0]
    return {
        "both_ms": taken.median,
        "both_spread_ms": taken.spread,
        "peak_mib": peak,
        "ps_per_logit": taken.median / size * 1e9,
    }


def line(row: Row) -> str:
    start = f"  {row['sweep']} N={row['rows']:<7} V={row['vocab']:<7} {row['method']:<18}"
    if "skipped" in row:
        return f"{start} skipped: {row['skipped']}"
    peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:9.0f} MiB"
    return f"{start} {row['both_ms']:9.2f} ms   {row['ps_per_logit']:7.2f} ps a logit   {peak}"


def draw(rows: list[Row], about: dict[str, str], path: Path) -> None:
    """Times and peaks against N and V."""
    figure, axes = new_figure(4, about)
    panels: list[tuple[str, str, str, str]] = [
        (sweep, size, key, label)
        for sweep, size in (("N", "rows"), ("V", "vocab"))
        for key, label in (("both_ms", "ms"), ("peak_mib", "peak MiB above the inputs"))
    ]
    for axis, (sweep, size, key, label) in zip(axes, panels, strict=True):
        curves: dict[str, list[tuple[Any, Any]]] = {}
        for row in rows:
            if row["sweep"] == sweep and row.get(key):
                curves.setdefault(row["method"], []).append((row[size], row[key]))
        for method, points in curves.items():
            axis.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=method)
        axis.set(xlabel=sweep, ylabel=label)
        if curves:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
