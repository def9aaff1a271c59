"""`scaled_loss`: a loss with its gradients, against float64 and eager, however rows are grouped and logits kept."""

import cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cce_inductor.logit_map import LogitMap
from cce_inductor.ops import cpu, in_forward
from cce_inductor.ops.blocks import Gradients
from cce_inductor.ops.kept import KeptLogits
from cce_inductor.ops.library import scaled_loss

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def small_groups():
    """Groups and blocks so small that a problem of a few rows takes many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BLOCK_ROWS", 8)
        patch.setattr(cpu, "BLOCK_BYTES", 1024)
        patch.setattr(in_forward, "FEWEST_ROWS", 2)
        yield


def make(rows, vocab, width, dtype=torch.float32, **how):
    """(leaves, target, coefficient, options) of a problem."""
    case = cases.Case(rows, vocab, width, dtype, total=False, class_weight=False, **how)
    leaves = [t.detach().clone().requires_grad_() for t in case.tensors[:3] if t is not None]
    options = {name: value for name, value in case.options.items() if not name.startswith("want")}
    options["needs_grad"] = [True, True, case.bias]
    return leaves, case.targets, case.grads[0].detach(), options


def compute(leaves, target, coefficient, options):
    bias = leaves[2] if len(leaves) > 2 else None
    return scaled_loss(*leaves[:2], bias, target, coefficient, **options)[0]


def eager(leaves, target, coefficient, options):
    return loss_of(F.linear(*leaves), target, coefficient, options)


def loss_of(products, target, coefficient, options):
    logits = LogitMap.parse(options["logit_map"])(products).to(coefficient.dtype)
    how = {} if options["ignore_index"] is None else {"ignore_index": options["ignore_index"]}
    return (F.cross_entropy(logits, target, reduction="none", **how) * coefficient).sum()


def run(function, leaves, *args, scale=1.0):
    loss = function(leaves, *args)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, scale))]


@given(
    rows=st.integers(1, 37),
    vocab=st.integers(1, 80),
    width=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    logit_map=st.sampled_from(cases.MAPS),
    bias=st.booleans(),
    ignore_index=st.sampled_from((-100, 0, None)),
    seed=st.integers(0, 9),
)
def test_it_is_no_worse_than_eager(rows, vocab, width, dtype, logit_map, bias, ignore_index, seed):
    leaves, *rest = make(
        rows, vocab, width, dtype, logit_map=logit_map, bias=bias, ignore_index=ignore_index, seed=seed
    )
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = run(eager, doubles, rest[0], rest[1].double(), rest[2])
    case = cases.Case(rows, vocab, width, dtype, logit_map=logit_map, bias=bias, ignore_index=ignore_index, seed=seed)
    case.grads = [rest[1], -rest[1], torch.zeros_like(rest[1])]
    lse, picked, _, *gradients = cases.uncertainty(case, False)
    # one number may be further off than another by as much as each product, rounded on its own, makes of it
    products = F.linear(*doubles).detach().requires_grad_()
    (dz,) = torch.autograd.grad(loss_of(products, rest[0], rest[1].double(), rest[2]), products)
    by_products = torch.finfo(dtype).eps * (dz * products).norm()
    allowed = [((lse + picked) * rest[1].abs()).sum() + by_products, *gradients]
    for mine, theirs, right, rounding in zip(run(compute, leaves, *rest), run(eager, leaves, *rest), exact, allowed,
                                             strict=False):  # fmt: skip
        error, eagers = ((value.double() - right).norm() for value in (mine, theirs))
        assert error <= eagers + rounding.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 40, 6), (20, 53, 60)])
def test_it_passes_opcheck(dtype, bias, shape):
    leaves, target, coefficient, options = make(*shape, dtype, bias=bias)
    args = *leaves[:2], leaves[2] if bias else None, target, coefficient
    torch.library.opcheck(scaled_loss, args, options)


def test_the_gradient_of_the_loss_multiplies():
    problem = make(20, 53, 8)
    for once, thrice in zip(run(compute, *problem)[1:], run(compute, *problem, scale=3.0)[1:], strict=True):
        torch.testing.assert_close(thrice, 3 * once)


def test_a_second_backward_gives_the_same_again():
    leaves, *rest = make(20, 53, 8)
    loss = compute(leaves, *rest)
    first, second = (torch.autograd.grad(2 * loss, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_second_derivative_is_refused_in_words():
    leaves, *rest = make(7, 40, 6)
    (gradient,) = torch.autograd.grad(compute(leaves, *rest), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


def test_a_number_is_not_rounded_to_the_dtype_of_the_gradients():
    problem = make(20, 53, 8, torch.bfloat16)
    scale = 1 / 3
    for once, third in zip(run(compute, *problem)[1:], run(compute, *problem, scale=scale)[1:], strict=True):
        assert torch.equal(third, (once.double() * torch.tensor(scale).double()).to(once.dtype))


@pytest.mark.parametrize("needs_grad", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_only_the_gradients_asked_for_are_computed(needs_grad):
    leaves, target, coefficient, options = make(20, 53, 8)
    every = scaled_loss(*leaves, target, coefficient, **options)
    for leaf, needed in zip(leaves, needs_grad, strict=True):
        leaf.requires_grad_(bool(needed))
    results = scaled_loss(*leaves, target, coefficient, **{**options, "needs_grad": list(map(bool, needs_grad))})
    torch.testing.assert_close(results[0], every[0])
    for mine, theirs, needed in zip(results[1:4], every[1:4], needs_grad, strict=True):
        if needed:
            torch.testing.assert_close(mine, theirs)
        assert mine.numel() == (theirs.numel() if needed else 0)


def test_ignored_rows_add_nothing_whatever_is_in_them():
    leaves, target, coefficient, options = make(20, 53, 8)
    target[5] = options["ignore_index"]
    coefficient[5] = torch.nan
    leaves[0].data[5] = torch.inf
    assert compute(leaves, target, coefficient, options).isfinite()


@given(
    rows=st.integers(1, 20),
    vocab=st.integers(1, 60),
    width=st.integers(1, 40),
    columns=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    workspace=st.sampled_from((0, 500, 4000, 1 << 20)),
)
def test_no_gradient_is_written_over_kept_logits_that_will_be_read(rows, vocab, width, columns, dtype, workspace):
    case = cases.Case(rows, vocab, width, dtype)
    problem = case.problem()
    gradients = Gradients.allocate(problem, [False, True, False])
    kept = KeptLogits.within(problem, rows, columns, workspace, gradients.weight)
    everything = slice(0, rows)
    slices = [slice(start, min(start + columns, vocab)) for start in range(0, vocab, columns)]
    for number, part in enumerate(slices):
        block = kept.block(everything, part)
        if block is not None:
            block.fill_(number)
    for number, part in enumerate(slices):
        block = kept.block(everything, part)
        assert block is None or (block == number).all()
        gradients.weight[part] = -1
    assert (gradients.weight == -1).all()
