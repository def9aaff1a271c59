"""Classes that are masked out: their logits are a number without gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import V, bias, check, hidden, labels, run_compiled, run_eager, weight

LAST = 47  # classes from here on are padding in these tests
PADDING = torch.arange(V) >= LAST
INFINITE = -math.inf


def args(dtype=torch.float32):
    return hidden(dtype=dtype), weight(dtype=dtype), labels(classes=LAST)


FILLS = {
    "masked_fill": lambda x: x.masked_fill(PADDING, INFINITE),
    "masked_fill_row": lambda x: x.masked_fill(PADDING.view(1, 1, V), INFINITE),
    "masked_fill_in_place": lambda x: x.masked_fill_(PADDING, INFINITE),
    "masked_fill_number": lambda x: x.masked_fill(PADDING, -3.0),
    "masked_fill_lowest": lambda x: x.masked_fill(PADDING, torch.finfo(x.dtype).min),
    "where": lambda x: torch.where(PADDING, INFINITE, x),
    "where_kept": lambda x: torch.where(~PADDING, x, INFINITE),
    "where_method": lambda x: x.where(~PADDING, -2.0),
    "set_slice": lambda x: _set(x, (..., slice(LAST, None)), INFINITE),
    "set_slice_from_the_end": lambda x: _set(x, (slice(None), slice(None), slice(LAST - V, None)), INFINITE),
    "set_number": lambda x: _set(x, (..., slice(LAST, None)), -1e4),
    "set_one": lambda x: _set(x, (..., V - 1), INFINITE),
    "set_ids": lambda x: _set(x, (..., torch.tensor([LAST, V - 1])), INFINITE),
    "set_list": lambda x: _set(x, (slice(None), slice(None), [LAST, V - 1]), torch.finfo(x.dtype).min),
    "set_list_from_the_end": lambda x: _set(x, (..., [-1, LAST]), INFINITE),
    "set_mask": lambda x: _set(x, (..., PADDING), INFINITE),
    "index_fill": lambda x: x.index_fill(-1, torch.tensor([LAST, V - 1]), INFINITE),
    "after_a_softcap": lambda x: (5 * torch.tanh(x / 5)).masked_fill(PADDING, INFINITE),
    "before_a_temperature": lambda x: x.masked_fill(PADDING, INFINITE) / 0.7,
    "number_before_a_softcap": lambda x: 5 * torch.tanh(x.masked_fill(PADDING, -8.0) / 5),
    "twice": lambda x: x.masked_fill(PADDING, INFINITE).masked_fill(torch.arange(V) == V - 1, INFINITE),
    "then_sliced": lambda x: x.masked_fill(PADDING, INFINITE)[..., : V - 1],
}


def _set(x, index, value):
    x[index] = value
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
def test_masked_classes(fill, dtype):
    def program(h, w, t):
        x = fill(F.linear(h, w))
        return F.cross_entropy(x.flatten(0, -2), t.view(-1))

    ours = check(program, *args(dtype))
    assert ours.gradients[1][V - 1].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_classes_of_logits_with_a_bias(dtype):
    def program(h, w, b, t):
        x = F.linear(h, w, b).masked_fill(PADDING, INFINITE)
        return F.cross_entropy(x.flatten(0, -2), t.view(-1))

    check(program, hidden(dtype=dtype), weight(dtype=dtype), bias(dtype=dtype), labels(classes=LAST))


def test_a_bias_of_minus_infinity_is_not_a_mask():
    def program(h, w, b, t):
        return F.cross_entropy((F.linear(h, w) + b).flatten(0, -2), t.view(-1))

    check(program, hidden(), weight(), torch.where(PADDING, INFINITE, 0.0), labels(classes=LAST))


@pytest.mark.parametrize("fill", [INFINITE, -1e4])
def test_targets_among_the_masked_classes(fill):
    """An infinite loss for -inf, a large one for a number; in both, no gradient for the target's row of the weight."""

    def program(h, w, t):
        x = F.linear(h, w).masked_fill(PADDING, fill)
        return F.cross_entropy(x.flatten(0, -2), t.view(-1), reduction="none")

    given = (hidden(), weight(), labels())
    ours = run_compiled(program, *given)
    eager = run_eager(program, given)
    assert len(ours.report.rewritten) == 1
    assert eager.outputs[0].max() > 1e3
    for mine, theirs in zip(ours.outputs + ours.gradients, eager.outputs + eager.gradients, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_every_class_masked():
    """The loss is nan, as eager's is."""

    def program(h, w, t):
        x = F.linear(h, w).masked_fill(torch.ones(V, dtype=torch.bool), INFINITE)
        return F.cross_entropy(x.flatten(0, -2), t.view(-1), reduction="none")

    given = (hidden(), weight(), labels())
    ours = run_compiled(program, *given)
    assert len(ours.report.rewritten) == 1
    assert ours.outputs[0].isnan().all()
    assert run_eager(program, given).outputs[0].isnan().all()


def test_nan_hidden_states_are_not_taken_for_masked():
    def program(h, w, t):
        x = F.linear(h, w).masked_fill(PADDING, -5.0)
        return F.cross_entropy(x.flatten(0, -2), t.view(-1), reduction="none")

    h = hidden(requires_grad=False)
    h[0, 0, 0] = math.nan
    ours = run_compiled(program, h, weight(), labels(classes=LAST))
    assert len(ours.report.rewritten) == 1
    assert ours.outputs[0].isnan().tolist() == [True] + [False] * (labels().numel() - 1)


REFUSED = {
    "of_rows": (lambda x, b: x.masked_fill(torch.ones(7, 1, dtype=torch.bool), 0.0), "differs from row to row"),
    "with_a_tensor": (lambda x, b: torch.where(PADDING, b, x), "fill them with a number"),
    "two_numbers": (lambda x, b: x.masked_fill(PADDING, -1.0).masked_fill(~PADDING, 2.0), "filled twice"),
    "log_probs": (lambda x, b: x.log_softmax(-1).masked_fill(PADDING, 0.0), "mask the logits before"),
    "number_on_a_bias": (lambda x, b: (x + b).masked_fill(PADDING, -1.0), "fill them with -inf"),
    "bias_afterwards": (lambda x, b: x.masked_fill(PADDING, -1.0) + b, "add it before the map"),
    "some_rows": (lambda x, b: _set(x, (0, ..., slice(3, 5)), -1.0), "write classes of all rows"),
    "with_a_step": (lambda x, b: _set(x, (..., slice(0, None, 2)), -1.0), "write a mask [V]"),
}


@pytest.mark.parametrize(("fill", "reason"), REFUSED.values(), ids=REFUSED)
def test_masks_that_are_left_alone(fill, reason):
    def program(h, w, b, t):
        return F.cross_entropy(fill(F.linear(h, w), b).flatten(0, -2), t.view(-1)) + 0 * b.sum()

    given = (hidden(), weight(), bias(), labels(classes=LAST))
    ours = check(program, *given, rewrites=0, calls=0, refusals=1, logits_in_memory=True)
    assert reason in str(ours.report.refused[0])
