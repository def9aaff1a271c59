"""Programs that random testing found to go wrong, shrunk."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from helpers import check, check_refused, hidden, labels, run_compiled, run_eager, weight
from torch.utils.checkpoint import checkpoint


def test_hardtanh_with_its_default_bounds():
    def program(h, w, t):
        logits = F.hardtanh(F.linear(h, w))
        return F.cross_entropy(logits.flatten(0, 1), t.flatten())

    check(program, hidden(), weight(), labels())


def test_products_with_the_same_slice_of_a_weight_are_joined():
    def program(h, w, t):
        losses = [F.cross_entropy(F.linear(h[i, :, :4], w[:, :4]), t[i], reduction="sum") for i in range(3)]
        return sum(losses)

    check(program, hidden(), weight(), labels(), rewrites=3, calls=1, logits_in_memory=True)


def test_a_checkpoint_without_gradients():
    def loss(h, w, t):
        return F.cross_entropy(F.linear(h, w).flatten(0, 1), t.flatten())

    def program(h, w, t):
        with torch.no_grad():
            return checkpoint(loss, h, w, t, use_reentrant=False)

    check(program, hidden(), weight(), labels())


@pytest.mark.parametrize("around", [False, True])
def test_float16_products_under_autocast_to_bfloat16_are_not_joined(around):
    """Autocast's `torch.cat` raises an error at float16 there."""

    def program(h, w, t):
        with contextlib.nullcontext() if around else torch.autocast("cpu", torch.bfloat16):
            return sum(F.cross_entropy(F.linear(h[i], w), t[i]) for i in range(2))

    half = [tensor.detach().half().requires_grad_() for tensor in (hidden(), weight())]
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        check(program, *half, labels(), rewrites=2, calls=2, logits_in_memory=True)


def test_a_sum_of_float16_products_whose_loss_is_under_autocast_to_bfloat16():
    def program(h, w, t):
        logits = F.linear(h, w) + F.linear(h.sin(), w)  # <-
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(logits.flatten(0, 1), t.flatten())

    half = [tensor.detach().half().requires_grad_() for tensor in (hidden(), weight())]
    check_refused(program, *half, labels(), operation="cross_entropy", reason="concatenated under autocast")


def test_a_view_without_gradients_behind_a_write_in_place():
    """Such a view passes for a tensor that requires gradients, but hands none on."""

    def program(h, w):
        logits = F.linear(h, w)
        with torch.no_grad():
            logits = logits[None]
        return logits.log_softmax(-1).clone().mul_(2).sum(-1)

    ours = run_compiled(program, hidden(), weight())
    assert not ours.report.rewritten
    assert ours.gradients == run_eager(program, (hidden(), weight())).gradients == [None, None]
