"""Reports, how they read, and the ways in which they reach a user."""

import logging

import pytest
import torch
import torch.nn.functional as F
from helpers import EVERYTHING, B, D, S, V, hidden, labels, line_of, run_compiled, weight

from cce_inductor import Refusal, RefusedError, Report, Rewrite, capture_reports, explain
from cce_inductor.report import publish

REWRITE = Rewrite("model.py:7", ("cross_entropy", "logsumexp"), ("s0 x 4", "32000", "64"), "2*tanh(z)", 1, 5 << 20)
REFUSAL = Refusal("model.py:9", "dropout", "`dropout` of the logits is not understood")
CHOICE = Refusal("", "cross_entropy", "too few", by_choice=True)
OPTIONS = {"min_vocab": 0, "min_logits_bytes": 0}


def program(h, w, t):
    logits = F.linear(h, w)  # the line of the product
    return F.cross_entropy(logits.view(-1, V), t.view(-1))


def refused(h, w, t):
    logits = F.linear(h, w)
    logits = F.dropout(logits, 0.0)  # the line in the way
    return F.cross_entropy(logits.view(-1, V), t.view(-1))


def two_graphs(h, w, t):
    first = program(h, w, t)
    torch._dynamo.graph_break()
    return first + refused(h, w, t)


# ---------------------------------------------------------------------------------------------------- how they read


def test_a_rewrite_reads_as_one_line():
    assert str(REWRITE) == (
        "model.py:7: rewrote cross_entropy + logsumexp of [s0 x 4, 32000] logits (width 64), logit map 2*tanh(z): "
        "5.0 MiB of logits are never stored"
    )


def test_a_rewrite_of_unknown_place_and_size():
    rewrite = Rewrite("", ("nll_loss",), ("8", "9", "3"), "z", 1, None)
    assert str(rewrite) == "rewrote nll_loss of [8, 9] logits (width 3)"


def test_a_refusal_reads_as_one_line():
    assert str(REFUSAL) == "model.py:9: dropout: `dropout` of the logits is not understood"
    assert str(CHOICE) == "cross_entropy: too few"


def test_a_report_reads_as_a_list():
    lines = str(Report([REWRITE], [REFUSAL, CHOICE], graphs=3)).splitlines()
    assert lines == [
        "cce_inductor: 1 rewritten, 2 refused, 3 graph(s)",
        f"  {REWRITE}",
        f"  left alone: {REFUSAL}",
        f"  left alone: {CHOICE}",
    ]


def test_an_empty_report_says_so():
    assert "no loss over the logits of a classifier head was found" in str(Report())


def test_a_rewrite_says_what_was_rewritten():
    ours = run_compiled(program, hidden(), weight(), labels())
    [rewrite] = ours.report.rewritten
    assert rewrite == Rewrite(
        location=line_of(program, "# the line of the product"),
        losses=("cross_entropy",),
        shape=(f"{B} x {S}", str(V), str(D)),
        logit_map="z",
        operator_calls=1,
        logits_bytes=B * S * V * 4,
    )


def test_dynamic_sizes_are_printed_by_their_symbols():
    ours = run_compiled(program, hidden(), weight(), labels(), dynamic=True)
    rows, _, _ = ours.report.rewritten[0].shape
    assert rows.startswith("s")
    assert ours.report.rewritten[0].logits_bytes == B * S * V * 4


def test_the_line_inside_a_module_is_the_users():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(D, V)
            self.loss = torch.nn.CrossEntropyLoss()

        def forward(self, h, t):
            logits = self.head(h)  # the line of the product
            return self.loss(logits.view(-1, V), t.view(-1))

    ours = run_compiled(lambda model, h, t: model(h, t), Model(), hidden(), labels())
    assert ours.report.rewritten[0].location == line_of(Model.forward, "# the line of the product")


# --------------------------------------------------------------------------------------------------------- explain


