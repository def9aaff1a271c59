"""Programs that random testing found to go wrong, shrunk."""

import torch
import torch.nn.functional as F
from helpers import V, bias, check, hidden, labels, weight


def test_hardtanh_with_its_default_bounds():
    def program(h, w, t):
        logits = F.hardtanh(F.linear(h, w))
        return F.cross_entropy(logits.flatten(0, 1), t.flatten())

    ours = check(program, hidden(), weight(), labels())
    assert "where" in ours.report.rewritten[0].logit_map


def test_a_weight_that_is_sliced_along_its_width_by_the_program():
    def program(h, w, t):
        logits = F.linear(h[..., :4], w[:, :4])
        return F.cross_entropy(logits.flatten(0, 1), t.flatten(), reduction="none")

    check(program, hidden(), weight(), labels())
