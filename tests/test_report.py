"""Reports, how they read, and the ways in which they reach a user."""

import io
import json
import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import EVERYTHING, B, D, S, V, hidden, labels, line_of, run_compiled, weight

from cce_inductor import Refusal, RefusedError, Report, Rewrite, capture_reports, explain
from cce_inductor.graph import words
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
        chain=f"w [V={V}, D={D}] -> mean cross-entropy, ignore_index -100",
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


def test_an_entry_says_the_way_of_the_logits_and_what_to_do():
    rewrite = replace(REWRITE, chain="head [V=32000, D=64] -> nll_loss")
    refusal = replace(REFUSAL, chain="head [V=9, D=3] -> dropout", matmul="model.py:8", advice="do without it")
    assert str(Report([rewrite], [refusal])).splitlines()[1:] == [
        f"  {REWRITE}",
        "      head [V=32000, D=64] -> nll_loss",
        f"  left alone: {REFUSAL}",
        "      head [V=9, D=3] -> dropout (the product: model.py:8)",
        "      what to do: do without it",
    ]
    assert str(refusal) == f"{REFUSAL}; do without it"


def test_a_report_as_dict_and_json():
    computed = replace(REWRITE, returned="computed, because of a test")
    report = Report([REWRITE, computed], [CHOICE], graphs=2)
    told = report.to_dict()
    assert (told["graphs"], told["saved_bytes"]) == (2, 5 << 20)
    assert [entry["saved_bytes"] for entry in told["rewritten"]] == [5 << 20, 0]
    assert told["rewritten"][0]["losses"] == ("cross_entropy", "logsumexp")
    assert (told["refused"][0]["reason"], told["refused"][0]["by_choice"]) == ("too few", True)
    assert json.loads(report.to_json()) == json.loads(json.dumps(told))


def test_a_report_as_a_table_of_rich():
    rich = pytest.importorskip("rich.console", reason="needs rich: pip install cce_inductor[bench]")
    refusal = replace(REFUSAL, chain="head [V=9, D=3] -> [:, :-1] -> dropout", advice="do without it", graph=2)
    console = rich.Console(width=200, record=True, file=io.StringIO())
    console.print(Report([REWRITE], [refusal], graphs=2))
    text = console.export_text()
    for part in ("1 rewritten, 1 refused", "model.py:7 (graph 1)", "5.0 MiB", "head [V=9, D=3] -> [:, :-1] -> dropout"):
        assert part in text
    assert "model.py:9 (graph 2)" in text
    assert "do without it" in text
    console.print(Report())
    assert "no loss over the logits" in console.export_text()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(V, D)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(D, V)])
        self.tied = torch.nn.Linear(D, V, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, h, t):
        return self.losses(h, t)


def tied_head(self, h, t):
    return F.cross_entropy(self.tied(h).float().view(-1, V), t.view(-1), ignore_index=-1)


def head_in_a_list(self, h, t):
    logits = 5 * torch.tanh(self.blocks[0](h).bfloat16() / 5)
    return F.cross_entropy(logits.float().view(-1, V), t.view(-1), label_smoothing=0.1)


def embedding_as_head(self, h, t):
    x = (h @ self.embed.weight.T)[:, :-1]
    loss = F.cross_entropy(x.reshape(-1, V), t[:, 1:].reshape(-1), weight=torch.ones(V), reduction="sum")
    return loss + x.logsumexp(-1).sum()


def log_probabilities(self, h, t):
    return self.tied(h).log_softmax(-1).gather(-1, t.unsqueeze(-1)).sum()


def chunked(self, h, t):
    losses = [
        F.cross_entropy(x.reshape(-1, V), y.reshape(-1), reduction="none").sum()
        for x, y in zip(self.tied(h).chunk(S, 1), t.chunk(S, 1), strict=True)
    ]
    return sum(losses)


SMALL = f"[V={V}, D={D}]"
CHAINS = {
    tied_head: f"tied {SMALL} -> mean cross-entropy, ignore_index -1",
    head_in_a_list: f"blocks.0 [V={V}, D={D}, bias] -> bfloat16 -> / 5 -> tanh -> 5 * x -> float32 -> "
    "mean cross-entropy, ignore_index -100, label smoothing 0.1",
    embedding_as_head: f"embed {SMALL} -> [:, :-1] -> sum cross-entropy, ignore_index -100, class weights + logsumexp",
    log_probabilities: f"tied {SMALL} -> log_softmax(-1) -> gather",
    chunked: f"tied {SMALL} -> chunk({S}, 1) -> {S} x cross-entropy of each row, ignore_index -100",
}


