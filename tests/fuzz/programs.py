"""Whole small programs at random: source text, built a line at a time, each line tried in eager PyTorch.

A line that raises, or after which labels no longer fit the logits, is left out. So the builder knows nothing of shapes
and dtypes, and any expression may be among its lines. A program prints as its source, which can be pasted into a test.
"""

import itertools
import linecache
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from lines import (
    AFTER,
    CHECKPOINTS,
    CROSS_ENTROPY,
    ENTROPIES,
    FLAT_PAIR,
    HEADS,
    HIDDEN,
    LOSSES,
    MAPS,
    MAXIMA,
    MODES,
    ODD_ROWS,
    OTHERS,
    ROWS,
    STATEMENTS,
    WEIGHTS,
    WRITES,
)
from torch import Tensor
from torch.distributions import Categorical
from torch.utils.checkpoint import checkpoint

ARGUMENTS = "h, ids, w, b, s, a, c, m, t, r, n"
NAMESPACE = {"torch": torch, "F": F, "inf": float("inf"), "checkpoint": checkpoint, "Categorical": Categorical}
LARGEST = 4000  # elements of the logits
_serial = itertools.count()


@dataclass(frozen=True)
class Inputs:
    """The arguments of a program, by size.

    h [rows, D] hidden states, ids [rows] tokens, w [V, D] weight, b [V] bias, s [] scale, a [D, D] a layer's weight,
    c [V] class weights, m [V] mask of a few classes, t [rows] labels, r [rows] row weights, n [] a buffer.
    """

    rows: tuple[int, ...]
    width: int
    vocab: int
    dtype: torch.dtype
    needs_grad: frozenset[str]  # of h, w, b, s, a
    ignored: bool  # whether some labels are -100

    def tensors(self, grown: int = 0) -> tuple[Tensor, ...]:
        """grown: by how much every dimension of the rows is larger."""
        generator = torch.Generator().manual_seed(grown)
        rows, width, vocab = tuple(size + grown for size in self.rows), self.width, self.vocab

        def floats(name: str, *shape: int) -> Tensor:
            value, needs_grad = torch.randn(shape, generator=generator).to(self.dtype), name in self.needs_grad
            # sizes of parameters are never dynamic
            return value.requires_grad_(needs_grad) if name == "h" else torch.nn.Parameter(value, needs_grad)

        def positive(*shape: int) -> Tensor:
            return (torch.rand(shape, generator=generator) + 0.5).to(self.dtype)

        def classes() -> Tensor:
            return torch.randint(0, vocab, rows, generator=generator)

        mask = torch.zeros(vocab, dtype=torch.bool)
        mask[1::5] = True
        labels = classes()
        labels = torch.where(mask[labels], 0, labels)
        if self.ignored:
            labels.view(-1)[1::3] = -100
        parameters = (floats("w", vocab, width), floats("b", vocab), floats("s"), floats("a", width, width))
        buffer = torch.zeros((), dtype=self.dtype)
        return floats("h", *rows, width), classes(), *parameters, positive(vocab), mask, labels, positive(*rows), buffer


@dataclass(frozen=True, repr=False)
class Program:
    """lines: the body of a function of ARGUMENTS. grad, autocast: the modes that it is called in."""

    inputs: Inputs
    lines: tuple[str, ...]
    grad: bool = True
    autocast: bool = False
    dynamic: bool = False

    @property
    def source(self) -> str:
        return f"def program({ARGUMENTS}):\n" + textwrap.indent("\n".join(self.lines), "    ") + "\n"

    def __repr__(self) -> str:
        return f"# {self.inputs}, grad={self.grad}, autocast={self.autocast}, dynamic={self.dynamic}\n{self.source}"

    def function(self) -> Callable[..., tuple]:
        filename = f"<program {next(_serial)}>"
        linecache.cache[filename] = (len(self.source), None, self.source.splitlines(True), filename)
        namespace: dict[str, Any] = dict(NAMESPACE)
        exec(compile(self.source, filename, "exec"), namespace)
        program = namespace["program"]

        def call(*args: Tensor) -> tuple:
            with torch.set_grad_enabled(self.grad), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                return program(*args)

        return call


