"""Whole random programs of the understood family: each is rewritten, and does what eager does.

A program is a product, then row operations and pointwise maps in any order, the row operations applied to the labels
too, and then one or several losses.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from helpers import assert_like_eager, run_compiled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROWS = "abc"  # letters of the row dimensions
MATMULS = {
    "linear": lambda h, w: F.linear(h, w),
    "at": lambda h, w: h @ w.T,
    "matmul": lambda h, w: torch.matmul(h, w.t()),
    "einsum": lambda h, w: torch.einsum(f"{ROWS[: h.dim() - 1]}d,vd->{ROWS[: h.dim() - 1]}v", h, w),
    "einsum_dots": lambda h, w: torch.einsum("...d,vd->...v", h, w),
    "einsum_weight_first": lambda h, w: torch.einsum("vd,...d->...v", w, h),
    "addmm": lambda h, w: _addmm(h.reshape(-1, h.shape[-1]), w).view(*h.shape[:-1], w.shape[0]),
    "low_rank": lambda h, w: F.linear(h, w) + 0.5 * F.linear(h.cos(), w.sin()),
    "mm": lambda h, w: torch.mm(h.reshape(-1, h.shape[-1]), w.mT).view(*h.shape[:-1], w.shape[0]),
}  # fmt: skip


def _addmm(h, w):
    return torch.addmm(w[:, 0].tanh(), h, w.mT, beta=0.5, alpha=2.0)


@dataclass(frozen=True)
class Step:
    """One operation of a program, with a name that can be read in a report of hypothesis."""

    name: str
    on_logits: Any
    on_labels: Any = None

    def __repr__(self):
        return self.name


@dataclass(frozen=True)
class Program:
    matmul: str
    steps: tuple[Step, ...]
    losses: tuple[str, ...]
    rows: tuple[int, ...]
    width: int
    vocab: int
    dtype: torch.dtype
    ignored: bool
    dynamic: bool

    def inputs(self):
        generator = torch.Generator().manual_seed(0)

        def random(*shape, scale=1.0):
            return (torch.randn(shape, generator=generator) * scale).to(self.dtype).requires_grad_()

        labels = torch.randint(0, self.vocab, self.rows, generator=generator)
        if self.ignored:
            labels.view(-1)[1::2] = -100
        weight, bias = random(self.vocab, self.width, scale=0.5), random(self.vocab)
        scale = torch.tensor(0.75, dtype=self.dtype)
        parameters = map(torch.nn.Parameter, (weight, bias, scale))  # their sizes are never dynamic
        return random(*self.rows, self.width), *parameters, labels

    def __call__(self, h, w, bias, scale, labels):
        logits = MATMULS[self.matmul](h, w)
        for step in self.steps:
            logits = step.on_logits(logits, bias, scale)
            labels = labels if step.on_labels is None else step.on_labels(labels)
        losses = [LOSSES[name](logits, labels) for name in self.losses]
        # every input has a gradient, whether the program uses it or not
        return sum(losses) + 0 * (bias.sum() + scale)


def flat(x, t):
    return x.reshape(-1, x.shape[-1]), t.reshape(-1)


def picked(x, t):
    return x.gather(-1, t.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def chunks(x, t):
    x, t = flat(x, t)
    return x.tensor_split(2), t.tensor_split(2)


LOSSES = {
    "mean": lambda x, t: F.cross_entropy(*flat(x, t)),
    "sum": lambda x, t: F.cross_entropy(*flat(x, t), reduction="sum"),
    "none": lambda x, t: F.cross_entropy(*flat(x, t), reduction="none").square().sum(),
    "smoothed": lambda x, t: F.cross_entropy(*flat(x, t), label_smoothing=0.2),
    "class_dimension_one": lambda x, t: F.cross_entropy(x.movedim(-1, 1) if x.dim() > 1 else x, t),
    "by_hand": lambda x, t: -(picked(x - x.logsumexp(-1, keepdim=True), t) * (t >= 0)).sum(),
    "loop": lambda x, t: sum(F.cross_entropy(*pair, reduction="sum") for pair in zip(*chunks(x, t), strict=True)),
    "nll": lambda x, t: F.nll_loss(F.log_softmax(flat(x, t)[0], -1), t.reshape(-1), reduction="sum"),
    "gather": lambda x, t: -(picked(x.log_softmax(-1), t) * (t >= 0)).sum(),
    "z_loss": lambda x, t: x.logsumexp(-1).square().sum() / x.shape[-1],
    "entropy": lambda x, t: -(x.softmax(-1) * x.log_softmax(-1).clamp(min=torch.finfo(x.dtype).min)).sum(-1).sum(),
    "mean_log_prob": lambda x, t: -x.log_softmax(-1).mean(-1).sum(),
}


# ------------------------------------------------------------------------------------------------------ strategies


@st.composite
def row_step(draw, rows):
    """(step, the row sizes after it)."""
    ndim = len(rows)
    dim = draw(st.integers(0, ndim - 1))
    size = rows[dim]
    kinds = ["contiguous", "none", "regroup", "select" if ndim > 1 else "none"]
    kinds += ["slice", "narrow", "index"] if size > 1 else []
    kinds += ["transpose", "flatten", "piece", "view"] if ndim > 1 else []
    kind = draw(st.sampled_from(kinds))

    def sizes(change):
        return (*rows[:dim], *change, *rows[dim + 1 :])

    def both(name, function, after):
        return Step(name, lambda x, *_: function(x), function), tuple(after)

    if kind == "contiguous":
        return both(".contiguous()", lambda x: x.contiguous(), rows)
    if kind == "none":
        index = (slice(None),) * dim + (None,)
        return both(f"[none at {dim}]", lambda x: x[index], (*rows[:dim], 1, *rows[dim:]))
    if kind == "select":
        at = draw(st.integers(-size, size - 1))
        return both(f".select({dim}, {at})", lambda x: x.select(dim, at), sizes(()))
    if kind == "slice":
        start, step = draw(st.integers(0, size - 1)), draw(st.integers(1, 2))
        index = (slice(None),) * dim + (slice(start, None, step),)
        return both(f"[slice {start}::{step} of {dim}]", lambda x: x[index], sizes((len(range(start, size, step)),)))
    if kind == "narrow":
        length = draw(st.integers(1, size - 1))
        return both(f".narrow({dim}, 1, {length})", lambda x: x.narrow(dim, 1, length), sizes((length,)))
    if kind == "index":
        order = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4))
        index = (slice(None),) * dim + (torch.tensor(order),)
        return both(f"[{order} of {dim}]", lambda x: x[index], sizes((len(order),)))
    if kind == "transpose":
        other = (dim + 1) % ndim
        after = list(rows)
        after[dim], after[other] = after[other], after[dim]
        return both(f".transpose({dim}, {other})", lambda x: x.transpose(dim, other), after)
    if kind == "piece":
        dim, pieces = 0, draw(st.integers(1, rows[0]))
        first = len(torch.empty(rows[0]).chunk(pieces)[0])
        return both(f".chunk({pieces})[0]", lambda x: x.chunk(pieces)[0], (first, *rows[1:]))
    if kind == "flatten":
        dim = min(dim, ndim - 2)
        after = (*rows[:dim], rows[dim] * rows[dim + 1], *rows[dim + 2 :])
        return both(f".flatten({dim}, {dim + 1})", lambda x: x.flatten(dim, dim + 1), after)
    if kind == "view":  # of all rows, sizes that the program reads from the tensor
        reverse = tuple(reversed(rows))
        logits = lambda x, *_: x.reshape(*reversed(x.shape[:-1]), x.shape[-1])  # noqa: E731
        return Step(".reshape(reversed)", logits, lambda t: t.reshape(*reversed(t.shape))), reverse
    return Step(".reshape(-1, V)", lambda x, *_: x.reshape(-1, x.shape[-1]), lambda t: t.reshape(-1)), (product(rows),)


def product(sizes):
    total = 1
    for size in sizes:
        total *= size
    return total


NUMBERS = st.sampled_from([0.25, 0.5, 0.8, 1.5, 2, -1.0])
AFFINE = {
    "mul": lambda c: Step(f"* {c}", lambda x, *_: x * c),
    "left_mul": lambda c: Step(f"{c} *", lambda x, *_: c * x),
    "div": lambda c: Step(f"/ {c}", lambda x, *_: x / c),
    "add": lambda c: Step(f"+ {c}", lambda x, *_: x + c),
    "neg": lambda c: Step("neg", lambda x, *_: -x),
    "from": lambda c: Step(f"{c} - x", lambda x, *_: c - x),
    "in_place": lambda c: Step(f".clone().mul_({c})", lambda x, *_: x.clone().mul_(c)),
    "bias": lambda c: Step("+ bias", lambda x, bias, scale: x + bias),
    "minus_bias": lambda c: Step("- bias", lambda x, bias, scale: x - bias),
}
SCALES = {
    "scale": lambda c: Step("* scale", lambda x, bias, scale: x * scale),
    "inverse": lambda c: Step("/ scale", lambda x, bias, scale: x / scale),
}
NONLINEAR = {
    "softcap": lambda c: Step(f"softcap {abs(c) * 4}", lambda x, *_: abs(c) * 4 * torch.tanh(x / (abs(c) * 4))),
    "sigmoid": lambda c: Step("4 * sigmoid", lambda x, *_: 4 * torch.sigmoid(x)),
    "clamp": lambda c: Step(f"clamp {abs(c)}", lambda x, *_: x.clamp(-abs(c), abs(c))),
    "leaky_clamp": lambda c: Step(f"leaky clamp {c}", lambda x, *_: torch.where(x > c, c + 0.1 * (x - c), x)),
    "swish": lambda c: Step("x * sigmoid", lambda x, *_: x * torch.sigmoid(x)),
}
MASK = Step(
    "without class 0",
    lambda x, *_: x.masked_fill(torch.arange(x.shape[-1]) == 0, -torch.inf),
    lambda t: torch.where(t == 0, 1, t),
)


@st.composite
def map_steps(draw):
    """A chain of maps: scalar tensors while only they have scaled, biases while it is affine, numbers at any time."""
    steps = [SCALES[name](1) for name in draw(st.lists(st.sampled_from(sorted(SCALES)), max_size=1))]
    steps += [AFFINE[name](draw(NUMBERS)) for name in draw(st.lists(st.sampled_from(sorted(AFFINE)), max_size=3))]
    steps += [NONLINEAR[name](draw(NUMBERS)) for name in draw(st.lists(st.sampled_from(sorted(NONLINEAR)), max_size=1))]
    steps += [MASK] * draw(st.booleans())
    if draw(st.booleans()):
        steps.insert(draw(st.integers(0, len(steps))), Step(".float()", lambda x, *_: x.float()))
    return steps


@st.composite
def programs(draw):
    rows = start = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    on_rows = []
    for _ in range(draw(st.integers(0, 4))):
        step, rows = draw(row_step(rows))
        on_rows.append(step)
    on_values = draw(map_steps())
    steps = [
        on_rows.pop(0) if row else on_values.pop(0)
        for row in draw(st.permutations([True] * len(on_rows) + [False] * len(on_values)))
    ]
    names = draw(st.lists(st.sampled_from(sorted(LOSSES)), min_size=1, max_size=3, unique=True))
    return Program(
        draw(st.sampled_from(sorted(MATMULS))),
        tuple(steps),
        tuple(names),
        start,
        width=draw(st.sampled_from([1, 2, 5, 8])),
        vocab=draw(st.sampled_from([2, 3, 17, 32])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        ignored=draw(st.booleans()),
        dynamic=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs())
def test_a_program_is_rewritten_and_does_what_eager_does(program):
    """Without Inductor, which the programs of `tests/fuzz` go through."""
    inputs = program.inputs()
    # dynamic sizes of tensors, but constants of the program that stay constants
    with torch._dynamo.config.patch(specialize_float=True, specialize_int=True):
        ours = run_compiled(lambda *args: program(*args), *inputs, dynamic=program.dynamic or None)
    # of a single row, each of two products that are added is a bias to the other
    calls = 2 if program.matmul == "low_rank" and math.prod(program.rows) == 1 else 1
    assert len(ours.report.rewritten) == calls, ours.report
    assert not ours.report.refused, ours.report
    assert_like_eager(ours, program, inputs)
