"""What went wrong in other implementations of this loss, and what is easy to get wrong, each as one test.

`both_ways` holds a program against eager PyTorch on the two public surfaces: rewritten by the compiler pass, and as a
call of `linear_cross_entropy`. Bugs that have tests elsewhere: wrong gradients for reduction="none" and a batch without
a valid token (test_api.py, graph/test_loss_forms.py), offsets above 2^31 (ops/test_gpu.py), a target's logit above the
log-sum-exp (ops/test_implementations.py), returned logits that are None or raise (graph/test_returned_logits.py),
refusals without a word (graph/test_refusals.py), -inf logits of masked classes (graph/test_masks.py).
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import OPTIONS, D, V, assert_close_to_eager, check
from torch import nn

from cce_inductor import linear_cross_entropy

gpu = pytest.mark.gpu


def both_ways(h, w, t, b=None, **options):
    """Ours is no further from float64 than eager, compiled and called; gives the loss."""

    def eager(h, w, b, t):
        return F.cross_entropy(F.linear(h, w, b).flatten(0, -2), t.flatten(), **options)

    def ours(h, w, b, t):
        return linear_cross_entropy(h.flatten(0, -2), w, t.flatten(), linear_bias=b, **options)

    check(eager, h, w, b, t, logits_in_memory=True)
    return assert_close_to_eager(ours, eager, (h, w, b, t))


def compiled(function, backend="cce", **how):
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, options=OPTIONS if backend == "cce" else None, **how)


def mean_loss(h, w, t):
    return F.cross_entropy(F.linear(h, w).flatten(0, -2), t.flatten())


class Head(nn.Module):
    """Tied: embedding and classifier are one parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return mean_loss(self.embed(ids).tanh(), self.head.weight, ids)
