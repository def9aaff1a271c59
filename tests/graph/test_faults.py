"""Whatever goes wrong in the pass: the program runs as in eager, its graph is as it was, and the report says so."""

import pytest
import torch
import torch.nn.functional as F
from helpers import V, assert_like_eager, assert_untouched, check_left_alone, hidden, labels, run_compiled, weight

from cce_inductor import capture_reports
from cce_inductor.graph import driver, effects, emitter, matmuls, reductions, registry, sites, sweeps
from cce_inductor.graph import rewrite as rewriting


class FaultError(Exception):
    pass


def fail(*args, **kwargs):
    raise FaultError("broken on purpose")


def two_heads(h, w, t):
    """Two sites, with labels that have to be moved, and two sweeps each."""
    value = h.sum() * 0
    for scale in (1.0, 2.0):
        x = F.linear(h * scale, w).float()
        value = value + x.logsumexp(-1).square().mean()
        shifted = F.pad(t, (0, 1), value=-100)[..., 1:].contiguous()
        value = value + F.cross_entropy(x.view(-1, V), shifted.view(-1), label_smoothing=0.1)
        value = value + F.cross_entropy(x.view(-1, V), t.view(-1))
    return value


def given():
    return hidden(), weight(), labels()


PLACES = {
    "find_sites": (driver, "find_sites"),
    "orphan_losses": (driver, "orphan_losses"),
    "why_not": (driver, "why_not"),
    "rewrite": (driver, "Rewriting"),
    "start": (matmuls, "start"),
    "is_worth_reporting": (driver, "is_worth_reporting"),
    "sweeps_of": (rewriting, "sweeps_of"),
    "same": (rewriting, "_require_same"),
    "describe": (rewriting, "_describe"),
    "unwritten": (rewriting, "_require_unwritten"),
    "emit": (emitter.Emitter, "call"),
    "fake_value": (emitter.Emitter, "_fake_value"),
    "grad_modes": (sites, "grad_modes"),
    "written": (effects, "written"),
    "flat_source": (sweeps, "_flat_source"),
    "location": (rewriting, "location"),
}


@pytest.mark.parametrize(("owner", "name"), PLACES.values(), ids=PLACES)
def test_a_failing_function_leaves_the_graph_as_it_was(monkeypatch, owner, name):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        ours = run_compiled(two_heads, *given())
    assert ours.report.rewritten == []
    assert any("failed" in refusal.reason and "broken on purpose" in refusal.reason for refusal in ours.report.refused)
    assert_untouched(ours)
    assert_like_eager(ours, two_heads, given())


@pytest.fixture
def failing_in_the_end(monkeypatch):
    """The pass fails after it has rewritten everything, as where the new graph would not pass its lint."""
    original = driver._rewrite_graph

    def rewrite_and_fail(*args):
        original(*args)
        fail()

    monkeypatch.setattr(driver, "_rewrite_graph", rewrite_and_fail)


@pytest.mark.usefixtures("failing_in_the_end")
def test_a_failure_after_all_rewrites_undoes_them():
    check_left_alone(two_heads, *given())


@pytest.mark.usefixtures("failing_in_the_end")
def test_what_is_undone_still_compiles():
    """AOTAutograd reads more of Dynamo's nodes than there is in their text."""
    torch._dynamo.reset()
    compiled = torch.compile(two_heads, backend="cce", options={"min_vocab": 0, "min_logits_bytes": 0})
    with capture_reports() as reports:
        loss = compiled(*given())
    assert [len(report.refused) for report in reports] == [1]
    torch.testing.assert_close(loss, two_heads(*given()))


@pytest.mark.parametrize("count", [1, 2, 5, 10, 15, 20, 30])
def test_a_failure_in_the_middle_of_writing_nodes(monkeypatch, count):
    """The second site fails after some nodes of it are written; the first one stays rewritten."""
    original, calls = emitter.Emitter.call, []

    def fail_later(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            raise FaultError("broken on purpose")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(emitter.Emitter, "call", fail_later)
        ours = run_compiled(two_heads, *given())
    assert len(ours.report.rewritten) + len(ours.report.refused) == 2
    assert len(ours.report.refused) == (count <= len(calls))
    assert_like_eager(ours, two_heads, given())


@pytest.mark.parametrize("error", [TypeError, ValueError, AssertionError, IndexError, KeyError, FaultError])
@pytest.mark.parametrize("operation", ["cross_entropy", "float", "view", "logsumexp"])
def test_a_failing_rule_is_a_refusal(monkeypatch, operation, error):
    def broken(*args, **kwargs):
        raise error("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setitem(registry.RULES, operation, broken)
        ours = run_compiled(two_heads, *given())
    assert ours.report.rewritten == []
    assert len(ours.report.refused) == 2
    assert "broken on purpose" in ours.report.refused[0].reason
    assert_untouched(ours)
    assert_like_eager(ours, two_heads, given())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda value: value.unsqueeze(0),
        lambda value: value.double(),
        lambda value: value.detach(),
        lambda value: value.to("meta"),
    ],
    ids=["shape", "dtype", "requires_grad", "device"],
)
def test_a_replacement_that_differs_from_the_program_is_not_taken(monkeypatch, wrong):
    original = reductions.losses.cross_entropy

    def cross_entropy(*args, **kwargs):
        return wrong(original(*args, **kwargs))

    def program(h, w, t):
        return F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1), label_smoothing=0.1)

    with monkeypatch.context() as patch:
        patch.setattr(reductions.losses, "cross_entropy", cross_entropy)
        ours = run_compiled(program, *given())
    if wrong(torch.zeros(1)).dtype == torch.float64:  # a dtype is set right by a cast
        assert len(ours.report.rewritten) == 1
    else:
        assert ours.report.rewritten == []
        assert "its replacement" in ours.report.refused[0].reason
        assert_untouched(ours)
    assert_like_eager(ours, program, given())


def test_a_failure_is_logged_with_its_traceback(monkeypatch, caplog):
    monkeypatch.setattr(driver, "find_sites", fail)
    run_compiled(two_heads, *given())
    [record] = [record for record in caplog.records if record.name.startswith("cce_inductor") and record.exc_info]
    assert record.exc_info[0] is FaultError
