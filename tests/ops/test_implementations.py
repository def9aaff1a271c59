"""All implementations against the float64 specification, on problems of every shape; Triton in its interpreter."""

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cce_inductor.ops import cpu, cuda, stored
from cce_inductor.ops.problem import RowGradients

# the interpreter meets nan and infinity with numpy's warnings
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

IMPLEMENTATIONS = {"aten": cpu, "triton": cuda, "stored": cuda}  # the last in float32, as on a GPU
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=IMPLEMENTATIONS, scope="module")
def implementation(request):
    if request.param != "aten" and not cases.INTERPRETED:
        pytest.skip(cases.NOT_INTERPRETED)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stored":
            patch.setattr(stored, "supported", stored.covers)
        yield IMPLEMENTATIONS[request.param]


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Blocks so small that a problem of a few rows takes many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BLOCK_ROWS", 8)
        patch.setattr(cuda, "COLUMN_MULTIPLE", 32)
        patch.setattr(cuda, "NARROWEST_SLICE", 32)
        yield


@st.composite
def problems(draw, picks=(None, None, 1, 4, 17)):
    dtype = draw(st.sampled_from(DTYPES))
    strides = draw(st.sampled_from(("contiguous", "transposed", "sliced", "expanded")))
    return cases.Case(
        rows=draw(st.integers(1, 37)),
        vocab=draw(st.integers(1, 80)),
        width=draw(st.integers(1, 40)),
        dtype=dtype,
        compute_dtype=draw(st.sampled_from((dtype, torch.bfloat16))),
        logit_map=draw(st.sampled_from(cases.MAPS)),
        bias=draw(st.booleans()),
        target=draw(st.booleans()),
        picks=draw(st.sampled_from(picks)),
        ignore_index=draw(st.sampled_from((-100, -1, 0, None))),
        total=draw(st.booleans()),
        class_weight=draw(st.booleans()),
        # of expanded classes, which are all the same, rounding decides which is the largest
        max=draw(st.booleans()) and strides != "expanded",
        entropy=draw(st.booleans()),
        strides=strides,
        seed=draw(st.integers(0, 9)),
    )


@cases.costly
@given(case=problems(), workspace_bytes=st.sampled_from((1, 1024, 4096, 1 << 20)))
def test_results_are_no_worse_than_eagers(implementation, case, workspace_bytes):
    results = cases.ours(case, implementation, workspace_bytes=workspace_bytes)
    cases.assert_no_worse_than_eager(case, results, interpreted=implementation is cuda)


@given(case=problems(picks=(None,)))
def test_results_of_ignored_rows_may_be_anything_where_nobody_reads_them(implementation, case):
    ignored = torch.zeros(case.rows, dtype=torch.bool)
    if case.target and case.ignore_index is not None:
        ignored = case.targets == case.ignore_index
    case.grads = [grad.masked_fill(ignored, 0.0) for grad in case.grads]
    results, references, eagers = (
        f(case) for f in (lambda c: cases.ours(c, implementation, skip_ignored=True), cases.exact, cases.eager)
    )
    assert not any(result.isnan().any() for result in results)
    for vectors in (results, references, eagers):
        for i, name in enumerate(case.names):
            if name in ("lse", "total", "maximum", "entropy"):
                vectors[i] = vectors[i].masked_fill(ignored, 0.0)
    cases.assert_no_worse(case.names, results, references, eagers, cases.uncertainty(case, implementation is cuda))


@pytest.mark.parametrize("logit_map", cases.MAPS)
def test_float64_agrees_with_the_specification_to_rounding(implementation, logit_map):
    case = cases.Case(19, 50, 12, torch.float64, logit_map=logit_map, max=True, entropy=True)
    cases.assert_no_worse_than_eager(case, cases.ours(case, implementation, workspace_bytes=2048))