def test_explain_reports_over_all_graphs():
    report = explain(two_graphs, OPTIONS)(hidden(), weight(), labels())
    assert (len(report.rewritten), len(report.refused), report.graphs) == (1, 1, 2)
    assert report.refused[0].location == line_of(refused, "# the line in the way")
    text = str(report)
    assert text.startswith("cce_inductor: 1 rewritten, 1 refused, 2 graph(s)\n")
    assert f"  left alone: {line_of(refused, '# the line in the way')}: dropout: " in text


def test_explain_of_a_module():
    class Model(torch.nn.Linear):
        def forward(self, h, t):
            return F.cross_entropy(super().forward(h).view(-1, V), t.view(-1))

    report = explain(Model(D, V), OPTIONS)(hidden(), t=labels())
    assert len(report.rewritten) == 1


def test_explain_uses_the_defaults():
    report = explain(program)(hidden(), weight(), labels())
    assert report.rewritten == []
    assert "min_vocab=4096" in report.refused[0].reason
    assert report.refused[0].by_choice


def test_explain_of_a_program_without_a_head():
    report = explain(lambda x: x + 1)(torch.ones(3))
    assert (report.rewritten, report.refused, report.graphs) == ([], [], 1)


def test_explain_checks_the_options_at_once():
    with pytest.raises(ValueError, match="unknown option 'vocab'"):
        explain(program, {"vocab": 3})


def test_explain_hands_on_the_errors_of_the_program():
    with pytest.raises(IndexError, match="out of bounds"):
        explain(program, OPTIONS)(hidden(), weight(), torch.full((B, S), V))


def test_explain_does_not_raise_where_refusals_would():
    report = explain(refused, OPTIONS | {"on_refusal": "raise"})(hidden(), weight(), labels())
    assert len(report.refused) == 1


# ------------------------------------------------------------------------------------------------------ publishing


def test_one_log_line_for_each_rewrite_and_refusal(caplog):
    with caplog.at_level(logging.INFO, "cce_inductor"):
        publish(Report([REWRITE], [REFUSAL, CHOICE]), "log")
    assert caplog.messages == [str(REWRITE), f"left alone: {REFUSAL}", f"left alone: {CHOICE}"]


def test_warnings_name_all_refusals_but_those_by_choice():
    with pytest.warns(UserWarning, match="left a loss as it was") as warned:
        publish(Report([], [REFUSAL, CHOICE, REFUSAL]), "warn")
    [warning] = warned
    assert str(warning.message).splitlines() == ["cce_inductor left a loss as it was:", str(REFUSAL), str(REFUSAL)]


def test_raising_names_the_refusals():
    with pytest.raises(RefusedError, match=r"model.py:9: dropout"):
        publish(Report([REWRITE], [REFUSAL]), "raise")


@pytest.mark.parametrize("on_refusal", ["log", "warn", "raise"])
@pytest.mark.filterwarnings("error")
def test_nothing_happens_without_a_refusal_in_the_way(on_refusal):
    publish(Report([REWRITE], [CHOICE]), on_refusal)


def test_capture_reports_collects_while_it_is_open():
    with capture_reports() as outer:
        publish(Report([REWRITE]), "log")
        with capture_reports() as inner:
            publish(Report([], [REFUSAL]), "log")
    publish(Report(), "log")
    assert [len(report.rewritten) for report in outer] == [1, 0]
    assert inner == [outer[1]]


def test_capture_reports_ends_with_an_error():
    with pytest.raises(KeyError), capture_reports() as reports:
        raise KeyError
    publish(Report(), "log")
    assert reports == []


def test_capture_reports_collects_before_a_refusal_raises():
    with capture_reports() as reports, pytest.raises(RefusedError):
        publish(Report([], [REFUSAL]), "raise")
    assert len(reports) == 1


def test_everything_are_the_options_of_these_tests():
    assert (EVERYTHING.min_vocab, EVERYTHING.min_logits_bytes) == tuple(OPTIONS.values())
