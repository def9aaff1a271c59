"""What is not understood stays exactly as it was, and the report says why, with the user's line."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EVERYTHING,
    B,
    D,
    S,
    V,
    assert_like_eager,
    assert_untouched,
    check,
    check_left_alone,
    check_refused,
    hidden,
    labels,
    line_of,
    run_compiled,
    weight,
)
from torch._dynamo.exc import BackendCompilerFailed

from cce_inductor import Options, RefusedError, cce_backend
from cce_inductor.graph import sites


def args(requires_grad=True):
    return hidden(requires_grad=requires_grad), weight(requires_grad=requires_grad), labels()


# ------------------------------------------------------------------------------------------ logits that are needed


def large_head(requires_grad):
    return hidden(20, D, requires_grad=requires_grad), weight(1500, D, requires_grad=requires_grad)


def test_logits_returned_without_a_loss():
    def program(h, w):
        return F.linear(h, w)  # <-

    check_refused(program, *large_head(True), operation="return", reason="compile head and loss together")


def test_logits_returned_in_inference_are_nobodys_mistake():
    def program(h, w):
        return F.linear(h, w)  # <-

    given = large_head(False)
    check_refused(program, *given, operation="return", reason="compile head and loss together", by_choice=True)


def test_a_small_layer_that_is_returned_is_not_worth_a_word():
    ours = run_compiled(lambda h, w: F.linear(h, w), hidden(), weight())
    assert ours.report.refused == []


def test_logits_that_are_an_input_of_the_graph():
    def program(logits, t):
        return F.cross_entropy(logits.view(-1, V), t.view(-1))  # <-

    check_refused(
        program, hidden(B, S, V), labels(), operation="cross_entropy", reason="an input of this graph, `logits`"
    )


def test_a_graph_that_breaks_before_the_loss():
    def program(h, w, t):
        logits = F.linear(h, w)
        torch._dynamo.graph_break()
        return F.cross_entropy(logits.view(-1, V), t.view(-1))

    ours = run_compiled(program, hidden(), weight(), labels(), fullgraph=False)
    [refusal] = ours.report.refused
    assert "an input of this graph, `logits`, and what makes them is not compiled with it" in refusal.reason
    assert_like_eager(ours, program, args())


def test_logits_that_leave_a_graph_that_breaks():
    def program(h, w, t):
        logits = F.linear(h, w)
        torch._dynamo.graph_break()  # <-
        return F.cross_entropy(logits, t)

    given = (*large_head(True), labels(20, classes=1500))
    ours = run_compiled(program, *given, fullgraph=False)
    left, orphan = ours.report.refused
    assert f"which breaks at {line_of(program, '# <-')}: Call to `torch._dynamo.graph_break()`" in left.reason
    assert left.advice.startswith("avoid the break; compile head and loss together")
    assert "an input of this graph, `logits`" in orphan.reason
    assert_like_eager(ours, program, given)


def test_logits_of_a_product_whose_operand_is_made_of_the_vocabulary():
    """A lookup in a matrix of scores."""

    def program(scores, t):
        return F.cross_entropy(scores[t].view(-1, V), t.view(-1))  # <-

    check_refused(program, weight(V, V), labels(), operation="cross_entropy", reason="no product with a weight")


READERS = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "argmin": lambda x: x.argmin(-1),
    "softmax": lambda x: x.softmax(-1),
    "topk": lambda x: x.topk(2).values,
    "min": lambda x: x.min(-1).values,
    "erf": lambda x: x.erf(),
    "matmul": lambda x: x @ x.mT,
    "numel_free_norm": lambda x: x.norm(),
    "cumsum": lambda x: x.cumsum(-1),
}


@pytest.mark.parametrize(("name", "reader"), READERS.items(), ids=READERS)
def test_logits_that_something_else_reads_too(name, reader):
    def program(h, w, t):
        x = F.linear(h, w)
        other = reader(x).sum() * 0
        return F.cross_entropy(x.view(-1, V), t.view(-1)) + other

    ours = run_compiled(program, *args())
    assert ours.report.rewritten == []
    [refusal] = ours.report.refused
    assert refusal.operation == {"numel_free_norm": "norm", "softmax": "sum"}.get(name, name)
    logits = "the logits (softmax)" if name == "softmax" else "the logits"
    assert refusal.reason == f"`{refusal.operation}` of {logits} is not understood, so they are needed in memory"
    assert refusal.location.startswith(f"{__file__}:")
    assert_untouched(ours)
    assert_like_eager(ours, program, args())


DROPPED = {
    "reshape": lambda x: x.reshape(-1),
    "chain": lambda x: x.float().flatten().unsqueeze(0)[:, 1:],
    "stack": lambda x: torch.stack([x, x * 2]).view(-1, V),
}


@pytest.mark.parametrize("function", DROPPED.values(), ids=DROPPED)
def test_what_a_program_computes_and_drops_is_in_nobodys_way(function):
    """Models that return their logits in another shape, compiled in a function that returns the loss alone."""

    def program(h, w, t):
        x = F.linear(h, w)
        loss = F.cross_entropy(x.view(-1, V), t.view(-1))
        function(x)
        return loss

    check(program, *args())


def test_random_numbers_that_are_dropped_are_drawn():
    def program(h, w, t):
        x = F.linear(h, w)
        loss = F.cross_entropy(x.view(-1, V), t.view(-1))
        F.dropout(x, 0.5)  # <-
        return loss

    check_refused(program, *args(), operation="dropout", reason="`dropout` of the logits is not understood")


def test_the_line_of_the_operation_in_the_way():
    def program(h, w, t):
        x = F.linear(h, w)
        x = F.dropout(x, 0.0)  # <-
        return F.cross_entropy(x.view(-1, V), t.view(-1))

    check_refused(program, *args(), operation="dropout", reason="is not understood")


def test_soft_targets():
    def program(h, w, p):
        return F.cross_entropy(F.linear(h, w).view(-1, V), p)  # <-

    given = (hidden(), weight(), torch.rand(B * S, V).softmax(-1))
    check_refused(program, *given, operation="cross_entropy", reason="its targets are probabilities")


def test_the_loss_over_the_rows_of_logits_with_a_bias():
    def program(image, text, b):
        x = F.linear(image, text, b)
        return F.cross_entropy(x.t(), torch.arange(image.size(0)))  # <-

    given = (hidden(20, D), weight(20, D), torch.zeros(20))
    check_refused(program, *given, operation="cross_entropy", reason="class dimension is not the vocabulary")


LISTS = {
    "cat": lambda x, y: torch.cat([x, y]),
    "cat_rows": lambda x, y: torch.cat((x[:5], x[5:])),
    "stack": lambda x, y: torch.stack([x, y]),
    "where": lambda x, y: torch.where(x > 0, x, y),
}


@pytest.mark.parametrize("combine", LISTS.values(), ids=LISTS)
def test_logits_joined_with_others(combine):
    def program(h, w, t):
        x, y = F.linear(h, w).flatten(0, 1), F.linear(h * 2, w).flatten(0, 1)
        joined = combine(x, y).reshape(-1, V)
        return F.cross_entropy(joined, t.flatten().repeat(joined.size(0) // t.numel())) + 0 * y.sum()

    ours = check_left_alone(program, *args())
    assert ours.report.refused


OTHERS = {
    "deprecated_arguments": (
        lambda x, t: F.cross_entropy(x, t, size_average=True),
        "deprecated arguments size_average or reduce",
    ),
    "nll_of_logits": (lambda x, t: F.nll_loss(x, t), "did you mean cross_entropy?"),
    "gather_of_rows": (lambda x, t: x.gather(0, t.view(-1, 1) % 7).sum(), "gather along the vocabulary"),
    "gather_in_some_rows": (lambda x, t: x.gather(-1, t[:7, None]).sum(), "gather along the vocabulary"),
    "logsumexp_of_rows": (lambda x, t: x.logsumexp(0).sum(), "another dimension than the vocabulary"),
    "logsumexp_of_all": (lambda x, t: x.logsumexp((0, 1)).sum(), "another dimension than the vocabulary"),
    "logsumexp_of_log_softmax": (lambda x, t: x.log_softmax(-1).logsumexp(-1).sum(), "whose logsumexp is zero"),
    "log_softmax_of_rows": (lambda x, t: x.log_softmax(0)[0, 0], "another dimension than the vocabulary"),
    "shifted_log_probs": (lambda x, t: (2 + x.log_softmax(-1)).gather(-1, t[:, None]).sum(), "after picking"),
    "sliced_log_probs": (lambda x, t: x.log_softmax(-1)[:, :10].sum(), "slice the logits"),
    "every_second_class": (lambda x, t: F.cross_entropy(x[:, ::2], t // 2), "step by one"),
    "one_class": (lambda x, t: x[:, 3].sum(), "use gather(-1, index) or cross_entropy"),
    "two_index_tensors": (lambda x, t: x[t % 7, t].sum(), "use one index tensor, or gather"),
    "written_index": (lambda x, t: x[torch.arange(t.numel()).fill_(1), t].sum(), "use one index tensor, or gather"),
    "across_the_vocabulary": (lambda x, t: x.reshape(V, -1).logsumexp(-1).sum(), "keep that dimension whole"),
    "sum_of_all": (lambda x, t: x.sum() * 0, "another dimension than the vocabulary"),
    "to_int": (lambda x, t: x.to(torch.int64).sum(), "converted to torch.int64"),
    "to_float64": (lambda x, t: F.cross_entropy(x.double(), t), "converted to float64"),
    "broadcast": (lambda x, t: F.cross_entropy((x + torch.zeros(2, 1, V))[0], t), "differs from row to row"),
}


@pytest.mark.parametrize(("loss", "reason"), OTHERS.values(), ids=OTHERS)
def test_losses_that_are_left_alone(loss, reason):
    """A loss beside it, so that the refusal is reported also where this is none."""

    def program(h, w, t):
        x = F.linear(h, w).view(-1, V)
        return F.cross_entropy(x, t.view(-1)) + loss(x, t.view(-1))

    with warnings.catch_warnings(action="ignore"):
        ours = check_left_alone(program, *args())
        assert reason in str(ours.report.refused[0])


def test_smoothing_over_a_dynamic_vocabulary():
    def program(h, w, t):
        return F.cross_entropy(F.linear(h, w).view(-1, w.size(0)), t.view(-1), label_smoothing=0.1)  # <-

    check_refused(program, *args(), operation="cross_entropy", reason="vocabulary of a constant size", dynamic=True)


# ---------------------------------------------------------------------------------------------- too small to gain


def test_fewer_classes_than_min_vocab():
    def program(h, w, t):
        x = F.linear(h, w)  # <-
        return F.cross_entropy(x.view(-1, V), t.view(-1))

    check_refused(
        program,
        *args(),
        operation="cross_entropy",
        reason=f"{V} classes are fewer than min_vocab={V + 1}",
        by_choice=True,
        options=Options(min_vocab=V + 1, min_logits_bytes=0),
    )
    check(program, *args(), options=Options(min_vocab=V, min_logits_bytes=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_smaller_logits_than_min_logits_bytes(dtype, dynamic):
    def program(h, w, t):
        x = F.linear(h, w)  # <-
        return F.cross_entropy(x.view(-1, V), t.view(-1))

    size = B * S * V * dtype.itemsize
    given = (hidden(dtype=dtype), weight(dtype=dtype), labels())
    check_refused(
        program,
        *given,
        operation="cross_entropy",
        reason=f"the logits take {size} bytes, less than min_logits_bytes={size + 1}",
        by_choice=True,
        options=Options(min_vocab=0, min_logits_bytes=size + 1),
        dynamic=dynamic,
    )
    check(program, *given, options=Options(min_vocab=0, min_logits_bytes=size), dynamic=dynamic)


def test_fewer_operations_than_min_flops_on_a_gpu(monkeypatch):
    """Chunks on one weight count together, as they become one call. float32 and a CPU have no such limit."""

    def program(h, w, t):
        first, second = (
            F.cross_entropy(F.linear(x, w).view(-1, V), y.reshape(-1))
            for x, y in zip(h.chunk(2, 1), t.chunk(2, 1), strict=True)
        )
        return first + second

    def report_of(dtype, min_flops):
        options = Options(min_vocab=0, min_logits_bytes=0, min_flops=min_flops)
        return run_compiled(program, hidden(dtype=dtype), weight(dtype=dtype), labels(), options=options).report

    flops = 2 * B * S * V * D
    monkeypatch.setattr(sites, "FEWEST_GPU_ROWS", B * S)
    assert len(report_of(torch.bfloat16, flops + 1).rewritten) == 2
    monkeypatch.setattr(sites, "on_gpu", lambda node: True)
    assert len(report_of(torch.bfloat16, flops).rewritten) == 2
    assert len(report_of(torch.float32, flops + 1).rewritten) == 2
    refused = report_of(torch.bfloat16, flops + 1).refused
    monkeypatch.setattr(sites, "FEWEST_GPU_ROWS", B * S + 1)
    refused += report_of(torch.bfloat16, 1).refused
    assert [refusal.by_choice for refusal in refused] == [True] * 4
    assert all("less than min_flops=" in refusal.reason for refusal in refused[:2])
    assert all(f"{B * S} rows are fewer than {B * S + 1}" in refusal.reason for refusal in refused[2:])
    assert len(report_of(torch.bfloat16, 0).rewritten) == 2


def test_a_small_head_is_refused_by_choice_whatever_else_reads_it():
    """The router of a mixture of experts has a z-loss on logits that it also needs."""

    def program(h, w, t):
        router = F.linear(h, w)  # <-
        return router.softmax(-1).sum() * 0 + router.logsumexp(-1).square().mean()

    check_refused(
        program,
        *args(),
        operation="logsumexp",
        reason="too few to gain",
        by_choice=True,
        options=Options(),
    )


def test_the_mean_of_activations_is_no_loss():
    """A layer normalization by hand, behind a product, is not reported."""

    def program(h, p, w, t):
        x = F.linear(h, p)
        x = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return F.cross_entropy(F.linear(x, w).view(-1, V), t.view(-1))

    check(program, hidden(), weight(D, D).detach(), weight(), labels())


# ------------------------------------------------------------------------------------------------------ on_refusal


def refused_program(h, w, t):
    return F.cross_entropy(F.dropout(F.linear(h, w), 0.0).view(-1, V), t.view(-1))


def compile_with(**options):
    """With the whole backend, as far as the lowering to Inductor, which is left out."""
    torch._dynamo.reset()
    options |= {"min_vocab": options.get("min_vocab", 0), "min_logits_bytes": 0}
    return torch.compile(refused_program, backend=cce_backend, options=options)


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch):
    from cce_inductor import compat

    monkeypatch.setattr(compat, "inductor_backend", lambda mode, options: lambda gm, inputs: gm.forward)


def test_on_refusal_log(caplog):
    with warnings.catch_warnings(action="error"), caplog.at_level(logging.INFO, "cce_inductor"):
        compile_with(on_refusal="log")(*args())
    assert any("left alone" in message and "dropout" in message for message in caplog.messages)


def test_on_refusal_warn():
    with pytest.warns(UserWarning, match=r"left a loss as it was:\n.*test_refusals.py:\d+: dropout: "):
        compile_with(on_refusal="warn")(*args())


def test_on_refusal_raise():
    with pytest.raises(BackendCompilerFailed, match="dropout") as raised:
        compile_with(on_refusal="raise")(*args())
    assert isinstance(raised.value.inner_exception, RefusedError)


@pytest.mark.parametrize("on_refusal", ["warn", "raise"])
def test_a_refusal_by_choice_is_only_logged(on_refusal):
    with warnings.catch_warnings(action="error"):
        compile_with(on_refusal=on_refusal, min_vocab=V + 1)(*args())


def test_everything_is_the_option_of_these_tests():
    assert Options(min_vocab=0, min_logits_bytes=0, min_flops=0) == EVERYTHING