@pytest.mark.parametrize(("losses", "words"), CHAINS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_the_way_of_the_logits_in_words(monkeypatch, losses, words):
    monkeypatch.setattr(Net, "losses", losses, raising=False)
    [rewrite] = explain(Net(), OPTIONS)(hidden(), labels()).rewritten
    assert rewrite.chain == words


def test_the_way_to_what_is_in_the_way():
    report = explain(refused, OPTIONS)(hidden(), weight(), labels())
    [refusal] = report.refused
    assert refusal.chain == f"w {SMALL} -> dropout"
    assert refusal.matmul == line_of(refused, "logits = F.linear")
    assert refusal.advice.startswith("leave it out between the product and the loss")


def test_words_never_cost_a_rewrite(monkeypatch):
    monkeypatch.setattr(words, "head", None)
    [rewrite] = run_compiled(program, hidden(), weight(), labels()).report.rewritten
    assert rewrite.chain == ""


def test_operator_calls_are_counted_after_joining():
    def program(h, w, t):
        logits = F.linear(h, w)
        chunks = zip(logits.chunk(S, 1), t.chunk(S, 1), strict=True)
        other = F.cross_entropy(F.linear(2 * h, w).view(-1, V), t.view(-1))
        return other + sum(F.cross_entropy(x.reshape(-1, V), y.reshape(-1)) for x, y in chunks)

    ours = run_compiled(program, hidden(), weight(), labels())
    assert len(ours.operator_calls) == 1
    assert [rewrite.operator_calls for rewrite in ours.report.rewritten] == [1, 1]


# --------------------------------------------------------------------------------------------------------- explain


def test_explain_reports_over_all_graphs():
    report = explain(two_graphs, OPTIONS)(hidden(), weight(), labels())
    assert (len(report.rewritten), len(report.refused), report.graphs) == (1, 1, 2)
    assert report.refused[0].location == line_of(refused, "# the line in the way")
    text = str(report)
    assert text.startswith("cce_inductor: 1 rewritten, 1 refused, 2 graph(s)\n  graph 1:\n")
    assert [entry.graph for entry in (*report.rewritten, *report.refused)] == [1, 2]
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


@pytest.mark.parametrize("apart", ["by_a_break", "by_two_compilations"])
def test_explain_says_that_head_and_loss_are_apart(apart):
    def model(h, w):
        return F.linear(h, w)

    def loss(logits, t):
        return F.cross_entropy(logits.view(-1, V), t.view(-1))

    def broken(h, w, t):
        logits = model(h, w)
        torch._dynamo.graph_break()
        return loss(logits, t)

    if apart == "by_a_break":
        report = explain(broken, OPTIONS)(hidden(), weight(), labels())
    else:
        report = explain(loss, OPTIONS)(hidden(B, S, V), labels())
    [refusal] = report.refused
    assert refusal.reason == (
        "its logits are an input of this graph, `logits`, and what makes them is not compiled with it"
    )
    assert refusal.chain == "logits -> mean cross-entropy, ignore_index -100"
    assert "one function that calls the model and then the loss" in refusal.advice


def test_explain_says_where_dynamo_ends_graphs():
    """The break is in a part of the model that neither the head's graph nor the loss's knows of."""

    def part(h):
        if h.sum() > 1e9:  # it depends on data
            h = h * 2
        return h

    def model(h, w):
        return F.linear(part(h) + 1, w)

    def program(h, w, t):
        logits = model(h, w)
        return F.cross_entropy(logits.view(-1, V), t.view(-1))

    report = explain(program, OPTIONS)(hidden(), weight(), labels())
    assert report.rewritten == []
    assert f"\n  Dynamo ends a graph at {line_of(part, '# it depends on data')}: " in str(report)
    assert report.to_dict()["breaks"] == report.breaks


def test_explain_says_that_dynamo_leaves_out_what_it_can_not_trace():
    def part(h):
        for scale in (1.0, 2.0):
            if h.sum() > 1e9:  # in a loop: Dynamo leaves the whole function out, and calls what it calls
                h = torch.relu(h) * scale
        return head(h)

    def head(h):
        return F.linear(h, weight())

    report = explain(part, OPTIONS)(hidden())
    assert report.rewritten == []
    assert report.graphs > 1
    assert "Dynamo ends a graph at " in str(report) or "Dynamo leaves a part of the program uncompiled" in str(report)


def test_explain_where_nothing_is_compiled():
    assert "nothing was compiled" in str(explain(len)([]))


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
