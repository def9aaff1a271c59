"""How much memory a loss that keeps its logits takes where the user leaves that open."""

import pytest
import torch

from cce_inductor.compat import FakeTensorMode
from cce_inductor.ops.problem import MIB, Problem
from cce_inductor.ops.workspace import for_loss_with_gradients

SHAPES = {
    "gemma2": (8192, 256000, 2304),
    "llama3": (8192, 128256, 4096),
    "gpt2": (16384, 50257, 768),
    "few": (64, 50257, 768),
}


def problem(rows, vocab, width, workspace_mib, dtype=torch.bfloat16, device="cuda"):
    """Without memory for the operands."""
    with FakeTensorMode():
        hidden, weight = (torch.empty(size, width, dtype=dtype, device=device) for size in (rows, vocab))
        target = torch.empty(rows, dtype=torch.int64, device=device)
        return Problem.plain(hidden, weight, target, workspace_mib, 0.0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_than_the_default_leaves_the_peak_below_half_of_the_logits_and_gradients(shape, dtype):
    rows, vocab, width = shape
    least = problem(*shape, 256, dtype).workspace_bytes
    chosen = for_loss_with_gradients(problem(*shape, None, dtype)).workspace_bytes
    gradients, logits = (rows + vocab) * width * dtype.itemsize, rows * vocab * dtype.itemsize
    sums, records = 4 * rows * width * (dtype == torch.bfloat16), rows * vocab // (8 * dtype.itemsize)
    assert chosen >= least == 256 * MIB
    assert chosen == least or chosen + gradients + sums + records <= (logits + gradients) / 2
    # and not far below: where there is much to keep, much is kept
    assert chosen >= 0.45 * logits - gradients / 2 - sums - records


def test_a_given_size_is_kept_to():
    given = problem(*SHAPES["gemma2"], 64)
    assert for_loss_with_gradients(given) is given
    assert given.workspace_bytes == 64 * MIB


def test_a_cpu_takes_no_more():
    given = problem(*SHAPES["gemma2"], None, device="cpu")
    assert for_loss_with_gradients(given) is given
