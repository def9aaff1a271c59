"""Rows of figures as lines, tables, JSON and pictures."""

import json
import os
import platform
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from rich.table import Table

from .heads import BARE, Row
from .methods import METHODS

COLORS = {"ours": "#1f6fb4", "baseline": "#e07b39", "others": "#9aa0a6"}


def conditions(device: str, dtype: str) -> dict[str, str]:
    """What the figures depend on beside this package."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "dtype": dtype,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def write_json(path: Path, about: dict[str, str], rows: list[Row]) -> None:
    """Whole at any time: a run that is cut off leaves what was measured."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps({"about": about, "results": rows}, indent=1))
    os.replace(scratch, path)


def problem(row: Row) -> str:
    sizes = f"N={row['rows']} V={row['vocab']} D={row['width']}" if "rows" in row else ""
    masked = f", {row['masked']:.0%} of the rows masked" if row["masked"] else ""
    return f"{sizes} {row['data']}{masked}"


def by_problem(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(problem(row), []).append(row)
    return groups


CELLS = (  # heading, key, format
    ("forward", "forward_ms", "{:.2f}"),
    ("±", "forward_spread_ms", "{:.2f}"),
    ("of\ncompile", "forward_of_compile", "{:.2f}"),
    ("fwd+bwd", "both_ms", "{:.2f}"),
    ("±", "both_spread_ms", "{:.2f}"),
    ("of\ncompile", "both_of_compile", "{:.2f}"),
    ("of un-\nmasked", "both_of_unmasked", "{:.2f}"),
    ("peak\nMiB", "peak_mib", "{:.0f}"),
    ("dE\nerror", "hidden_error", "{:.1e}"),
    ("dC\nerror", "weight_error", "{:.1e}"),
    ("dC row\nerror", "weight_row_error", "{:.1e}"),
    ("active\npairs", "active_pairs", "{:.3f}"),
    ("active\nblocks", "active_blocks", "{:.3f}"),
    ("tokens\nalone", "active_tokens", "{:.3f}"),
    ("TFLOP/s", "tflops", "{:.3g}"),
    ("of\nceiling", "of_ceiling", "{:.2f}"),
)


def cell(row: Row, key: str, form: str) -> str:
    return "" if row.get(key) is None else form.format(row[key])


def line(row: Row) -> str:
    """One row, for a terminal that shows the progress."""
    if "skipped" in row:
        return f"  {row['method']:<24} skipped: {row['skipped']}"
    keys = ("forward_ms", "both_ms", "both_of_compile", "peak_mib")
    forward, both, ratio, peak = (cell(row, key, "{:.2f}") for key in keys)
    return f"  {row['method']:<24} forward {forward:>8} ms   both {both:>8} ms   {ratio:>5}   {peak:>9} MiB"


def table(title: str, rows: list[Row]) -> Table:
    """Columns that say nothing about any row are left out."""
    cells = [c for c in CELLS if any(row.get(c[1]) is not None for row in rows)]
    result = Table("method", title=title, title_justify="left")
    for heading, _, _ in cells:
        result.add_column(heading, justify="right")
    for row in rows:
        if "skipped" not in row:
            declined = " (declined)" if row.get("rewrites") == 0 else ""
            result.add_row(row["method"] + declined, *(cell(row, key, form) for _, key, form in cells))
    skipped = [f"{row['method']}: {row['skipped']}" for row in rows if "skipped" in row]
    result.caption = (
        "times in ms, ± the distance of the quartiles; peak above the inputs, gradients included"
        + "".join(f"\nskipped {reason}" for reason in skipped)
    )
    result.caption_justify = "left"
    return result


def new_figure(panels: int, about: dict[str, str]) -> tuple[Any, Any]:
    """(figure, its panels), with the conditions above them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2 if panels == 4 else min(panels, 3)
    lines = -(-panels // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.5 * columns, 4.6 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[panels:]:
        axis.remove()
    for axis in axes.flat[:panels]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    versions = {name: f"{name} {value}" for name, value in about.items() if name in ("torch", "triton", "python")}
    title = "forward and backward: " + ", ".join((about | versions).values())
    figure.suptitle(title, fontsize="small", color="dimgray", wrap=True)
    return figure, axes.flat[:panels]


def color_of(method: str) -> str:
    return COLORS["ours" if METHODS[method].ours else "baseline" if method == "compile" else "others"]


def draw(rows: list[Row], about: dict[str, str], path: Path) -> None:
    """Time against memory, one point a method, one panel a problem."""
    points = [r for r in rows if "skipped" not in r and r["method"] != BARE and r.get("peak_mib")]
    groups = by_problem(points)
    if not groups:
        return
    figure, axes = new_figure(len(groups), about)
    for axis, (title, group) in zip(axes, groups.items(), strict=True):
        for row in group:
            axis.plot(row["peak_mib"], row["both_ms"], "o", color=color_of(row["method"]))
            axis.annotate(
                row["method"], (row["peak_mib"], row["both_ms"]), xytext=(5, 3), textcoords="offset points", fontsize=8
            )
        axis.set(title=title, xlabel="peak memory above the inputs (MiB)", ylabel="ms", xscale="log")
        axis.title.set_size(9)
        axis.margins(x=0.25, y=0.1)
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=150)
