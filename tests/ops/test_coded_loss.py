"""`scaled_loss` with sparse gradients from codes of 8 bits a logit, as on a GPU, through Triton's interpreter."""

import contextlib

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import TILE_WIDTH, few_sampled_rows
from test_codes import HALF, roots_of
from test_fallback import OF_THE_MACHINE, Broken
from test_kept_tiles import in_triton
from test_scaled_loss import compute, run
from test_scaled_loss import eager as eager_loss
from test_scaled_loss import make as make_loss

from cce_inductor.ops import cuda, cuda_loss, fallback, sparse
from cce_inductor.ops.kept_tiles import KeptTiles
from cce_inductor.ops.problem import MIB, Problem

# the interpreter meets nan and infinity with numpy's warnings
pytestmark = [cases.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
__all__ = ["few_sampled_rows", "in_triton"]  # fixtures of this module too

BF16, FP32 = torch.bfloat16, torch.float32
OF_GRADIENTS = 2.0**-6  # of their norm: codes change gradients by less


@contextlib.contextmanager
def sparse_loss():
    """`scaled_loss` takes the way of a GPU with all its tiles recorded, however small the problem; counts how often."""
    taken, approximate = [], cuda_loss.approximate

    def noting(problem, *args):
        taken.append(problem)
        return approximate(problem, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "LEAST_FLOPS", 0)
        patch.setattr(cuda, "recorded_tiles", lambda _, vocab, *__: -(-vocab // TILE_WIDTH))
        patch.setattr(cuda_loss, "approximate", noting)
        yield taken


@settings(max_examples=8)
@given(
    rows=st.integers(1, 20),
    vocab=st.integers(1, 100),
    width=st.integers(1, 24),
    dtypes=st.sampled_from(((BF16, BF16), (FP32, BF16), (torch.float16, torch.float16), (FP32, torch.float16))),
    logit_map=st.sampled_from(["z", "2.0*z", "30.0*tanh(z/30.0)"]),
    ignore_index=st.sampled_from((-100, 0, None)),
    scale=st.sampled_from([1.0, 0.25]),
    seed=st.integers(0, 9),
)
def test_a_loss_with_its_gradients_is_close_to_eager(rows, vocab, width, dtypes, logit_map, ignore_index, scale, seed):
    dtype, compute_dtype = dtypes
    how = {"compute_dtype": compute_dtype, "logit_map": logit_map, "ignore_index": ignore_index}
    leaves, *rest = make_loss(rows, vocab, width, dtype, bias=False, seed=seed, **how)
    rest[2]["approximate_mass"] = 2.0**-5
    with sparse_loss() as taken:
        ours = run(compute, leaves, *rest, scale=scale)
    assert len(taken) == 1
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    right = run(eager_loss, doubles, rest[0], rest[1].double(), rest[2], scale=scale)
    theirs = run(eager_loss, [leaf.detach().to(compute_dtype).requires_grad_() for leaf in leaves], *rest, scale=scale)
    assert [mine.dtype for mine in ours[1:]] == [dtype, dtype]
    approximated = 2.0**-5 + OF_GRADIENTS
    for mine, other, exact in zip(ours, theirs, right, strict=True):
        error, eager_error = (mine.double() - exact).norm(), (other.double() - exact).norm()
        assert error <= eager_error + approximated * exact.norm() + 1e-6


def untrained(rows=48, vocab=1500, width=24, dtype=BF16):
    """A head as it is initialized."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).mul_(0.02).to(dtype).requires_grad_()
    target = torch.randint(vocab, (rows,), generator=generator)
    options = make_loss(1, 2, 1, dtype, logit_map="z", bias=False)[3] | {"approximate_mass": 2.0**-5}
    return [hidden, weight], target, torch.full((rows,), 1 / rows), options


def test_of_an_untrained_head_gradients_are_no_worse_than_eager_but_for_codes_and_no_row_is_lost():
    """Codes round what comes from probabilities, here the smaller part. Rows without a target have nothing else."""
    leaves, *rest = untrained(dtype=FP32)
    with sparse_loss() as taken:
        ours = run(compute, leaves, *rest)
    assert len(taken) == 1
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    right = run(eager_loss, doubles, rest[0], rest[1].double(), rest[2])
    theirs = run(eager_loss, leaves, *rest)
    p = torch.softmax(doubles[0] @ doubles[1].T, 1) / len(doubles[0])
    # the root mean square of an error that is even within a step of the cube root, of the smallest p of a tile
    code = 3 * (2 * HALF) / 12**0.5 / roots_of(doubles[0] @ doubles[1].T).min()
    of_codes = [0.0, code * (p @ doubles[1]).norm(), code * (p.T @ doubles[0]).norm()]
    for mine, other, exact, most in zip(ours, theirs, right, of_codes, strict=True):
        assert (mine - exact).norm() <= (other - exact).norm() + most + 4 * torch.finfo(FP32).eps * exact.norm()
    of_rows = (ours[2] - right[2]).norm(dim=1) / right[2].norm(dim=1)
    assert of_rows.median() <= code


@pytest.mark.parametrize("lead", [0.0, 30.0], ids=["all rows are dense", "most is skipped"])
def test_in_float16_sums_over_rows_are_kept_in_range(lead):
    """Hidden states with an outlier, so that a sum of all rows' may be larger than float16's largest number."""
    (hidden, weight), target, coefficient, options = untrained(vocab=300, dtype=torch.float16)
    with torch.no_grad():
        hidden += lead * weight[target] / weight[target].square().sum(1, keepdim=True)
        hidden[:, 0], weight[:, 0] = 2000.0, 0.0
    with sparse_loss() as taken:
        _, *ours = run(compute, [hidden, weight], target, coefficient, options, scale=256.0)
    assert taken[0].weight_scale < 1
    doubles = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    _, *right = run(eager_loss, doubles, target, coefficient.double(), options, scale=256.0)
    for mine, exact in zip(ours, right, strict=True):
        assert (mine.double() - exact).norm() <= (2.0**-5 + OF_GRADIENTS) * exact.norm()


def test_the_bits_are_the_same_every_time():
    problem = untrained(rows=20, vocab=200)
    with sparse_loss():
        first, second = run(compute, *problem), run(compute, *problem)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("needs_grad", [[True, False, False], [False, True, False]])
def test_only_what_is_needed_is_computed(needs_grad):
    leaves, target, coefficient, _ = untrained(rows=20, vocab=200)
    problem = Problem.of(
        *leaves, None, target, None, want_total=False, workspace_mib=1, skip_ignored=True, logit_map="z",
        ignore_index=None, compute_dtype=BF16, approximate_mass=2.0**-5,
    )  # fmt: skip
    with sparse_loss(), torch.no_grad():
        some = cuda_loss.approximate(problem, coefficient, needs_grad)
        both = cuda_loss.approximate(problem, coefficient, [True, True, False])
    assert torch.equal(some[0], both[0])
    for gradient, full, needed in zip(some[1:], both[1:], needs_grad, strict=True):
        if needed:
            # fewer tiles are kept without a weight's gradient
            assert (gradient - full).norm() <= OF_GRADIENTS * full.norm()
        else:
            assert gradient.numel() == 0


def test_no_logit_is_computed_twice_where_all_have_room():
    problem = untrained(rows=20, vocab=200)
    with sparse_loss(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "block_gradient_kernel", Broken(AssertionError("a logit is computed again")))
        run(compute, *problem)


@pytest.mark.parametrize("logit_map", ["3.0*tanh(z/3.0)", "0.1*z*z"])
def test_of_a_map_whose_slopes_codes_do_not_tell_nothing_is_kept(logit_map):
    leaves, target, coefficient, options = untrained(rows=20, vocab=200)
    options["logit_map"] = logit_map
    seen = []
    with sparse_loss(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "coded_gradient_kernel", Broken(AssertionError("codes do not tell slopes")))
        patch.setattr(KeptTiles, "coded", lambda *_: seen.append(1))
        run(compute, leaves, target, coefficient, options)
    assert not seen


@pytest.mark.parametrize("kernel", ["coded_gradient_kernel", "top_weight_kernel"])
def test_a_kernel_that_cannot_run_gives_way_to_exact_gradients(kernel, monkeypatch):
    problem = untrained(rows=40, vocab=300)
    monkeypatch.setattr(fallback, "_cannot_compile", set())
    monkeypatch.setattr(fallback, "_warned", set())
    expected = run(compute, *problem[:3], problem[3] | {"approximate_mass": 0.0})
    monkeypatch.setattr(sparse, kernel, Broken(OF_THE_MACHINE["compilation"]))
    with sparse_loss(), pytest.warns(RuntimeWarning, match="the sparse loss with its gradients can't run here"):
        results = run(compute, *problem)
    assert all(map(torch.equal, results, expected))


def test_out_of_memory_it_takes_less_and_stays_sparse(monkeypatch):
    problem = untrained(rows=20, vocab=200)
    problem[3]["workspace_mib"] = 64
    monkeypatch.setattr(fallback, "_warned", set())
    approximate = cuda_loss.approximate

    def too_large(problem, *args):
        if problem.workspace_bytes > 8 * MIB:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return approximate(problem, *args)

    monkeypatch.setattr(cuda_loss, "approximate", too_large)
    with sparse_loss() as taken, pytest.warns(RuntimeWarning, match="the sparse loss with its gradients can't run"):
        run(compute, *problem)
    assert [problem.workspace_bytes for problem in taken] == [64 * MIB, 8 * MIB]
