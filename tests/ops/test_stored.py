"""Float32 as on a GPU, through Triton's interpreter: `scaled_loss` of logits that a product has put in memory."""

import cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fallback import Broken
from test_kept_tiles import workspace_of
from test_scaled_loss import compute, eager, make, run
from triton.compiler.errors import CompilationError

from cce_inductor.compat import FakeTensorMode
from cce_inductor.kernels.config import INTERPRETER
from cce_inductor.ops import cuda, fallback, in_forward, stored
from cce_inductor.ops.library import scaled_loss
from cce_inductor.ops.problem import MIB, Problem, RowGradients

# the interpreter meets nan and infinity with numpy's warnings
pytestmark = [cases.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

TILE = INTERPRETER.block_v
GROUP_ROWS = in_forward.GPU_GROUP_ROWS


@pytest.fixture(autouse=True, scope="module")
def as_on_a_gpu():
    """The way of a GPU on a CPU, with groups of few rows, and slices of one tile and more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "supported", stored.covers)
        patch.setattr(in_forward, "SMALL", 0)
        patch.setattr(in_forward, "GPU_LOGITS_SHARE", 1)
        patch.setattr(in_forward, "GPU_GROUP_ROWS", 3)
        patch.setattr(cuda, "COLUMN_MULTIPLE", TILE)
        patch.setattr(cuda, "NARROWEST_SLICE", TILE)
        yield


@pytest.fixture
def products(monkeypatch):
    """(rows, columns) of each block of logits that is computed."""
    seen, logits_into = [], stored.logits_into

    def noting(out, hidden, weight):
        seen.append(tuple(out.shape))
        return logits_into(out, hidden, weight)

    monkeypatch.setattr(stored, "logits_into", noting)
    return seen


@cases.costly
@given(
    rows=st.integers(1, 37),
    vocab=st.integers(1, 150),
    width=st.integers(1, 48),
    logit_map=st.sampled_from((*cases.MAPS, "-0.5*z", "where(gt(z, 0.0), z, 0.1*z)")),
    bias=st.booleans(),
    ignore_index=st.sampled_from((-100, 0, None)),
    workspace=st.sampled_from((1, 3000, 10_000, MIB)),
    seed=st.integers(0, 9),
)
def test_it_is_no_worse_than_eager(rows, vocab, width, logit_map, bias, ignore_index, workspace, seed):
    how = {"logit_map": logit_map, "bias": bias, "ignore_index": ignore_index, "seed": seed}
    case = cases.Case(rows, vocab, width, total=False, class_weight=False, **how)
    leaves, target, coefficient, options = make(rows, vocab, width, **how)
    counted = coefficient if ignore_index is None else coefficient.masked_fill(target == ignore_index, 0.0)
    case.grads[:3] = [counted, -counted, torch.zeros_like(counted)]
    lse, picked, _, *gradients = cases.uncertainty(case)
    with workspace_of(workspace):
        ours = run(compute, leaves, target, coefficient, options)
    right, theirs = ([(v[0] - v[1]) @ counted.to(v[0]), *v[3:]] for v in (cases.exact(case), cases.eager(case)))
    allowed = [(lse + picked) @ counted.abs().double(), *gradients]
    names = ["loss", "grad_hidden", "grad_weight", *["grad_bias"] * bias]
    cases.assert_no_worse(names, ours, right, theirs, allowed)


ROOM = {  # of 20 rows, 13 of which count, and 333 classes: (width, bytes, blocks of logits that are computed)
    "slices": (24, 4000, [(13, 64)] * 5 + [(13, 13)]),  # kept in the weight's gradient
    "groups": (8, 14_000, [(7, 333), (6, 333)]),
    "all": (8, MIB, [(13, 333)]),
}
every_room = pytest.mark.parametrize(("width", "workspace"), [room[:2] for room in ROOM.values()], ids=ROOM)


@pytest.mark.parametrize(("width", "workspace", "blocks"), ROOM.values(), ids=ROOM)
def test_logits_that_have_room_are_computed_once(width, workspace, blocks, products):
    problem = make(20, 333, width)
    with workspace_of(workspace):
        run(compute, *problem)
    assert products == blocks


def test_logits_without_room_are_computed_twice(products):
    """Those of so many classes as the weight's gradient is narrower than there are rows."""
    problem = make(40, 320, 13, ignore_index=None)
    with workspace_of(40 * TILE * 4):
        run(compute, *problem)
    kept = 320 * 13 // (40 * TILE)  # slices
    assert len(products) == 2 * 320 // TILE - kept


SHAPES = {  # (rows, vocab, width), MiB, whether the weight has a gradient, and the rows of a group: 4 bytes a logit
    "Gemma 2": ((8192, 256000, 2304), 2048, True, 2048),
    "Gemma 2 with the room that the default gives": ((8192, 256000, 2304), 2776, True, 2816),
    "Gemma 2 in half of that": ((8192, 256000, 2304), 1024, True, 1024),
    "Gemma 2, where so many groups would take longer": ((8192, 256000, 2304), 256, True, 8192),
    "Phi 3.5": ((8192, 32064, 3072), 256, True, 2048),
    "more width than rows": ((2048, 128256, 4096), 512, True, 2048),
    "no memory of a gradient": ((2048, 128256, 4096), 512, False, 1024),
    "many rows": ((65536, 32064, 3072), 1024, True, 4096),
    "no rows": ((0, 32064, 256), 256, True, 0),
}


@pytest.mark.parametrize(("shape", "workspace", "needs_grad_weight", "group"), SHAPES.values(), ids=SHAPES)
def test_rows_are_taken_in_groups_where_that_pays(shape, workspace, needs_grad_weight, group):
    rows, vocab, width = shape
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(in_forward, "GPU_GROUP_ROWS", GROUP_ROWS)
        hidden, weight = (torch.empty(size, width, device="cuda") for size in (rows, vocab))
        head = Problem.plain(hidden, weight, torch.empty(rows, dtype=torch.int64, device="cuda"), workspace, 0.0)
        assert in_forward.gpu_group_rows(head, workspace * MIB, needs_grad_weight) == group


@pytest.mark.parametrize("needs_grad", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
@every_room
def test_only_the_gradients_asked_for_are_computed(needs_grad, width, workspace):
    leaves, target, coefficient, options = make(20, 333, width)
    with workspace_of(workspace):
        every = scaled_loss(*leaves, target, coefficient, **options)
        for leaf, needed in zip(leaves, needs_grad, strict=True):
            leaf.requires_grad_(bool(needed))
        results = scaled_loss(*leaves, target, coefficient, **{**options, "needs_grad": list(map(bool, needs_grad))})
    torch.testing.assert_close(results[0], every[0])
    for mine, theirs, needed in zip(results[1:4], every[1:4], needs_grad, strict=True):
        assert mine.numel() == (theirs.numel() if needed else 0)
        if needed:
            torch.testing.assert_close(mine, theirs)


@every_room
def test_nothing_is_read_that_was_not_written(width, workspace):
    """Memory is full of nan at first."""
    problem = make(20, 333, width, logit_map="9.0*tanh(z/9.0)")
    with workspace_of(workspace):
        clean = run(compute, *problem)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            results = run(compute, *problem)
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, results, clean))


