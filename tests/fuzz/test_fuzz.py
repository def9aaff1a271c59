"""Random programs, compiled by the pass, against eager PyTorch and Inductor.

    pytest -m fuzz                                # 200 programs
    pytest -m fuzz --hypothesis-profile=long      # 8,000, others each time

Every 100 programs say how many were rewritten so far, so that a run which is cut short has its count too.
Where the pass rewrites, outputs, gradients and the arguments as they are left are no further from the float64 program
than eager's (or Inductor's), but for rounding. Where it does not, they are the same bits. Random numbers are the same.
Most programs run the graphs that the pass leaves without compiling them further, a few go through Inductor.
"""

import collections
import logging
from collections.abc import Callable

import pytest
import torch
from helpers import Run, assert_like_eager, assert_untouched, run_compiled, run_eager, run_float64
from hypothesis import HealthCheck, assume, given, settings
from programs import Program, programs
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

LEAST_REWRITTEN = 0.6
SCALE = settings.default.max_examples / settings.get_profile("default").max_examples  # 1, but for longer profiles


def hold(program: Program, lower: Callable | None = None) -> bool:
    """Asserts that the pass keeps a program right; whether it rewrote something. lower: as for `run_compiled`."""
    function, args = program.function(), program.inputs.tensors()
    theirs = run_if_defined(function, args)
    assume(theirs is not None)
    # under dynamic sizes, the constants of the program stay constants
    with torch._dynamo.config.patch(specialize_float=True, specialize_int=True):
        if lower is not None:
            torch._dynamo.reset()
            theirs = run_eager(torch.compile(function, backend=lower, dynamic=program.dynamic or None), args)
        try:
            ours = run_compiled(function, *args, dynamic=program.dynamic or None, lower=lower)
        except torch._dynamo.exc.Unsupported:  # with any backend: sizes that depend on data, for instance
            assume(False)
        assert_agree(ours, theirs, function, args)
        if program.dynamic and lower is None:
            args = program.inputs.tensors(grown=1)
            theirs = run_if_defined(function, args)
            if theirs is not None:
                vars(ours).update(vars(run_eager(ours.function, args)))
                assert_agree(ours, theirs, function, args)
    return bool(ours.report.rewritten)


def run_if_defined(function: Callable, args: tuple[Tensor, ...]) -> Run | None:
    """What eager gives; None where that is an error, there or in float64, or where nan leaves nothing to compare.

    In eager too: where a number overflows on the way of a gradient, inf * 0 is nan, in an order of multiplying.
    """
    try:
        run, exact = run_eager(function, args), run_float64(function, args)
    except (RuntimeError, IndexError, ValueError):
        return None
    if [gradient is None for gradient in exact.gradients] != [gradient is None for gradient in run.gradients]:
        return None  # a cast to the dtype that a tensor has, under no_grad: in float64 it is one that detaches
    results = [result for each in (run, exact) for result in (*each.outputs, *each.gradients) if result is not None]
    return None if any(result.isnan().any() for result in results) else run


def assert_agree(ours, theirs: Run, function: Callable, args: tuple[Tensor, ...]) -> None:
    if ours.report.rewritten:
        assert_like_eager(ours, function, args, theirs)
        return
    assert_untouched(ours)
    for name, mine in vars(theirs).items():
        torch.testing.assert_close(
            getattr(ours, name), mine, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def say(record_property, capsys):
    """Says how many programs were rewritten, in the end or so far."""

    def say(counts: collections.Counter[bool], so_far: bool = False) -> None:
        text = f"{counts.total()} random programs, {counts[True]} of them rewritten"
        if so_far:
            with capsys.disabled():
                print(f"\n{text} so far", flush=True)
        else:
            record_property("programs", text)

    return say


def fuzz(count: int, caplog, say: Callable, lower: Callable | None = None) -> collections.Counter[bool]:
    """Holds so many programs; how many were rewritten, and how many not."""
    counts: collections.Counter[bool] = collections.Counter()

    @settings(max_examples=count, suppress_health_check=list(HealthCheck))
    @given(programs())
    def each(program: Program) -> None:
        caplog.clear()
        counts[hold(program, lower)] += 1
        warnings = [
            r.getMessage() for r in caplog.records if r.name.startswith("cce_inductor") and r.levelno >= logging.WARNING
        ]
        assert not warnings, "the pass failed at something and said so"
        if counts.total() % 100 == 0:
            say(counts, so_far=True)

    try:
        with caplog.at_level(logging.WARNING, logger="cce_inductor"):
            each()
    finally:
        say(counts)
    return counts


@pytest.mark.fuzz
def test_uncompiled(caplog, say):
    counts = fuzz(int(196 * SCALE), caplog, say)
    assert counts[True] >= LEAST_REWRITTEN * counts.total(), counts


@pytest.mark.fuzz
def test_with_inductor(caplog, say):
    with torch._inductor.config.patch(fallback_random=True):  # the random numbers of eager PyTorch
        counts = fuzz(int(4 * SCALE), caplog, say, lookup_backend("inductor"))
    assert counts[True] > 0, counts
