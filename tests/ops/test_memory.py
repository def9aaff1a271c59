"""How much memory a call takes at its peak, beyond its operands: never more than ARCHITECTURE.md says."""

import gc
from dataclasses import replace

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from cce_inductor.kernels.config import stored_config, tile_config
from cce_inductor.ops import cpu, cpu_sparse, cuda, cuda_loss, in_forward, sparse, stored
from cce_inductor.ops.launch import device_properties
from cce_inductor.ops.problem import MIB
from cce_inductor.ops.sparse_rounds import MOST_ROUNDS
from cce_inductor.ops.workspace import for_approximate_loss

FLOAT = 4
ALLOCATION = 512  # a small tensor takes as much on a GPU


def peak_bytes(function, device="cpu"):
    """(bytes above those before the call at its highest, the result), by the allocator's own account."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, result


def vectors(problem):
    """A dozen of the rows, in 64 bits, of the classes, and of several targets of each row."""
    targets = problem.num_rows * problem.targets_per_row if problem.several_targets else 0
    return 12 * (2 * problem.num_rows + problem.vocab_size + targets) * FLOAT + 64 * ALLOCATION


def cpu_bound(problem, kept=0):
    """The formula for a CPU. kept: of logits that stay for the gradients, in bytes."""
    rows, columns = cpu.block_shape(problem)
    assert rows <= cpu.BLOCK_ROWS
    assert rows * columns * FLOAT <= max(min(cpu.BLOCK_BYTES, problem.workspace_bytes), 8 * rows * FLOAT)
    blocks = 8 * rows * columns
    slices = 8 * -(-problem.vocab_size // columns) * problem.num_rows
    gradients = 2 * (problem.num_rows + problem.vocab_size + columns) * problem.width  # sums, and what they become
    return (blocks + slices + gradients) * FLOAT + vectors(problem) + kept


@st.composite
def problems(draw, picks=(None,)):
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    case = cases.Case(
        rows=draw(st.sampled_from([1, 7, 300, 1024, 1100])),
        vocab=draw(st.sampled_from([1, 50, 1000, 4099])),
        width=draw(st.sampled_from([1, 16, 40])),
        dtype=dtype,
        compute_dtype=draw(st.sampled_from([dtype, torch.bfloat16])),
        logit_map=draw(st.sampled_from(cases.MAPS)),
        bias=draw(st.booleans()),
        picks=draw(st.sampled_from(picks)),
        total=draw(st.booleans()),
        class_weight=draw(st.booleans()),
        max=draw(st.booleans()),
        entropy=draw(st.booleans()),
    )
    workspace = draw(st.sampled_from([1, 2, 64])) * MIB
    return case, case.problem(workspace_bytes=workspace, skip_ignored=draw(st.booleans()))


@settings(max_examples=6)
@given(problems(picks=(None, None, 1, 5, 64)))
def test_on_a_cpu(given):
    case, problem = given
    peak, results = peak_bytes(lambda: cpu.forward(problem))
    assert peak <= cpu_bound(problem)
    grads = case.row_gradients(results)
    needs = [True, True, case.bias]
    peak, _ = peak_bytes(lambda: cpu.backward(problem, results.lse, results.tiles, grads, needs))
    assert peak <= cpu_bound(problem)


@settings(max_examples=6)
@given(problems())
def test_of_a_loss_with_its_gradients(given):
    case, problem = given
    coefficient = torch.ones(case.rows)
    peak, _ = peak_bytes(lambda: in_forward.loss_and_gradients(problem, coefficient, [True, True, case.bias]))
    logits = problem.num_rows * problem.vocab_size * problem.compute_dtype.itemsize
    assert peak <= cpu_bound(problem, kept=min(problem.workspace_bytes, logits // in_forward.LOGITS_SHARE))


@settings(max_examples=6)
@given(problems())
def test_of_a_loss_that_skips_what_has_little_probability(given):
    case, problem = given
    problem = replace(problem, approximate_mass=2**-5, skip_ignored=True)
    coefficient = torch.ones(case.rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_sparse, "LEAST_PRODUCT", 0)
        patch.setattr(cpu_sparse, "MOST_NEEDED", 1.0)
        peak, _ = peak_bytes(lambda: in_forward.loss_and_gradients(problem, coefficient, [True, True, case.bias]))
    logits = problem.num_rows * problem.vocab_size * problem.compute_dtype.itemsize
    tiles = 5 * problem.num_rows * -(-problem.vocab_size // cpu_sparse.TILE) * FLOAT
    assert peak <= cpu_bound(problem, kept=max(tiles, min(problem.workspace_bytes, logits // in_forward.LOGITS_SHARE)))


def test_the_logits_would_break_the_bound():
    """Eager PyTorch takes several times as much."""
    case = cases.Case(1000, 20000, 16, bias=False)
    peak, _ = peak_bytes(lambda: cases.eager(case))
    assert peak > 3 * cpu_bound(case.problem())


# ------------------------------------------------------------------------------------------- the kernels for a GPU


def forward_bound(problem):
    """Each tile has a few numbers a row, combined with temporaries of the same size; rows that count are gathered."""
    tiles = -(-problem.vocab_size // tile_config(device_properties(problem.hidden.device)[0], backward=False).block_v)
    kinds = 8 + problem.want_total + 2 * problem.want_max + 4 * problem.want_entropy
    gathered = 2 * problem.num_rows * problem.width * problem.compute_dtype.itemsize
    cast = 0 if problem.weight.dtype == problem.compute_dtype else problem.workspace_bytes
    return kinds * tiles * problem.num_rows * FLOAT + gathered + cast + vectors(problem)


def gradients_bound(problem):
    """Results, and hidden's sums, in float32."""
    return 2 * problem.num_rows * problem.width * FLOAT + problem.vocab_size * problem.width * problem.weight.itemsize


