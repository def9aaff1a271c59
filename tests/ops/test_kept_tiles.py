"""`scaled_loss` through Triton's interpreter, where logits stay in free memory: against float64 and eager."""

import contextlib

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fallback import Broken
from test_scaled_loss import compute, eager, make, run
from triton.compiler.errors import CompilationError

from cce_inductor.kernels.config import INTERPRETER, tile_config
from cce_inductor.ops import cuda, cuda_loss, fallback, problem
from cce_inductor.ops.kept_tiles import KeptTiles
from cce_inductor.ops.launch import Launch
from cce_inductor.ops.library import scaled_loss
from cce_inductor.ops.problem import MIB, Problem, spans

# the interpreter meets nan and infinity with numpy's warnings
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BF16, FP32 = torch.bfloat16, torch.float32
TILE = INTERPRETER.block_v
KINKED = "where(gt(z, 0.0), z, 0.1*z)"
WORKSPACES = (1, 3000, 10_000, MIB)


@pytest.fixture(autouse=True, scope="module")
def in_triton():
    """The way of a GPU on a CPU, in slices of one tile and more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_loss, "supported", cuda.supported)
        patch.setattr(cuda, "COLUMN_MULTIPLE", TILE)
        patch.setattr(cuda, "NARROWEST_SLICE", TILE)
        yield


@contextlib.contextmanager
def workspace_of(size):
    """A workspace of so many bytes, for calls that ask for a MiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problem, "MIB", size)
        yield


