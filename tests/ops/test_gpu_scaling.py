"""Gradients that a forward computed, multiplied in the backward that Inductor compiles, on a GPU."""

import pytest
import torch
from on_a_gpu import BF16, nothing_waits, random, targets
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import cross_entropy

from cce_inductor.ops import scaling

pytestmark = pytest.mark.gpu

ROWS, VOCAB, WIDTH = 1024, 32_000, 512
OPTIONS = {"min_flops": 0}  # a loss so small is rewritten only if asked for


def loss(hidden, weight, target):
    return cross_entropy(hidden @ weight.T, target)


@pytest.fixture
def operands():
    torch._dynamo.reset()
    torch.manual_seed(0)
    hidden, weight = random(ROWS, WIDTH).requires_grad_(), random(VOCAB, WIDTH, scale=0.1).requires_grad_()
    return hidden, weight, targets(VOCAB, ROWS)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_each_step_has_its_own_scale(operands, mode):
    """Also where steps are replayed from a CUDA graph, in whose memory the gradients of the step before lay."""
    *leaves, _ = operands
    compiled = torch.compile(loss, backend="cce", options={**OPTIONS, "mode": mode})

    def step(scale):
        torch.compiler.cudagraph_mark_step_begin()
        grads = torch.autograd.grad(compiled(*operands) * scale, leaves)
        return [grad.clone() for grad in grads]

    ones, code = run_and_get_code(step, 1.0)
    assert ("cce_inductor.scale_.default" in code[-1]) == (mode is None)
    for scale in (1.0, 3.0, 1.0, 0.5, 3.0):
        for result, one in zip(step(scale), ones, strict=True):
            assert torch.equal(result, (one.float() * scale).to(BF16))


def test_no_copy_of_a_gradient_is_made(operands):
    """The gradient that a parameter gets is the memory that the forward wrote it to."""
    hidden, weight, target = operands
    compiled = torch.compile(loss, backend="cce", options=OPTIONS)
    for _ in range(2):
        hidden.grad = weight.grad = None
        result = compiled(hidden, weight, target)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result.backward()
        torch.cuda.synchronize()
        more = torch.cuda.max_memory_allocated() - before
    assert more < weight.nbytes // 2


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float64])
def test_the_kernel_gives_the_same_bits(dtype, scale):
    grad = random(3, 70_001, dtype=dtype)
    number = torch.tensor(scale, device="cuda", dtype=torch.promote_types(dtype, torch.float32))
    expected = scaling.scaled(grad, number, False)
    with nothing_waits():
        scaling.scale_(grad, number)
    assert torch.equal(grad, expected)
