"""`python -m cce_inductor.bench`: measures, prints a table, and writes JSON for other programs."""

import argparse
import json
import platform
import statistics
from datetime import date
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from . import measure
from .methods import DTYPES, METHODS, SHAPES, make_inputs

ROUNDS = 3  # the methods take turns, so that a GPU that gets warm slows all of them down alike
COLUMNS = ("method", "forward", "of compile", "fwd + bwd", "of compile", "peak MiB", "dE error", "dC error")


def parse_arguments() -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m cce_inductor.bench",
        description="Compares ways to compute the mean cross-entropy of a linear head: median times in ms (the forward "
        "alone under no_grad), peak memory above the inputs, and ||g - r|| / ||r|| of the gradients of hidden states "
        "(dE) and weight (dC), with r from float64.",
    )
    parser.add_argument(
        "--shapes", type=partial(_names, SHAPES), default="gemma2-2b,gpt2" if device == "cuda" else "tiny"
    )
    parser.add_argument("--methods", type=partial(_names, METHODS), default=",".join(METHODS))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if device == "cuda" else "fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time of each method, size and round")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def _names(known: dict[str, Any], text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"unknown: {name}; there are {', '.join(known)}")
    return names


def header(arguments: argparse.Namespace) -> dict[str, str]:
    """What the figures depend on beside this package."""
    gpu = arguments.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "dtype": arguments.dtype,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def bench(shape: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of figures a method; times of all methods first, then memory and errors."""
    inputs = make_inputs(SHAPES[shape], DTYPES[arguments.dtype], arguments.device)
    losses = {name: METHODS[name]() for name in arguments.methods}
    forward: dict[str, list[float]] = {name: [] for name in losses}
    both: dict[str, list[float]] = {name: [] for name in losses}
    for name in track(list(losses) * ROUNDS, description=shape, transient=True):
        forward[name] += measure.milliseconds(measure.forward, losses[name], inputs, arguments.seconds)
        both[name] += measure.milliseconds(measure.forward_and_backward, losses[name], inputs, arguments.seconds)
    peaks = {name: measure.peak_mib(loss, inputs) for name, loss in losses.items()}
    exact = measure.exact_gradients(*inputs)
    rows = []
    for name, loss in losses.items():
        gradients = measure.forward_and_backward(loss, *inputs)
        errors = [measure.error(g, r) for g, r in zip(gradients, exact, strict=True)]
        rows.append(
            {
                "shape": shape,
                "method": name,
                "forward_ms": statistics.median(forward[name]),
                "both_ms": statistics.median(both[name]),
                "peak_mib": peaks[name],
                "hidden_error": errors[0],
                "weight_error": errors[1],
            }
        )
    return rows


def table(shape: str, rows: list[dict[str, Any]]) -> Table:
    baseline = next((row for row in rows if row["method"] == "compile"), None)
    result = Table(*COLUMNS, title=f"{shape}: {SHAPES[shape]}", title_justify="left")
    for column in result.columns[1:]:
        column.justify = "right"
    for row in rows:
        times = [
            text
            for name in ("forward_ms", "both_ms")
            for text in (f"{row[name]:.2f}", f"{row[name] / baseline[name]:.2f}x" if baseline else "")
        ]
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        result.add_row(row["method"], *times, peak, f"{row['hidden_error']:.1e}", f"{row['weight_error']:.1e}")
    return result


def main() -> None:
    arguments = parse_arguments()
    console = Console(width=100)
    about = header(arguments)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows = []
    for shape in arguments.shapes:
        torch.compiler.reset()
        rows += bench(shape, arguments)
        console.print(table(shape, rows[-len(arguments.methods) :]))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"about": about, "results": rows}, file, indent=2)


if __name__ == "__main__":
    main()
