"""Operands and calls for the tests that need a GPU."""

import torch

from cce_inductor.ops.library import vocab_reductions

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def plain(hidden, weight, target, workspace_mib=256, approximate_mass=0.0, skip_ignored=False):
    """lse and picked of a plain cross-entropy."""
    return vocab_reductions(
        hidden,
        weight,
        None,
        target,
        None,
        logit_map="z",
        want_total=False,
        ignore_index=-100,
        compute_dtype=hidden.dtype,
        workspace_mib=workspace_mib,
        approximate_mass=approximate_mass,
        skip_ignored=skip_ignored,
    )[:2]


def targets(vocab, rows, picks=None):
    return torch.randint(0, vocab, (rows,) if picks is None else (rows, picks), device="cuda")


def random(*shape, dtype=BF16, scale=1.0):
    return torch.randn(shape, device="cuda", dtype=dtype).mul_(scale)
