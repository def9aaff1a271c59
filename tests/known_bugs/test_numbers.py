"""Overflow, equal and huge logits, sizes of one and zero, weights of zero."""

import pytest
import torch
import torch.nn.functional as F
from common import both_ways, compiled
from helpers import B, D, S, V, assert_close_to_eager, bias, check, hidden, labels, weight

from cce_inductor import linear_cross_entropy


@pytest.mark.parametrize("way", ["compiled", "called"])
@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**14, 2.0**18, 2.0**24, 2.0**40])
def test_a_gradient_scaler_sees_an_overflow_exactly_when_it_does_in_eager(way, scale):
    """The gradient of a float16 loss, scaled, is inf or nan in the same operands as eager's."""

    def program(h, w, t):
        return F.cross_entropy(F.linear(h, w).flatten(0, -2).float(), t.flatten(), reduction="sum")

    def called(h, w, t):
        with torch.autocast("cpu", torch.float16):
            return linear_cross_entropy(h, w, t, reduction="sum")

    h, w, t = hidden(dtype=torch.float16), weight(dtype=torch.float16), labels()
    ours = called if way == "called" else None
    if way == "compiled":
        run = check(program, h, w, t)
        assert len(run.report.rewritten) == 1
        ours = compiled(program, dynamic=False)
    given = torch.autograd.grad(ours(h, w, t) * scale, (h, w))
    expected = torch.autograd.grad(program(h, w, t) * scale, (h, w))
    for mine, theirs in zip(given, expected, strict=True):
        assert mine.isfinite().all() == theirs.isfinite().all()
    assert (scale >= 2.0**14) == (not expected[1].isfinite().all()), "both kinds are tried"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_whose_logits_are_all_equal(dtype):
    """The loss is the log of the number of classes; the gradient is uniform but for the target."""
    h = torch.zeros(B, S, D, dtype=dtype, requires_grad=True)
    loss = both_ways(h, weight(dtype=dtype), labels())
    torch.testing.assert_close(loss, torch.tensor(float(V)).log().to(dtype))
    same = weight(1, D, dtype=dtype, requires_grad=False).expand(V, D).contiguous().requires_grad_()
    both_ways(hidden(dtype=dtype), same, labels())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_of_ten_thousand(dtype, size):
    h = torch.full((B, S, D), 100.0, dtype=dtype)
    w = (size / (100 * D) * (1 + weight(requires_grad=False) / 8)).to(dtype)
    loss = both_ways(h.requires_grad_(), w.requires_grad_(), labels(), reduction="none")
    assert loss.isfinite().all()
    assert loss.max() > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocab", "width"), [(1, D), (V, 1), (1, 1), (2, 1)])
def test_one_class_or_a_width_of_one(vocab, width, dtype):
    h, w = hidden(B, S, width, dtype=dtype), weight(vocab, width, dtype=dtype)
    loss = both_ways(h, w, labels(classes=vocab), bias(vocab, dtype=dtype))
    assert vocab > 1 or loss == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(rows, reduction):
    both_ways(hidden(rows, 1, D), weight(), labels(rows, 1), bias(), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("share", [2, 1], ids=["every second", "all"])
def test_class_weights_of_zero(share, smoothing, reduction):
    """The mean over no weight at all is nan, as in eager."""
    c = torch.linspace(0.1, 2.0, V)
    c[::share] = 0
    options = {"label_smoothing": smoothing, "reduction": reduction}

    def eager(h, w, t, c):
        return F.cross_entropy(F.linear(h, w).flatten(0, -2), t.flatten(), weight=c, **options)

    def ours(h, w, t, c):
        return linear_cross_entropy(h.flatten(0, -2), w, t.flatten(), weight=c, **options)

    check(eager, hidden(), weight(), labels(), c)
    assert_close_to_eager(ours, eager, (hidden(), weight(), labels(), c))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_label_smoothing_of_one(reduction):
    both_ways(hidden(), weight(), labels(ignored=-100), bias(), label_smoothing=1.0, reduction=reduction)