@pytest.mark.parametrize("workspace", [30_000, 60_000, MIB], ids=["slices", "groups", "all"])
@pytest.mark.parametrize("lead", [16, 20, 24])
def test_losses_and_gradients_of_certain_rows_keep_their_digits(lead, workspace):
    """Next to a target with nearly all of the probability, and as far as rounding of the logits does not matter."""
    leaves, target, _, options = make(100, 300, 64, bias=False, ignore_index=None)
    hidden, weight = (leaf.data for leaf in leaves)
    hidden.copy_(0.02 * hidden + lead * weight[target] / weight[target].square().sum(1, keepdim=True))
    hidden.mul_(256).round_().div_(256)  # products of so few bits are exact
    weight.mul_(64).round_().div_(64)
    coefficient = torch.ones(100)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = run(eager, doubles, target, coefficient.double(), options)
    with workspace_of(workspace):
        ours = run(compute, leaves, target, coefficient, options)
    eagers = run(eager, leaves, target, coefficient, options)
    for mine, theirs, right in zip(ours, eagers, exact, strict=True):
        assert (mine - right).norm() <= (theirs - right).norm()


@pytest.mark.parametrize("lack", [2.0**-8, 2.0**-16, 2.0**-20])
def test_what_the_target_lacks_of_certainty_is_not_rounded_with_its_probability(lack):
    """The gradient of a single logit, exp(x - lse) - 1."""
    hidden, weight, target = torch.tensor([[0.5]]), torch.tensor([[1.0]]), torch.tensor([0])
    lse, one = hidden[0] + lack, torch.ones(1)
    grads = RowGradients(one, -one, torch.zeros(1))
    problem = Problem.plain(hidden, weight, target, 1, 0.0)
    gradient, *_ = stored.backward(problem, lse, grads, [True, False, False], 1, 8)
    torch.testing.assert_close(gradient.double(), torch.tensor([[-lack]]).double().expm1(), rtol=2**-21, atol=0.0)


def test_entropies_of_certain_rows_are_as_exact_as_eagers():
    case = cases.Case(64, 50, 40, bias=False, total=False, entropy=True)
    case.hidden = 4 * case.weight[case.targets.clamp(0)]
    results = cases.ours(case, cuda)
    cases.assert_no_worse_than_eager(case, results)
    assert (results[case.names.index("entropy")] >= 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["hidden", "bias"])
def test_what_is_not_finite_spreads_as_in_eager(value, where):
    leaves, *rest = make(20, 100, 24, ignore_index=None)
    leaves[0 if where == "hidden" else 2].data.view(-1)[3] = value
    with workspace_of(3000):
        ours = run(compute, leaves, *rest)
    for mine, theirs in zip(ours, run(eager, leaves, *rest), strict=True):
        assert not mine.isfinite()[~theirs.isfinite()].any()


@pytest.mark.parametrize("kernel", ["reduce_stored_kernel", "gradient_stored_kernel"])
def test_a_kernel_that_cannot_run_is_replaced(kernel, monkeypatch):
    """By ATen's way, of a loss with its gradients and of the operator that has them apart."""
    problem, case = make(20, 100, 24), cases.Case(9, 40, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "supported", lambda _: False)
        expected = run(compute, *problem)
    monkeypatch.setattr(fallback, "_cannot_compile", set())
    monkeypatch.setattr(fallback, "_warned", set())
    monkeypatch.setattr(stored, kernel, Broken(CompilationError("def kernel(): pass", None, "broken on purpose")))
    with pytest.warns(RuntimeWarning, match="the loss over stored logits can't run here"):
        results = run(compute, *problem)
    assert all(map(torch.equal, results, expected))
    with pytest.warns(RuntimeWarning, match="ward over stored logits can't run here"):
        results = cases.ours(case, cuda)
    cases.assert_no_worse_than_eager(case, results)
