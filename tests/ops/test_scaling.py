"""Gradients that a forward computed, times the gradient of the loss: in place where nobody else reads them."""

import pytest
import torch
from cases import interpreted
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import cross_entropy

import cce_inductor
from cce_inductor.kernels.scaling import scaling_kernel
from cce_inductor.ops import scaling

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ROUNDED = DTYPES[1:]  # to the nearest in Triton's interpreter too


def numbers(count, dtype):
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)


@given(
    count=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 0.0, -3.0, 0.1, 65536.0, float("inf")]),
    wide=st.booleans(),
)
def test_in_place_it_is_the_same_product(count, dtype, scale, wide):
    scale = torch.tensor(scale, dtype=torch.float64 if wide else torch.float32)
    grad = numbers(count, dtype)
    expected = (grad.to(scale.dtype) * scale).to(dtype)
    assert torch.equal(scaling.scaled(grad, scale, False).nan_to_num(), expected.nan_to_num())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "CPU_NUMBERS", 32)
        scaling.scale_(grad, scale)
    assert torch.equal(grad.nan_to_num(), expected.nan_to_num())


@interpreted
@given(count=st.integers(0, 70), dtype=st.sampled_from(ROUNDED), scale=st.sampled_from([1.0, -3.0, 0.1]))
def test_the_kernel_gives_the_same_bits(count, dtype, scale):
    scale = torch.tensor(scale, dtype=torch.float32)
    grad = numbers(count, dtype)
    expected = scaling.scaled(grad, scale, False)
    scaling_kernel[(2,)](grad, scale, count, BLOCK=16, NUM_PROGRAMS=2)
    assert torch.equal(grad, expected)


@interpreted
def test_of_a_scale_of_one_the_kernel_looks_at_no_gradient():
    scaling_kernel[(2,)](None, torch.tensor(1.0), 70, BLOCK=16, NUM_PROGRAMS=2)  # there is none


@pytest.fixture(scope="module")
def operands():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 64, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(20000, 64, generator=generator) / 8).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(20000, (512,), generator=generator)


def loss(hidden, weight, target):
    return cross_entropy(hidden @ weight.T, target)


def test_what_a_forward_hands_over_is_scaled_in_place(operands):
    """And nothing is multiplied, so that the backward of a loss alone compiles nothing for it."""
    *leaves, _ = operands
    with cce_inductor.capture_reports() as reports:
        compiled = torch.compile(loss, backend="cce")

        def gradients(scale):
            return torch.autograd.grad(compiled(*operands) * scale, leaves)

        ones, code = run_and_get_code(gradients, 1.0)
    assert sum(len(report.rewritten) for report in reports) == 1
    assert code[-1].count("cce_inductor.scale_.default") == 2
    for one, three in zip(ones, gradients(3.0), strict=True):
        assert torch.equal(three, (one.float() * 3).bfloat16())


def test_what_is_kept_for_another_backward_is_not_written_to(operands):
    """Although the other has just been compiled, and lies in a cache."""
    *leaves, _ = operands
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        result, code = run_and_get_code(lambda: torch.compile(loss, backend="cce")(*operands))
        scale = torch.tensor(3.0, dtype=result.dtype)
        first, second = (torch.autograd.grad(result, leaves, scale, retain_graph=True) for _ in range(2))
    assert not any("scale_.default" in text for text in code)
    assert all(map(torch.equal, first, second))


def test_an_argument_of_a_program_is_not_written_to():
    scaling.compile_in_place()
    grad = numbers(64, torch.float32)
    before = grad.clone()
    result = torch.compile(lambda grad, scale: scaling.scaled(grad, scale, True))(grad, torch.tensor(3.0))
    assert torch.equal(grad, before)
    assert torch.equal(result, 3 * before)
