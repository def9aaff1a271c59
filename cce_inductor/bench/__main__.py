"""`python -m cce_inductor.bench`: measures, prints figures as they come, and writes JSON and pictures."""

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import compiling, describe, heads, scaling, show, train
from .data import DATA
from .heads import Budget, Case, Row
from .methods import METHODS
from .models import MODELS
from .shapes import DTYPES, SHAPES, Shape, parse_shapes

SCALING_METHODS = "compile,cce,cce-approx"


def parse_arguments() -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m cce_inductor.bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compares ways to compute the mean cross-entropy of a linear head and its gradients. Times are "
        "medians; the forward is timed under no_grad.",
        epilog=_legend("methods", {name: method.about for name, method in METHODS.items()}) + _legend("shapes", SHAPES),
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--scaling", action="store_true", help="sweep N and V of the first shape instead")
    what.add_argument("--train", action="store_true", help="measure whole training steps instead")
    what.add_argument("--compile-time", action="store_true", help="measure compilation, cold and warm, and the pass")
    what.add_argument("--describe", action="store_true", help="print statistics of the data instead")
    parser.add_argument(
        "--shapes", nargs="+", default=["gemma2-2b"] if device == "cuda" else ["tiny"], help="N,V,D, or names as below"
    )
    parser.add_argument("--data", type=_names(DATA), default=["trained"], help=f"of {', '.join(DATA)}")
    parser.add_argument("--head", type=Path, help="safetensors with hidden, classifier and targets, instead of shapes")
    parser.add_argument("--masked", type=_shares, default=[0.0], help="shares of rows with ignore_index, e.g. 0,0.6")
    parser.add_argument("--softcap", type=float, metavar="C", help="of logits, by C * tanh(logits / C)")
    parser.add_argument("--methods", type=_names(METHODS), help="default: all; --scaling and --train: a few")
    parser.add_argument("--models", type=_names(MODELS), default=["gpt2-small", "llama-0.5b"], help="for --train")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, for --train")
    parser.add_argument("--most", type=int, default=512, help="the largest batch to try, for --train")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if device == "cuda" else "fp32")
    parser.add_argument("--tf32", action="store_true", help="let float32 products use TF32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--seconds", type=float, default=0.3, help="measuring time of each time")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for all; what is left is skipped")
    parser.add_argument("--json", type=Path, help="write the figures there, after each row")
    parser.add_argument("--png", type=Path, help="draw time against memory there")
    arguments = parser.parse_args()
    if arguments.softcap is not None:
        if arguments.scaling or arguments.train or arguments.compile_time or arguments.describe:
            parser.error("--softcap is for heads, not for --scaling, --train, --compile-time, --describe")
        if arguments.softcap <= 0:
            parser.error("a soft cap is a positive number")
    try:
        arguments.shapes = [shape for text in arguments.shapes for shape in parse_shapes(text)]
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _legend(title: str, entries: Mapping[str, Any]) -> str:
    return f"{title}:\n" + "".join(f"  {name:<24} {about}\n" for name, about in entries.items())


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown: {name}; there are {', '.join(known)}")
        return names

    return parse


def _shares(text: str) -> list[float]:
    return [float(share) for share in text.split(",")]


def main() -> None:
    arguments = parse_arguments()
    console = Console(width=160, soft_wrap=True)
    if arguments.tf32:
        torch.set_float32_matmul_precision("high")
    about = show.conditions(arguments.device, arguments.dtype + (", TF32" if arguments.tf32 else ""))
    console.print(", ".join(f"{name} {value}" for name, value in about.items()))
    if arguments.describe:
        describe_all(arguments, about, console)
        return
    measured, line = _rows_and_line(arguments)
    of_heads = not (arguments.scaling or arguments.train or arguments.compile_time)
    rows: list[Row] = []
    for row in measured:
        rows.append(row)
        if of_heads and (len(rows) == 1 or show.problem(rows[-2]) != show.problem(row)):
            console.print(show.problem(row))
        console.print(line(row), highlight=False)
        if arguments.json:
            show.write_json(arguments.json, about, rows)
    if of_heads:
        for title, group in show.by_problem(rows).items():
            console.print(show.table(title, group))
    if arguments.png and (of_heads or arguments.scaling):
        (scaling if arguments.scaling else show).draw(rows, about, arguments.png)


def _rows_and_line(arguments: argparse.Namespace) -> tuple[Iterable[Row], Callable[[Row], str]]:
    budget = Budget(arguments.budget)
    dtype, device, seconds = DTYPES[arguments.dtype], arguments.device, arguments.seconds
    if arguments.compile_time:
        names = [name for name in arguments.methods or compiling.METHODS if name in compiling.METHODS]
        return compiling.run(names, device, budget), compiling.line
    if arguments.train:
        names = [name for name in arguments.methods or train.METHODS if name in train.METHODS]
        return train.run(arguments.models, names, device, arguments.batch, arguments.most, seconds, budget), train.line
    if arguments.scaling:
        names = arguments.methods or SCALING_METHODS.split(",")
        return scaling.run(arguments.shapes[0], arguments.data[0], names, dtype, device, seconds, budget), scaling.line
    names = arguments.methods or list(METHODS)
    return heads.run(cases(arguments), names, dtype, device, seconds, budget), show.line


def cases(arguments: argparse.Namespace) -> list[Case]:
    if arguments.head:
        nothing = Shape(0, 0, 0)
        of_head = nothing, arguments.head.name
        return [Case(*of_head, masked, arguments.head, arguments.softcap) for masked in arguments.masked]
    return [
        Case(shape, data, masked, softcap=arguments.softcap)
        for shape in arguments.shapes
        for data in arguments.data
        for masked in arguments.masked
    ]


def describe_all(arguments: argparse.Namespace, conditions: dict[str, str], console: Console) -> None:
    figures: list[dict[str, Any]] = []
    for case in cases(arguments):
        with torch.no_grad():
            inputs = case.inputs(DTYPES[arguments.dtype], arguments.device)
        about = case.about(inputs)
        figures.append(about | describe.statistics(*(tensor.detach() for tensor in inputs)))
        console.print(describe.table(show.problem(about), figures[-1]))
        if arguments.json:
            show.write_json(arguments.json, conditions, figures)


if __name__ == "__main__":
    main()