@dataclass
class Builder:
    """Draws lines and keeps those that run.

    values: what the names of the program are bound to. logits: names of logits and of their labels. losses: likewise.
    """

    draw: Callable
    values: dict[str, Any]
    lines: list[str] = field(default_factory=list)
    logits: list[tuple[str, str]] = field(default_factory=list)
    losses: list[tuple[str, str]] = field(default_factory=list)
    hidden: str = "h"
    weight: str = "w"
    picks_classes: bool = False  # a result depends on which logit is the largest

    def sometimes(self, percent: int) -> bool:
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def line(self, kind: list[str], **names: str) -> str:
        return self.draw(st.sampled_from(kind)).format(h=self.hidden, w=self.weight, **names)

    def latest(self, pairs: list[tuple[str, str]]) -> tuple[str, str]:
        """Mostly the last one; an earlier one makes the program branch."""
        return self.draw(st.sampled_from(pairs)) if self.sometimes(20) else pairs[-1]

    def try_line(self, line: str) -> bool:
        """Adds a line if it runs."""
        before = dict(self.values)
        try:
            exec(line, self.values)
        except (RuntimeError, IndexError, ValueError, TypeError, AttributeError):
            self.values = before
            return False
        self.lines.append(line)
        return True

    def try_value(self, kind: str, expression: str) -> str | None:
        """Adds an assignment to a new name, which it returns, if it runs; now and then in another mode."""
        name = f"{kind}{len(self.lines)}"
        mode = f"with {self.line(MODES)}: " if self.sometimes(5) else ""
        return name if self.try_line(f"{mode}{name} = {expression}") else None

    def try_logits(self, expression: str, labels: str, on_labels: str | None = None) -> None:
        """Adds logits. on_labels: what becomes of the labels, where that changes."""
        kept, before = len(self.lines), dict(self.values)
        x = self.try_value("x", expression)
        t = self.try_value("t", on_labels) if on_labels and x else labels
        if x and t and self._fit(x, t):
            if self.values[t].numel() and int(self.values[t].max()) >= self.values[x].shape[-1] > 0:
                t = self.try_value("t", f"{t}.clamp(max={x}.shape[-1] - 1)")
            self.logits.append((x, t))
        else:
            del self.lines[kept:]
            self.values = before

    def _fit(self, x: str, t: str) -> bool:
        logits, labels = self.values[x], self.values[t]
        if logits.dim() == 0 or logits.shape[-1] == 1:
            return False  # the gradients of a single class are zero in eager PyTorch, and rounding in the operators
        return logits.shape[:-1] == labels.shape and logits.numel() <= LARGEST

    def _has_clear_maxima(self, x: str) -> bool:
        """Whether rounding does not decide which logit is the largest of a row."""
        logits = self.values[x].detach().double()
        if not logits.numel() or not logits.isfinite().any(-1).all():
            return False
        first, second = logits.topk(2).values.unbind(-1)
        return bool((first - second > 0.05 * first.abs() + 0.05).all())

    # ---------------------------------------------------------------------------------------- parts of a program

    def head(self) -> None:
        for _ in range(self.draw(st.integers(0, 3))):
            self.hidden = self.try_value("h", self.line(HIDDEN)) or self.hidden
        if self.sometimes(30):
            self.weight = self.try_value("w", self.line(WEIGHTS)) or self.weight
        self.try_logits(self.line(HEADS), "t")
        if not self.logits:  # two dtypes or widths, say
            self.hidden, self.weight = "h", "w"
            self.try_logits("F.linear(h, w)", "t")

    def step(self) -> None:
        x, t = self.latest(self.logits)
        kind = self.draw(st.integers(0, 99))
        if kind < 40:
            line = self.draw(st.sampled_from(ROWS if kind > 2 else ODD_ROWS))
            self.try_logits(line.format(x=x), t, line.format(x=t))
        elif kind < 48:
            self.try_logits(f"{x}.reshape(-1, {x}.shape[-1])", t, f"{t}.reshape(-1)")
        elif kind < 78:
            self.try_logits(self.line(MAPS, x=x), t)
        elif kind < 85:
            self.try_logits(self.line(WRITES, x=x), t)
        elif kind < 92:
            self.try_line(self.line(STATEMENTS, x=x, t=t))
        elif kind < 95:
            hidden = self.hidden
            self.hidden = self.draw(st.sampled_from([hidden, "h", f"{hidden}.sin()", f"({hidden} * 2)"]))
            self.try_logits(self.line(HEADS), "t")
            self.hidden = hidden
        else:
            self.loss()

    def loss(self) -> None:
        x, t = self.latest(self.logits)
        arguments = ", ".join(self.draw(st.sampled_from(values)) for values in CROSS_ENTROPY)
        general = [f"F.cross_entropy({FLAT_PAIR}, {arguments})"]
        loss = self.line(general if self.sometimes(30) else LOSSES, x=x, t=t)
        if name := self.try_value("l", loss):
            self.losses.append((name, t))

    def readers(self) -> None:
        """Accuracies, confidences, entropies."""
        x, t = self.latest(self.logits)
        if self.sometimes(20) and (name := self.try_value("o", self.line(ENTROPIES, x=x))):
            self.losses.append((name, t))
        picks = self.sometimes(30) and self._has_clear_maxima(x)
        if picks and (name := self.try_value("o", self.line(MAXIMA, x=x, t=t))):
            self.losses.append((name, t))
            self.picks_classes = True

    def others(self) -> None:
        """Further uses of the logits, what is computed from losses, and what is returned."""
        if self.sometimes(10) and (name := self.try_value("l", self.line(CHECKPOINTS))):
            self.losses.append((name, "t"))
        for _ in range(self.draw(st.integers(0, 2))):
            loss, t = self.latest(self.losses)
            if name := self.try_value("l", self.line(AFTER, l=loss, t=t)):
                self.losses.append((name, t))
        self.readers()
        x, t = self.latest(self.logits)
        if self.sometimes(6) and (name := self.try_value("o", self.line(OTHERS, x=x, t=t))):
            self.losses.append((name, t))
        if self.sometimes(10):
            self.try_line(self.line(STATEMENTS, x=x, t=t))
        results = [name for name, _ in self.losses]
        if self.sometimes(30):
            results += [x for x, _ in self.draw(st.lists(st.sampled_from(self.logits), max_size=2, unique=True))]
        self.lines.append(f"return {', '.join(results)},")