@pytest.mark.parametrize("ignore_index", [0, 7, 33])
def test_a_class_may_be_the_ignored_one(implementation, ignore_index):
    """Its rows have neither a target's logit nor a gradient of one, in whichever block the class lies."""
    case = cases.Case(19, 50, 12, ignore_index=ignore_index)
    assert (case.targets == ignore_index).sum() > 3
    results = cases.ours(case, implementation, workspace_bytes=1024)
    cases.assert_no_worse_than_eager(case, results, interpreted=implementation is cuda)


@pytest.mark.parametrize("picks", [5, 64])
@pytest.mark.parametrize("where", ["anywhere", "one tile", "one class", "two classes in turn", "descending"])
def test_several_targets_of_a_row(implementation, picks, where):
    """Each counts for itself, however many of a row lie in a tile or are the same class, and in whatever order."""
    case = cases.Case(19, 150, 12, picks=picks, max=True, entropy=True)
    of_rows = torch.arange(19).unsqueeze(1)
    case.targets = {
        "anywhere": case.targets.clamp(0),
        "one tile": 96 + case.targets % 32,
        "one class": (41 * of_rows % 150).expand(19, picks),
        "two classes in turn": (of_rows + 90 * torch.arange(picks) % 180) % 150,
        "descending": 149 - of_rows - torch.arange(picks),
    }[where]
    results = cases.ours(case, implementation, workspace_bytes=8192)
    cases.assert_no_worse_than_eager(case, results, interpreted=implementation is cuda)


@cases.interpreted
@pytest.mark.parametrize("picks", [1, 5, 64])
def test_several_targets_of_a_row_go_through_the_kernels(picks, monkeypatch):
    case = cases.Case(19, 80, 12, picks=picks)
    for name in ("forward", "backward"):
        monkeypatch.setattr(cpu, name, None)
    cases.assert_no_worse_than_eager(case, cases.ours(case, cuda), interpreted=True)


@settings(max_examples=5)
@given(case=problems())
def test_gradients_are_the_same_bits_every_run(implementation, case):
    first, second = (cases.ours(case, implementation, workspace_bytes=1024) for _ in range(2))
    assert all(map(torch.equal, first, second))


@settings(max_examples=6)
@given(case=problems())
def test_the_size_of_the_workspace_changes_gradients_by_rounding_only(implementation, case):
    small, large = (cases.ours(case, implementation, workspace_bytes=size) for size in (256, 1 << 20))
    roundings = cases.uncertainty(case, implementation is cuda)
    for name, mine, theirs, rounding in zip(case.names, small, large, roundings, strict=False):
        if not name.startswith("grad"):
            continue
        assert (mine.double() - theirs.double()).norm() <= 2 * rounding.norm()


