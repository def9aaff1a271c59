"""Every function of the pass, made to raise in turn: the program still does what it did, and the report says why.

A few programs reach all of them. One compilation of a program tries each of the functions that it reaches, on a copy of
the graph, at the first call and at the last one.
"""

import inspect
import logging
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import EVERYTHING, D, V, assert_close_to_eager, bias, graph_modules, hidden, labels, tensors_of, weight
from torch.distributions import Categorical
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import cce_inductor.graph
from cce_inductor import Report
from cce_inductor.graph import driver, effects, registry
from cce_inductor.graph.returned import LazyResults
from cce_inductor.verify import copy_of

FOLDER = Path(cce_inductor.graph.__file__).parent
Place = tuple[str, str, int]  # file, function, line


class FaultError(Exception):
    pass


def place_of(code: CodeType) -> Place:
    return Path(code.co_filename).name, code.co_name, code.co_firstlineno


def functions(code: CodeType) -> Iterator[Place]:
    """All functions and methods whose source is in some code, but not what is written in expressions."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_flags & inspect.CO_OPTIMIZED and not inner.co_name.startswith("<"):
                yield place_of(inner)
            yield from functions(inner)


EVERYWHERE = {
    place
    for module in pkgutil.iter_modules([str(FOLDER)])
    for path in [FOLDER / f"{module.name}.py"]
    for place in functions(compile(path.read_text(), str(path), "exec"))
}


class Calls:
    """A trace function that counts the calls of functions of the pass, and raises in one of them."""

    def __init__(self, place: Place | None = None, number: int = 0) -> None:
        self.place, self.number = place, number
        self.counts: Counter[Place] = Counter()

    def __call__(self, frame, event, arg) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(FOLDER)):
            place = place_of(frame.f_code)
            if place in EVERYWHERE:
                self.counts[place] += 1
            if place == self.place and self.counts[place] == self.number:
                raise FaultError("broken on purpose")


@dataclass
class Variant:
    """A graph that the pass was made to fail on."""

    fault: str
    text: str
    report: Report
    warnings: list[str]
    function: Callable


def variant(module: GraphModule, calls: Calls, caplog: Any = None) -> Variant:
    """A copy of a graph after the pass."""
    module = copy_of(module)
    lazy = LazyResults(module.graph)
    before, seen = sys.gettrace(), len(caplog.records) if caplog else 0
    sys.settrace(calls)
    try:
        report = driver.rewrite_module(module, EVERYTHING, lazy)
    finally:
        sys.settrace(before)
    records = caplog.records[seen:] if caplog else []
    warnings = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
    return Variant(f"{calls.place} at call {calls.number}", text(module), report, warnings, lazy.around(module.forward))


def text(module: GraphModule) -> str:
    return "\n".join(str(graph.graph) for graph in graph_modules(module))


def results(function: Callable, args: tuple) -> list:
    """Outputs and gradients."""
    torch.manual_seed(0)
    outputs = list(tensors_of(function(*args)))
    leaves = [arg for arg in tensors_of(args) if arg.requires_grad]
    total = sum(output.float().square().sum() for output in outputs if output.requires_grad)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(total, leaves, allow_unused=True)]


# ---------------------------------------------------------------------------------------------------- the programs


def loss_of(x, t, **how):
    return F.cross_entropy(x.flatten(0, -2), t.flatten(), **how)


def several_losses(h, w, b, t):
    x = F.linear(h, w).float()
    shifted = F.pad(t, (0, 1), value=-100)[..., 1:].contiguous()
    return x.logsumexp(-1).square().mean() + loss_of(x, shifted, label_smoothing=0.1) + loss_of(x, t)


def two_heads(h, w, b, t):
    return loss_of(F.linear(h, w), t) + loss_of(F.linear(h.sin(), w.cos()), t)


def one_loss(h, w, b, t):
    return loss_of(F.linear(h, w), t)


def one_loss_in_16_bits(h, w, b, t):
    return loss_of(F.linear(h.bfloat16(), w.bfloat16()), t)


def returned_logits(h, w, b, t):
    x = F.linear(h, w.bfloat16().to(w.dtype), b) * h.shape[0]
    return F.cross_entropy(x.mT, t, reduction="none"), x


def other_readers(h, w, b, t):
    x = F.linear(h, w).view(-1, V)
    p, log_p = x.softmax(-1), x.log_softmax(-1)
    entropies = -(p * log_p).sum(-1), (-p * log_p).sum(-1), Categorical(logits=x).entropy()
    others = torch.special.entr(p).sum(-1), (-log_p / 2).gather(-1, t.view(-1, 1)), x[1:].logsumexp(-1)
    return *entropies, *others, loss_of(x, t), x.argmax(-1), p.detach().view(3, -1, V).amax(-1), x.max(-1)


def labels_as_wide_as_the_logits(h, w, b, t):
    x, t = F.linear(h, w).flatten(0, 1), t.flatten()
    policy = Categorical(logits=x)
    log_p, q = x.log_softmax(-1), torch.zeros_like(x).fill_(0.1).scatter_(1, t[:, None], 0.9)
    soft = ((-q * log_p) * 0.5).sum(-1) - (-log_p * (F.one_hot(t, V) / 2 + 0.1).type_as(x)).sum()
    return policy.log_prob(t), soft, -(x.softmax(-1) * F.one_hot(t, V)).sum(-1), (-(2 * q * log_p)).sum(-1)


def masks(h, w, b, t):
    x = F.linear(h, w)
    x = torch.where(x > 0.5, 0.5 + 0.1 * (x - 0.5), x)
    x = x.masked_fill(torch.arange(V) > 40, -3.0).index_fill(-1, torch.tensor([1]), -3.0)
    x[..., 3] = -3.0
    x[..., 50:] = -3.0
    x = F.hardtanh(F.leaky_relu(x.clamp(-9, 9)), -7, 7)
    return F.nll_loss(x.log_softmax(-1).flatten(0, 1), t.flatten())


def combinations(h, w, b, t):
    x = F.linear(h, w) * b
    return loss_of(x * torch.sigmoid(x), t)


def a_transpose(h, w, b, t):
    return F.cross_entropy((w @ h[0].T).T, t[0])


def stacks(h, w, b, t):
    x = torch.stack([F.linear(h, w), F.linear(h.sin(), w)])
    return loss_of(x[1], t) + sum(loss_of(y, t) for y in x.unbind(0)) + x.select(0, 0).logsumexp(-1).sum()


def row_operations(h, w, b, t):
    x = h @ w.T
    first = x.transpose(0, 1).narrow(0, 0, 4).select(0, 1).logsumexp(-1).sum()
    second = x.index_select(0, torch.tensor([1, 0])).chunk(2)[0].sum(-1).sum()
    third = x[:, 1:, :20].unbind(0)[1].log_softmax(-1).gather(-1, t[1, 1:, None] % 20).sum()
    return first + second + third + x.detach().mean(-1).sum()


def products(h, w, b, t):
    flat, stacked = h.flatten(0, 1), w.T.expand(3, -1, -1)
    spellings = [
        torch.addmm(b, flat, w.T, beta=0.5, alpha=2.0),
        torch.mm(flat, w.T),
        torch.bmm(h, stacked),
        torch.baddbmm(b, h, stacked),
        torch.einsum("bsd,vd->bsv", h, w),
    ]
    return sum(((x * 0.5 + b) / 2 - 0.25).pow(2).logsumexp(-1).sum() for x in spellings)


def a_sum_of_products(h, w, b, t):
    x = F.linear(h, w) + F.linear(h.sin(), w.cos())
    x.mul_(0.5)
    return F.nll_loss((x - x.logsumexp(-1, keepdim=True)).flatten(0, 1), t.flatten())


def a_sum_of_products_in_16_bits(h, w, b, t):
    half = w.bfloat16()
    return loss_of(F.linear(h.bfloat16(), half) + F.linear(h.sin().bfloat16(), half), t)


def a_loop(h, w, b, t):
    return sum(loss_of(F.linear(h[i, :, :4], w[:, :4]), t[i], reduction="sum") for i in range(3))


def a_checkpoint(h, w, b, t):
    return checkpoint(lambda h, w: loss_of(F.linear(h, w).float().tanh(), t), h, w, use_reentrant=False)


def refusals(h, w, b, t):
    x, y = F.linear(h, w), F.linear(h, w)
    stacked = torch.stack([F.linear(h.cos(), w), F.linear(h.sin(), w)]).flatten()
    return loss_of(x, t) + x.std(), loss_of(y.cumsum(-1), t) + x.softmax(-1).log(), loss_of(h, t % 8), stacked


def a_dynamic_number(h, w, b, t, number):
    return loss_of(number * torch.tanh(F.linear(h, w) / number) + number, t)


HEAD = torch.nn.Linear(D, V)


def a_module(h, w, b, t):
    return loss_of(HEAD(h), t)


PROGRAMS = [
    several_losses, two_heads, one_loss, one_loss_in_16_bits, returned_logits, other_readers,
    labels_as_wide_as_the_logits, masks, combinations, a_transpose, stacks, row_operations, products,
    a_sum_of_products, a_sum_of_products_in_16_bits, a_loop, a_checkpoint, refusals, a_dynamic_number, a_module,
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the tests

# Functions of a few lines that catch what goes wrong in the others, or undo it; and what does not run in the pass.
CATCHING = {("driver.py", n) for n in ("rewrite_module", "_rewrite_module", "_rewrite_child", "_finish", "_failed")} | {
    ("rewrite.py", "undo"),
    ("emitter.py", "undo"),
}
AT_OTHER_TIMES = {("registry.py", "rule"), ("registry.py", "register")} | {
    ("returned.py", n) for n in ("__init__", "around", "call", "of")
}


def compile_with(backend: Callable, program: Callable) -> Any:
    torch._dynamo.reset()
    numbers = [1.5] if program is a_dynamic_number else []
    compiled = torch.compile(program, backend=backend, dynamic=True if numbers else None, fullgraph=True)
    return compiled(hidden(), weight(), bias(), labels(), *numbers)


@pytest.fixture(scope="module")
def tried() -> set[Place]:
    """One program is enough for a function."""
    return set()


def test_the_programs_reach_every_function():
    for cached in (effects._signature, registry._name):
        cached.cache_clear()  # of what an earlier test asked for, nothing is computed again
    calls = Calls()

    def backend(module: GraphModule, inputs: list) -> Callable:
        return variant(module, calls).function

    for program in PROGRAMS:
        compile_with(backend, program)
    missing = {place[:2] for place in EVERYWHERE - set(calls.counts)}
    assert missing == AT_OTHER_TIMES | (missing & CATCHING)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_function_that_raises(program, tried, caplog, record_property):
    reached, variants = Calls(), []

    def backend(module: GraphModule, inputs: list) -> Callable:
        original, clean = copy_of(module), variant(module, reached)
        for place in reached.counts.keys() - tried:
            if place[:2] not in CATCHING:
                tried.add(place)
                numbers = sorted({1, reached.counts[place]})
                variants.extend(variant(module, Calls(place, number), caplog) for number in numbers)

        def run(*args: Any) -> Any:
            expected = results(original.forward, args)
            for broken in variants:
                if assert_survives(broken, clean, text(original)):
                    assert_like(expected, broken, original.forward, args)
            return original(*args)

        return run

    compile_with(backend, program)
    record_property("programs", f"{len(variants)} times a function of the pass was made to raise")


def assert_survives(broken: Variant, clean: Variant, original: str) -> bool:
    """The graph is as it was and the report says why, or it was rewritten all the same: whether it was."""
    assert len(broken.warnings) <= 1, broken
    if broken.text == original:
        assert broken.report.rewritten == [], broken
        assert broken.report.refused or not clean.report.rewritten, broken
        return False
    assert broken.report.rewritten, broken
    return True


def assert_like(expected: list, broken: Variant, original: Callable, args: tuple) -> None:
    """What was rewritten is right: as near as rounding to 16 bits allows, where a program has such logits."""
    if expected[0].dtype == torch.bfloat16:
        assert_close_to_eager(broken.function, original, args, rounding=torch.bfloat16)
        return
    for mine, theirs in zip(results(broken.function, args), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3, msg=lambda m: f"{broken.fault}: {m}")
