"""What is computed in one pass over a block of logits on a CPU, compiled or as it is."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cce_inductor.logit_map import LogitMap
from cce_inductor.ops import cpu, cpu_fused, cpu_sparse, fallback
from cce_inductor.ops.library import scaled_loss
from cce_inductor.ops.problem import Problem

BF16 = torch.bfloat16
MAPS = {  # the text of a logit map, and the same in PyTorch
    "z": lambda z: z,
    "5.0*tanh(z/5.0)": lambda z: 5 * torch.tanh(z / 5),
    "2.0*z": lambda z: 2 * z,
}


@pytest.fixture(autouse=True)
def small_problems(monkeypatch):
    """Take part, in blocks of few rows."""
    monkeypatch.setattr(cpu_fused, "LEAST_FLOPS", 0)
    monkeypatch.setattr(cpu_fused, "BLOCK_ROWS", 64)
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr(fallback, "_warned", set())


def leaves_of(rows, vocab, width, bias, lead=0.0):
    generator = torch.Generator().manual_seed(rows * vocab + width)
    weight = torch.randn(vocab, width, generator=generator)
    target = torch.randint(vocab, (rows,), generator=generator)
    towards = weight[target] / weight[target].square().sum(1, keepdim=True)
    hidden = torch.randn(rows, width, generator=generator) * width**-0.5 + lead * towards
    target[::3] = -100
    leaves = hidden, weight, torch.randn(vocab, generator=generator) if bias else None
    return [None if leaf is None else leaf.to(BF16).requires_grad_() for leaf in leaves], target


def ours(leaves, target, logit_map="z"):
    """(loss, gradients)."""
    needs_grad = [leaf is not None for leaf in leaves]
    coefficient = torch.full(target.shape, 1 / max(1, int((target >= 0).sum())))
    loss, *grads, _ = scaled_loss(
        *leaves,
        target,
        coefficient,
        logit_map=logit_map,
        ignore_index=-100,
        compute_dtype=BF16,
        workspace_mib=1,
        needs_grad=needs_grad,
    )
    return [loss, *(grad for grad, needed in zip(grads, needs_grad, strict=True) if needed)]


def eagers(leaves, target, logit_map, dtype):
    copies = [None if leaf is None else leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    z = F.linear(*copies)
    x = MAPS[logit_map](z.float() if dtype == BF16 else z)
    loss = F.cross_entropy(x, target, reduction="sum") / max(1, int((target >= 0).sum()))
    return [loss.detach(), *torch.autograd.grad(loss, [copy for copy in copies if copy is not None])]


def assert_no_worse(leaves, target, logit_map):
    results = ours(leaves, target, logit_map), eagers(leaves, target, logit_map, BF16)
    exact = eagers(leaves, target, logit_map, torch.float64)
    for mine, theirs, right in zip(*results, exact, strict=True):
        # of dz, of the products that are summed, and of the result; of sums, in float32, of what sums to one
        rounding = 3 * 2.0**-9 * right.norm() + 4 * torch.finfo(torch.float32).eps
        assert (mine.double() - right).norm() <= (theirs.double() - right).norm() + rounding


def as_it_is(monkeypatch):
    """Nothing is compiled."""
    monkeypatch.setattr(cpu_fused, "_compiled", lambda function, *_: function)
    cpu_fused._functions.cache_clear()


@pytest.fixture
def uncompiled(monkeypatch):
    as_it_is(monkeypatch)
    yield
    cpu_fused._functions.cache_clear()


@settings(max_examples=25)
@given(
    rows=st.integers(1, 150),
    vocab=st.integers(1, 300),
    width=st.integers(1, 40),
    bias=st.booleans(),
    lead=st.sampled_from([0.0, 8.0, 20.0]),
    logit_map=st.sampled_from(list(MAPS)),
)
def test_gradients_are_no_worse_than_eagers(rows, vocab, width, bias, lead, logit_map):
    with pytest.MonkeyPatch.context() as patch:
        as_it_is(patch)
        assert_no_worse(*leaves_of(rows, vocab, width, bias, lead), logit_map)
    cpu_fused._functions.cache_clear()


def test_all_sizes_run_in_two_compiled_passes(monkeypatch):
    """With one function for each pass, and without those that are not compiled."""
    cpu_fused._functions.cache_clear()
    torch._dynamo.utils.counters.clear()
    for sizes in ((150, 300, 40), (64, 64, 16), (200, 1003, 33)):
        leaves, target = leaves_of(*sizes, bias=False)
        with monkeypatch.context() as patch:
            patch.setattr(fallback, "warn_once", None)
            patch.setattr(cpu_fused, "warn_once", None)
            assert_no_worse(leaves, target, "z")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_without_a_compiler_it_runs_as_it_is(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("cce_inductor.compat.compiled_alone", lambda graph: broken)
    cpu_fused._functions.cache_clear()
    with pytest.warns(RuntimeWarning, match="a compiled pass over logits can't run here"):
        assert_no_worse(*leaves_of(70, 100, 16, bias=True), "z")
    cpu_fused._functions.cache_clear()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_rows_that_are_not_numbers_show_as_in_eager(value, uncompiled):
    (hidden, weight, _), target = leaves_of(70, 100, 16, bias=False)
    with torch.no_grad():
        hidden[4, 3] = value
    for mine, theirs in zip(
        ours([hidden, weight, None], target), eagers([hidden, weight, None], target, "z", BF16), strict=True
    ):
        assert torch.equal(mine.isnan(), theirs.isnan())


def test_classes_that_a_bias_masks_out(uncompiled):
    leaves, target = leaves_of(70, 300, 16, bias=True)
    with torch.no_grad():
        leaves[2][100:280] = -torch.inf  # whole blocks of them
    target[target >= 100] = 3
    assert_no_worse(leaves, target, "z")


def test_the_same_bits_every_run(uncompiled):
    leaves, target = leaves_of(150, 300, 40, bias=True)
    first = ours(leaves, target)
    assert all(map(torch.equal, ours(leaves, target), first))


def test_which_problems_take_part(monkeypatch):
    def problem(dtype):
        hidden, weight = torch.zeros(2048, 256, dtype=dtype), torch.zeros(50257, 256, dtype=dtype)
        return Problem.plain(hidden, weight, torch.zeros(2048, dtype=torch.int64), None, 2**-5)

    assert cpu_fused.supported(problem(BF16))
    assert not cpu_fused.supported(problem(torch.float32))
    monkeypatch.setattr(cpu_fused, "LEAST_FLOPS", 10**14)
    assert not cpu_fused.supported(problem(BF16))
    assert cpu_sparse.may_skip(problem(BF16))
    monkeypatch.setattr("cce_inductor.compat.multiplies_in_hardware", lambda: True)
    assert not cpu_sparse.may_skip(problem(BF16))


def test_a_map_is_compiled_once():
    cpu_fused._functions.cache_clear()
    first = cpu_fused._functions(LogitMap.parse("z*2.0"), False)
    assert cpu_fused._functions(LogitMap.parse("2.0*z"), False) is first