@pytest.mark.parametrize("needs_grad", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_only_the_gradients_asked_for_are_computed(implementation, needs_grad):
    case = cases.Case(9, 40, 6)
    problem = case.problem()
    results = implementation.forward(problem)
    everything, gradients = (
        implementation.backward(
            problem, results.lse, results.tiles, case.row_gradients(results), list(map(bool, needs))
        )
        for needs in ((1, 1, 1), needs_grad)
    )
    for gradient, expected, needed in zip(gradients, everything, needs_grad, strict=True):
        assert torch.equal(gradient, expected) if needed else gradient.numel() == 0


@pytest.mark.parametrize("wanted", [True, False])
def test_no_two_results_share_memory(implementation, wanted):
    """Operators may not return aliases."""
    case = cases.Case(9, 40, 6, max=wanted, entropy=wanted, total=wanted)
    problem = case.problem()
    results = implementation.forward(problem)
    gradients = RowGradients(*(torch.ones_like(results.lse) for _ in range(3)))
    none_needed = implementation.backward(problem, results.lse, results.tiles, gradients, [False] * 3)
    for tensors in (results, none_needed):
        assert len({tensor.untyped_storage()._cdata for tensor in tensors}) == len(tensors)


def test_a_bias_beyond_the_range_of_exp_has_a_gradient(implementation):
    case = cases.Case(19, 50, 12)  # fewer rows than a block has: there a logit is its bias, and the log-sum-exp zero
    case.bias_vector += 200
    cases.assert_no_worse_than_eager(case, cases.ours(case, implementation), interpreted=implementation is cuda)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_logit_of_a_certain_row_exceeds_its_log_sum_exp(implementation, dtype):
    case = cases.Case(64, 50, 40, dtype, bias=False, total=False)
    # every hidden state is far along its target's weight: the loss is zero but for rounding, and never below
    case.hidden = 16 * case.weight[case.targets.clamp(0)]
    lse, picked, *_ = implementation.forward(case.problem())
    assert (lse >= picked).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_hidden_states_and_biases_spread_as_in_eager_cross_entropy(implementation, value):
    for where in ("hidden", "bias_vector"):
        case = cases.Case(8, 40, 6, total=False, class_weight=False, ignore_index=None)
        getattr(case, where).view(-1)[3] = value
        case.grads[:3] = [torch.ones(8), -torch.ones(8), torch.zeros(8)]
        results = cases.ours(case, implementation)
        logits = torch.nn.functional.linear(*case.tensors[:3])
        loss = torch.nn.functional.cross_entropy(logits, case.targets, reduction="none")
        assert torch.equal((results[0] - results[1]).isfinite(), loss.isfinite())
        for mine, theirs in zip(results[3:], cases.eager(case)[3:], strict=True):
            assert not mine.isfinite()[~theirs.isfinite()].any()


def test_a_bias_of_minus_infinity_removes_a_class(implementation):
    case = cases.Case(8, 70, 6, max=True, entropy=True)
    case.bias_vector[33:] = -torch.inf  # whole blocks of the vocabulary
    case.targets = case.targets % 33
    case.options["want_total"] = case.total = False
    small = cases.Case(8, 70, 6, max=True, entropy=True)
    small.weight, small.bias_vector, small.class_weights = case.weight[:33], case.bias_vector[:33], None
    small.hidden, small.targets, small.grads, small.vocab = case.hidden, case.targets, case.grads, 33
    small.options["want_total"] = False
    results, expected = (cases.ours(c, implementation, workspace_bytes=1024) for c in (case, small))
    *results, grad_weight, grad_bias = results
    *expected, expected_grad_weight, _ = expected
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(grad_weight[:33], expected_grad_weight)
    assert grad_weight[33:].count_nonzero() == grad_bias[33:].count_nonzero() == 0


@pytest.mark.parametrize("picks", [None, 0, 3])
@pytest.mark.parametrize(("rows", "vocab", "width"), [(0, 5, 3), (3, 5, 0), (0, 5, 0), (3, 5, 3)])
def test_empty_problems(implementation, rows, vocab, width, picks):
    case = cases.Case(rows, vocab, width, picks=picks)
    cases.assert_no_worse_than_eager(case, cases.ours(case, implementation))


def test_the_first_of_equal_logits_is_the_largest(implementation):
    case = cases.Case(9, 70, 6, bias=False, target=False, total=False, max=True)
    case.hidden, case.weight = case.hidden.round(), case.weight.round()  # exact products, with many ties
    case.weight[40:] = case.weight[:30]
    results = implementation.forward(case.problem(workspace_bytes=1024))
    logits = case.hidden @ case.weight.T
    first = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(results.argmax, first)
    assert torch.equal(results.maximum, logits.amax(1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_maxima_and_entropies_of_logits_that_are_no_numbers(implementation, value):
    case = cases.Case(9, 70, 6, total=False, max=True, entropy=True)
    case.bias_vector[41] = value
    results = implementation.forward(case.problem(workspace_bytes=1024))
    logits = torch.nn.functional.linear(*case.tensors[:3])
    torch.testing.assert_close(results.maximum, logits.amax(1), equal_nan=True)
    assert results.entropy.isnan().all() if value != -torch.inf else results.entropy.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_entropies_of_certain_rows_are_as_exact_as_eagers(dtype):
    case = cases.Case(64, 50, 40, dtype, bias=False, total=False, entropy=True)
    case.hidden = 4 * case.weight[case.targets.clamp(0)]
    results = cases.ours(case, cpu)
    cases.assert_no_worse_than_eager(case, results)
    assert (results[case.names.index("entropy")] >= 0).all()