def exact_bound(problem):
    """A block of dz; of its columns the weight in two dtypes and its gradient; partial sums of the bias's gradient."""
    rows, columns = cuda.block_shape(problem)
    block = max(problem.workspace_bytes, rows * cuda.COLUMN_MULTIPLE * problem.compute_dtype.itemsize)
    partial = -(-rows // 32) * columns * FLOAT
    return gradients_bound(problem) + block + 3 * columns * problem.width * FLOAT + 2 * partial + vectors(problem)


def kept_bound(problem):
    """Forward and exact backward at once; and of each tile of logits that is kept, a number a row."""
    tiles = -(-problem.vocab_size // cuda.forward_config(problem).block_v)
    return forward_bound(problem) + exact_bound(problem) + tiles * problem.num_rows * FLOAT


def sparse_bound(problem):
    """Blocks of dz, at least of all rows in one tile, beside the lists; hidden's sums in fixed point; skipped mass."""
    config = tile_config(device_properties(problem.hidden.device)[0], backward=True)
    tiles = -(-problem.vocab_size // config.block_v)
    rows = problem.num_rows + 2 * config.block_n
    size = problem.compute_dtype.itemsize
    lists = 40 * (tiles + 1) * rows
    blocks = config.block_v * (1 + tiles / MOST_ROUNDS)
    scratch = max(problem.workspace_bytes, lists + rows * (blocks + problem.width) * size)
    skipped = 3 * (tiles + problem.num_rows) * problem.width * FLOAT
    cast = 0 if problem.weight.dtype == problem.compute_dtype else problem.weight.numel() * problem.hidden.itemsize
    return gradients_bound(problem) + scratch + skipped + cast + vectors(problem)


def stored_bound(problem):
    """Float32: a block of logits, a few numbers of each tile and row, rows that count, results and parts of them."""
    rows, columns = cuda.block_shape(problem)
    block = max(problem.workspace_bytes, rows * cuda.COLUMN_MULTIPLE * FLOAT)
    slices = -(-problem.vocab_size // columns)
    tiles = slices + problem.vocab_size // stored_config(device_properties(problem.hidden.device)[0]).block_v
    kinds = 8 + problem.want_total + 2 * problem.want_max + 4 * problem.want_entropy
    gradients = (3 * problem.num_rows + problem.vocab_size + 2 * columns) * problem.width
    return block + (kinds * tiles * problem.num_rows + gradients) * FLOAT + vectors(problem)


SIZES = [(8192, 65536, 2048), (1000, 50257, 768), (20000, 32000, 1024)]


@pytest.mark.gpu
@pytest.mark.parametrize("skip_ignored", [False, True])
@pytest.mark.parametrize("mass", [0.0, 2**-4])
@pytest.mark.parametrize("workspace", [16, 256])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_on_a_gpu(size, workspace, mass, skip_ignored, monkeypatch):
    monkeypatch.setattr(sparse, "LEAST_FLOPS", 0)
    assert_within_bounds("cuda", size, workspace * MIB, mass, skip_ignored, torch.bfloat16)


@cases.interpreted
@pytest.mark.parametrize("workspace", [1, 1 << 14])
@pytest.mark.parametrize("size", [(70, 200, 24)], ids=str)
def test_the_kernels_in_the_interpreter(size, workspace):
    """The same formulas, in which small tensors and tiles count."""
    assert_within_bounds("cpu", size, workspace, 2**-4, False, torch.float32)


@pytest.mark.gpu
def test_of_several_targets_on_a_gpu():
    assert_within_bounds("cuda", SIZES[0], 16 * MIB, 0.0, False, torch.bfloat16, picks=64)


@cases.interpreted
def test_of_several_targets_in_the_interpreter():
    assert_within_bounds("cpu", (35, 100, 24), 1, 0.0, False, torch.float32, picks=64)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("workspace", [16, 256])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_of_a_loss_with_its_gradients_on_a_gpu(size, workspace, bias):
    assert_kept_within_bounds("cuda", size, workspace * MIB, bias, torch.bfloat16)


@cases.interpreted
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("workspace", [1, 1 << 14])
def test_of_a_loss_with_its_gradients_in_the_interpreter(workspace, bias):
    """In float16: the interpreter's bfloat16 takes copies."""
    assert_kept_within_bounds("cpu", (35, 200, 24), workspace, bias, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("workspace", [16, 256])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_of_float32_on_a_gpu(size, workspace):
    assert_stored_within_bounds("cuda", size, workspace * MIB)


@cases.interpreted
@pytest.mark.parametrize("workspace", [1 << 16, 1 << 23])
def test_of_float32_in_the_interpreter(workspace, monkeypatch):
    monkeypatch.setattr(stored, "supported", stored.covers)
    monkeypatch.setattr(in_forward, "SMALL", 1 << 13)
    assert_stored_within_bounds("cpu", (100, 1000, 4), workspace)


def assert_stored_within_bounds(device, size, workspace_bytes):
    case = cases.Case(*size, device=device, max=True, entropy=True)
    problem = case.problem(workspace_bytes=workspace_bytes)
    peak, results = peak_bytes(lambda: cuda.forward(problem), device)
    assert peak <= stored_bound(problem)
    needs, grads = [True, True, True], case.row_gradients(results)
    peak, _ = peak_bytes(lambda: cuda.backward(problem, results.lse, results.tiles, grads, needs), device)
    assert peak <= stored_bound(problem)
    problem = replace(problem, want_total=False, total_weight=None, want_max=False, want_entropy=False)
    coefficient = torch.ones(problem.num_rows, device=device)
    peak, _ = peak_bytes(lambda: in_forward.loss_and_gradients(problem, coefficient, needs), device)
    logits = problem.num_rows * problem.vocab_size * FLOAT
    most = max(logits // in_forward.GPU_LOGITS_SHARE, in_forward.SMALL)
    assert peak <= stored_bound(replace(problem, workspace_bytes=min(workspace_bytes, most)))


@pytest.mark.gpu
@pytest.mark.parametrize("workspace", [16, 256, None])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_of_a_loss_with_sparse_gradients_on_a_gpu(size, workspace, monkeypatch):
    """The largest workspace is what `None` stands for."""
    monkeypatch.setattr(sparse, "LEAST_FLOPS", 0)
    assert_coded_within_bounds("cuda", size, None if workspace is None else workspace * MIB, torch.bfloat16)


@cases.interpreted
@pytest.mark.parametrize("workspace", [1, 1 << 14])
def test_of_a_loss_with_sparse_gradients_in_the_interpreter(workspace, monkeypatch):
    """In float16: the interpreter's bfloat16 takes copies."""
    monkeypatch.setattr(cuda, "recorded_tiles", lambda _, vocab, *__: -(-vocab // 32))
    assert_coded_within_bounds("cpu", (70, 200, 24), workspace, torch.float16)


def assert_coded_within_bounds(device, size, workspace_bytes, dtype):
    case = cases.Case(*size, dtype, bias=False, total=False, class_weight=False, device=device)
    problem = case.problem(workspace_bytes=workspace_bytes or 256 * MIB, approximate_mass=2**-5, skip_ignored=True)
    if workspace_bytes is None:
        problem = for_approximate_loss(replace(problem, may_take_more=True))
    coefficient = torch.ones(problem.num_rows, device=device)
    peak, _ = peak_bytes(lambda: cuda_loss.approximate(problem, coefficient, [True, True, False]), device)
    assert peak <= forward_bound(problem) + sparse_bound(problem)


def assert_kept_within_bounds(device, size, workspace_bytes, bias, dtype):
    case = cases.Case(*size, dtype, bias=bias, total=False, class_weight=False, device=device)
    problem = case.problem(workspace_bytes=workspace_bytes, skip_ignored=True)
    coefficient = torch.ones(problem.num_rows, device=device)
    peak, _ = peak_bytes(lambda: cuda_loss.exact(problem, coefficient, [True, True, bias]), device)
    assert peak <= kept_bound(problem)


def assert_within_bounds(device, size, workspace_bytes, mass, skip_ignored, dtype, picks=None):
    case = cases.Case(*size, dtype, picks=picks, bias=False, total=False, class_weight=False, device=device)
    case.hidden, case.weight = case.hidden * 0.1, case.weight * 0.1
    problem = case.problem(workspace_bytes=workspace_bytes, approximate_mass=mass, skip_ignored=skip_ignored)
    peak, results = peak_bytes(lambda: cuda.forward(problem), device)
    assert peak <= forward_bound(problem)
    needs, grads = [True, True, False], case.row_gradients(results)
    exact = problem if mass == 0 else replace(problem, approximate_mass=0.0)
    peak, _ = peak_bytes(lambda: cuda.backward(exact, results.lse, problem.tiles(0), grads, needs), device)
    assert peak <= exact_bound(problem)
    if mass > 0 and device == "cuda":
        peak, _ = peak_bytes(lambda: cuda.backward(problem, results.lse, results.tiles, grads, needs), device)
        assert peak <= sparse_bound(problem)