@st.composite
def inputs(draw: Callable) -> Inputs:
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    # the gradient of a number is a sum that cancels: in 16 bits, rounding in between is most of it
    names = "hwbsa" if dtype.itemsize > 2 else "hwba"
    return Inputs(
        rows=tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))),
        width=draw(st.sampled_from([8, 1, 5])),
        vocab=draw(st.sampled_from([17, 2, 5, 32])),
        dtype=dtype,
        needs_grad=draw(st.one_of(st.just(frozenset(names)), st.frozensets(st.sampled_from(names)))),
        ignored=draw(st.booleans()),
    )


@st.composite
def programs(draw: Callable, most_steps: int = 4) -> Program:
    given = draw(inputs())
    new = Builder(draw, NAMESPACE | dict(zip(ARGUMENTS.split(", "), given.tensors(), strict=True)))
    autocast, inner_autocast, no_grad = new.sometimes(10), new.sometimes(10), new.sometimes(10)
    torch.manual_seed(0)
    with torch.set_grad_enabled(not no_grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast or inner_autocast):
        new.head()
        for _ in range(draw(st.integers(0, most_steps))):
            new.step()
        for _ in range(draw(st.integers(1, 3))):
            new.loss()
        while not new.losses:
            new.loss()
        new.others()
    lines = new.lines
    if inner_autocast:
        lines = ["with torch.autocast('cpu', torch.bfloat16):", *(f"    {line}" for line in lines)]
    return Program(given, tuple(lines), not no_grad, autocast, dynamic=new.sometimes(25) and not new.picks_classes)
