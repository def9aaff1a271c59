"""Cross-entropy from the reductions against torch's, from logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cce_inductor.ops import losses, reference


@given(
    rows=st.integers(1, 12),
    classes=st.integers(1, 30),
    reduction=st.sampled_from(("mean", "sum", "none")),
    ignore_index=st.sampled_from((-100, -1, 0, 5)),
    label_smoothing=st.sampled_from((0.0, 0.1, 1.0)),
    weighted=st.booleans(),
    seed=st.integers(0, 9),
)
def test_it_is_cross_entropy_with_its_gradient(rows, classes, reduction, ignore_index, label_smoothing, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < 0.3] = ignore_index
    if not 0 <= ignore_index < classes:
        target[target >= classes] = ignore_index
    weight = torch.rand(classes, dtype=torch.float64, generator=generator) if weighted else None
    how = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing, "weight": weight}

    expected = F.cross_entropy(logits, target, **how)
    identity = torch.eye(classes, dtype=torch.float64)
    lse, picked, total, *_ = reference.vocab_reductions(
        logits, identity, target=target, total_weight=weight, ignore_index=ignore_index
    )
    loss = losses.cross_entropy(lse, picked, total, target, classes, **how)

    torch.testing.assert_close(loss, expected, equal_nan=True)
    if not expected.isnan().any():
        gradients = (torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (loss, expected))
        torch.testing.assert_close(*gradients)


def test_the_mean_over_no_valid_row_is_nan():
    zeros, target = torch.zeros(3), torch.full((3,), -100)
    assert math.isnan(losses.cross_entropy(zeros, zeros, None, target, 5))


def test_label_smoothing_asks_for_the_sum_of_the_logits():
    with pytest.raises(AssertionError, match="sum of the logits"):
        losses.cross_entropy(torch.ones(3), torch.ones(3), None, torch.zeros(3).long(), 5, label_smoothing=0.1)