@contextlib.contextmanager
def launches():
    """(kernel's name, columns, whether their logits are kept) of what is launched meanwhile."""
    seen, launch = [], Launch.__call__

    def noting(self, kernel, rows, columns, *args, place=None, **how):
        seen.append((kernel.fn.__name__, columns, place is not None))
        launch(self, kernel, rows, columns, *args, place=place, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", noting)
        yield seen


def errors(leaves, *rest):
    """(ours, eager's, the size of the right values) of loss and gradients, in the norm, against float64."""
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = run(eager, doubles, rest[0], rest[1].double(), rest[2])
    of_each = zip(run(compute, leaves, *rest), run(eager, leaves, *rest), exact, strict=True)
    each = [((mine - right).norm(), (theirs - right).norm(), right.norm()) for mine, theirs, right in of_each]
    return zip(*each, strict=True)


# ------------------------------------------------------------------------------------------------------------ layout


def written_and_read(rows, vocab, width, columns, block_rows, dtype):
    """The share of classes that are kept. Each number that is kept is looked at before its slice is written."""
    case = cases.Case(rows, vocab, width, BF16)
    workspace, grad_weight = torch.empty(block_rows, columns, dtype=BF16), torch.empty(vocab, width, dtype=dtype)
    kept = KeptTiles.within(case.problem(), TILE, workspace, grad_weight)
    everything = slice(0, rows)

    def tiles(rows, columns):
        """(tile, its logits [rows, columns]) of those that are kept."""
        for part, place in kept.parts(rows, columns):
            if place is None:
                continue
            assert part == place.columns
            for number, start in enumerate(range(part.start, part.stop, TILE)):
                first = number * place.tile_stride
                shape = rows.stop - rows.start, TILE
                yield start // TILE, place.logits[first:].as_strided(shape, (place.row_stride, 1)), place.base[number]

    for tile, logits, base in tiles(everything, slice(0, vocab)):
        logits.fill_(tile)
        base.fill_(tile)
    count = 0
    for part in spans(vocab, columns):
        for block in spans(rows, block_rows):
            for tile, logits, base in tiles(block, part):
                assert (logits == tile).all()
                assert (base == tile).all()
                assert part.start <= tile * TILE < part.stop
                count += block.start == 0
            workspace.fill_(-1)
        grad_weight[part] = -1
    assert (grad_weight == -1).all()
    return count * TILE / vocab


@given(
    rows=st.integers(1, 40),
    vocab=st.integers(1, 300),
    width=st.integers(1, 60),
    tiles=st.integers(1, 5),
    blocks=st.integers(1, 3),
    dtype=st.sampled_from((BF16, FP32, torch.float64)),
)
def test_no_gradient_is_written_over_logits_that_will_be_read(rows, vocab, width, tiles, blocks, dtype):
    columns = min(tiles * TILE, -(-vocab // 8) * 8)
    written_and_read(rows, vocab, width, columns, -(-rows // blocks), dtype)


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "share"),
    [(64, 16, BF16, 0.1 + 0.9 / 4), (64, 16, FP32, 0.1 + 0.9 / 2), (64, 64, BF16, 1), (16, 64, BF16, 1)],
)
def test_as_much_is_kept_as_there_is_room_for(rows, width, dtype, share):
    vocab = 400 * TILE
    assert share - 2 / 400 < written_and_read(rows, vocab, width, vocab // 10, rows, dtype) <= share


HEADS = {  # of well-known models, at 8192 tokens and 256 MiB: (vocabulary, width, share that is kept)
    "gemma2": (256000, 2304, 0.327),
    "llama3": (128256, 4096, 0.563),
    "qwen": (152064, 3584, 0.498),
    "phi": (32064, 3072, 0.69),
}


@pytest.mark.parametrize(("vocab", "width", "share"), HEADS.values(), ids=HEADS)
def test_the_share_of_large_heads(vocab, width, share, monkeypatch):
    monkeypatch.setattr(cuda, "COLUMN_MULTIPLE", 256)
    shapes = (8192, width), (vocab, width), (8192, 16384)
    hidden, weight, workspace = (torch.empty(*shape, dtype=BF16, device="meta") for shape in shapes)
    head = Problem.plain(hidden, weight, torch.empty(8192, dtype=torch.int64, device="meta"), 256, 0.0)
    assert cuda.block_shape(head) == workspace.shape
    kept = KeptTiles.within(head, tile_config((9, 0), backward=False).block_v, workspace, weight)
    parts = kept.parts(slice(0, 8192), slice(0, vocab))
    assert max(part.stop for part, place in parts if place) / vocab == pytest.approx(share, abs=0.005)


# ----------------------------------------------------------------------------------------------------------- results


@cases.interpreted
@settings(max_examples=12)
@given(
    rows=st.integers(1, 37),
    vocab=st.integers(1, 150),
    width=st.integers(1, 48),
    dtypes=st.sampled_from(((BF16, BF16), (FP32, BF16), (torch.float16, torch.float16), (FP32, torch.float16))),
    logit_map=st.sampled_from((*cases.MAPS, "-0.5*z", "0.1*z*z", KINKED)),
    bias=st.booleans(),
    ignore_index=st.sampled_from((-100, 0, None)),
    workspace=st.sampled_from(WORKSPACES),
    seed=st.integers(0, 9),
)
def test_it_is_no_worse_than_eager(rows, vocab, width, dtypes, logit_map, bias, ignore_index, workspace, seed):
    dtype, compute_dtype = dtypes
    how = {"logit_map": logit_map, "bias": bias, "ignore_index": ignore_index, "seed": seed}
    case = cases.Case(rows, vocab, width, dtype, compute_dtype, total=False, class_weight=False, **how)
    leaves, target, coefficient, options = make(rows, vocab, width, dtype, compute_dtype=compute_dtype, **how)
    counted = coefficient if ignore_index is None else coefficient.masked_fill(target == ignore_index, 0.0)
    case.grads[:3] = [counted, -counted, torch.zeros_like(counted)]
    names = ["loss", "grad_hidden", "grad_weight", *["grad_bias"] * bias]
    lse, picked, _, *gradients = cases.uncertainty(case, interpreted=True)
    with workspace_of(workspace):
        ours = run(compute, leaves, target, coefficient, options)
    right, theirs = ([(v[0] - v[1]) @ counted.to(v[0]), *v[3:]] for v in (cases.exact(case), cases.eager(case)))
    allowed = [(lse + picked) @ counted.abs().double(), *gradients]
    cases.assert_no_worse(names, ours, right, theirs, allowed)


ROWS = {"uniform": 0.0, "soft": 6.0, "certain": 18.0}  # how much larger than others the logit of a target is


@cases.interpreted
@pytest.mark.parametrize("logit_map", ["z", "30.0*tanh(z/30.0)", "-1.0*z"])
@pytest.mark.parametrize("lead", ROWS.values(), ids=ROWS)
def test_rows_are_no_less_exact_the_more_certain_they_are(lead, logit_map):
    leaves, target, _, options = make(48, 300, 64, BF16, logit_map=logit_map, bias=False, ignore_index=None)
    hidden, weight = (leaf.data for leaf in leaves)
    direction = weight[target].float() / weight[target].float().square().sum(1, keepdim=True)
    hidden.copy_(0.1 * hidden + (-lead if logit_map.startswith("-") else lead) * direction)
    coefficient = torch.ones(48)
    with workspace_of(10_000), launches() as seen:
        ours, eagers, right = errors(leaves, target, coefficient, options)
    assert any(kept for _, _, kept in seen)
    if lead == ROWS["certain"]:
        assert right[0] < 48 * 1e-3, "the mean of -log p"
    for mine, theirs, exact in zip(ours[1:], eagers[1:], right[1:], strict=True):
        assert mine <= theirs + 2**-8 * exact  # the interpreter cuts off dz where it rounds to bfloat16


@cases.interpreted
@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_stored_is_what_is_read(workspace, bias):
    leaves, *rest = make(20, 333, 24, BF16, bias=bias)
    with workspace_of(workspace), launches() as seen:
        compute(leaves, *rest)
    kept = {name: set() for name in ("forward_kernel", "gradient_kernel")}
    others = {name: set() for name in kept}
    for name, columns, is_kept in seen:
        (kept if is_kept else others)[name].update(range(columns.start, columns.stop))
    for name in kept:
        assert kept[name].isdisjoint(others[name])
        assert kept[name] | others[name] == set(range(333))
    assert kept["forward_kernel"] == kept["gradient_kernel"]
    assert len(kept["forward_kernel"]) >= 333 - TILE  # wider than there are rows


@cases.interpreted
@pytest.mark.parametrize("ignored", [slice(0, 0), slice(0, 30), slice(5, 6), slice(25, 50), slice(0, 50)], ids=str)
@pytest.mark.parametrize("workspace", [3000, MIB])
def test_nothing_is_read_that_was_not_written(ignored, workspace):
    """Memory is full of nan at first, and so are the coefficients of rows that do not count."""
    leaves, target, coefficient, options = make(50, 300, 24, BF16, logit_map="9.0*tanh(z/9.0)")
    target[target == options["ignore_index"]] = 7
    target[ignored] = options["ignore_index"]
    with workspace_of(workspace):
        clean = run(compute, leaves, target, coefficient, options)
        coefficient[ignored] = torch.nan
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            results = run(compute, leaves, target, coefficient, options)
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, results, clean))
    assert results[1][ignored].count_nonzero() == 0


@cases.interpreted
def test_results_are_the_same_bits_every_run():
    problem = make(40, 300, 24, BF16)
    with workspace_of(10_000):
        first, second = (run(compute, *problem) for _ in range(2))
    assert all(map(torch.equal, first, second))


@cases.interpreted
@pytest.mark.parametrize("needs_grad", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_only_the_gradients_asked_for_are_computed(needs_grad):
    """Without the weight's, the workspace alone keeps logits: another rounding."""
    leaves, target, coefficient, options = make(20, 333, 24, BF16)
    with workspace_of(10_000):
        every = scaled_loss(*leaves, target, coefficient, **options)
        for leaf, needed in zip(leaves, needs_grad, strict=True):
            leaf.requires_grad_(bool(needed))
        results = scaled_loss(*leaves, target, coefficient, **{**options, "needs_grad": list(map(bool, needs_grad))})
    assert torch.equal(results[0], every[0])
    for mine, theirs, needed in zip(results[1:4], every[1:4], needs_grad, strict=True):
        assert mine.numel() == (theirs.numel() if needed else 0)
        if needed:
            torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=2**-7 * theirs.abs().max().item())


@cases.interpreted
def test_no_logit_is_rounded_where_the_map_has_a_kink():
    problem = make(20, 333, 24, BF16, logit_map=KINKED)
    with workspace_of(10_000), launches() as seen:
        compute(*problem)
    assert not any(kept for *_, kept in seen)


@cases.interpreted
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["hidden", "bias"])
def test_what_is_not_finite_spreads_as_in_eager(value, where):
    leaves, *rest = make(20, 100, 24, BF16, ignore_index=None)
    leaves[0 if where == "hidden" else 2].data.view(-1)[3] = value
    with workspace_of(10_000):
        ours = run(compute, leaves, *rest)
    for mine, theirs in zip(ours, run(eager, leaves, *rest), strict=True):
        assert not mine.isfinite()[~theirs.isfinite()].any()


@cases.interpreted
def test_a_bias_of_minus_infinity_removes_classes():
    """Whole tiles of them; the rest is as if there were no others."""
    leaves, target, coefficient, options = make(20, 300, 24, BF16)
    target %= 50
    leaves[2].data[50:] = -torch.inf
    with workspace_of(10_000):
        loss, grad_hidden, grad_weight, grad_bias = run(compute, leaves, target, coefficient, options)
        few = [leaves[0].detach(), *(leaf.detach()[:50].clone() for leaf in leaves[1:])]
        expected = run(compute, [leaf.requires_grad_() for leaf in few], target, coefficient, options)
    torch.testing.assert_close([loss, grad_hidden, grad_weight[:50], grad_bias[:50]], expected)
    assert grad_weight[50:].count_nonzero() == grad_bias[50:].count_nonzero() == 0


@cases.interpreted
def test_logits_of_any_size_are_kept():
    """Differences far beyond what float16 holds, between logits that a map makes small."""
    leaves, target, coefficient, options = make(20, 300, 24, BF16, logit_map="z/100000.0", bias=False)
    leaves[0].data *= 1e5
    with workspace_of(10_000), launches() as seen:
        ours, eagers, right = errors(leaves, target, coefficient, options)
    assert any(kept for *_, kept in seen)
    for mine, theirs, exact in zip(ours, eagers, right, strict=True):
        assert mine <= theirs + 2**-8 * exact


@cases.interpreted
@pytest.mark.parametrize("kernel", ["forward_kernel", "picked_kernel", "targets_kernel", "gradient_kernel"])
def test_a_kernel_that_cannot_run_is_replaced(kernel, monkeypatch):
    problem = make(20, 100, 24, BF16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_loss, "supported", lambda _: False)
        expected = run(compute, *problem)
    monkeypatch.setattr(fallback, "_cannot_compile", set())
    monkeypatch.setattr(fallback, "_warned", set())
    monkeypatch.setattr(cuda, kernel, Broken(CompilationError("def kernel(): pass", None, "broken on purpose")))
    with pytest.warns(RuntimeWarning, match="the Triton loss with its gradients can't run here"):
        results = run(compute, *problem)
    assert all(map(torch.equal, results, expected))
