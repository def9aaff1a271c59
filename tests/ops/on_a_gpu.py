"""Operands and calls for the tests that need a GPU."""

import contextlib

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


@contextlib.contextmanager
def nothing_waits():
    """An error where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_captured(compute):
    """A CUDA graph of a computation gives the bits of its results."""
    expected = compute()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute()
    for result in captured:
        result.zero_()
    graph.replay()
    assert all(map(torch.equal, captured, expected))


def assert_same_bits(compute):
    """Every run gives the bits of the first, whatever it finds in memory."""
    first = compute()
    garbage = [torch.full((2**26,), torch.nan, device="cuda") for _ in range(4)]
    del garbage
    for _ in range(3):
        assert all(map(torch.equal, compute(), first))
