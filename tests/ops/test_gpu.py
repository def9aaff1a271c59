"""The compiled kernels on a GPU: accuracy, determinism, memory, no synchronisation, 64-bit offsets."""

import cases
import pytest
import torch
import torch.nn.functional as F
from on_a_gpu import BF16, FP16, FP32, FP64, assert_captured, assert_same_bits, nothing_waits, plain, random, targets

from cce_inductor.bench import measure
from cce_inductor.bench.data import make_data
from cce_inductor.bench.methods import METHODS
from cce_inductor.bench.shapes import Shape
from cce_inductor.ops import cpu, cuda, sparse
from cce_inductor.ops.problem import MIB

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[0.0, 2**-3], ids=["exact", "approximate"])
def mass(request, monkeypatch):
    """The approximate_mass of a test that small problems take part in."""
    monkeypatch.setattr(sparse, "LEAST_FLOPS", 0)
    return request.param


@pytest.fixture(params=[None, 5, 64], ids=lambda picks: f"{picks or 1} targets")
def picks(request):
    """How many targets a row has in a second dimension."""
    return request.param


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize(
    "case",
    [
        {"rows": 1000, "vocab": 5003, "width": 129, "dtype": BF16},
        {"rows": 300, "vocab": 3000, "width": 256, "dtype": FP16, "logit_map": "30.0*tanh(z/30.0)"},
        {"rows": 300, "vocab": 3000, "width": 256, "dtype": FP32, "compute_dtype": BF16, "logit_map": "2.0*sigmoid(z)"},
        {"rows": 257, "vocab": 3001, "width": 64, "dtype": BF16, "strides": "transposed", "class_weight": False},
        {"rows": 257, "vocab": 3001, "width": 72, "dtype": FP16, "strides": "sliced", "total": False},
        {"rows": 40, "vocab": 300, "width": 64, "dtype": BF16, "strides": "expanded", "ignore_index": None},
        {"rows": 1000, "vocab": 5003, "width": 128, "dtype": BF16, "max": True, "entropy": True},
        {"rows": 300, "vocab": 3001, "width": 129, "dtype": FP16, "logit_map": "9.0*tanh(z/9.0)", "entropy": True},
        {"rows": 1000, "vocab": 5003, "width": 128, "dtype": BF16, "picks": 5},
        {"rows": 1000, "vocab": 5003, "width": 129, "dtype": BF16, "picks": 64, "total": False, "bias": False},
        {"rows": 300, "vocab": 3001, "width": 128, "dtype": FP16, "picks": 64, "max": True, "entropy": True},
        {"rows": 300, "vocab": 301, "width": 72, "dtype": BF16, "picks": 64, "logit_map": "9.0*tanh(z/9.0)"},
        {"rows": 257, "vocab": 3001, "width": 64, "dtype": FP32, "compute_dtype": BF16, "picks": 5},
        {"rows": 40, "vocab": 300, "width": 64, "dtype": BF16, "picks": 1, "ignore_index": None},
        {"rows": 40, "vocab": 3, "width": 64, "dtype": BF16, "picks": 9, "ignore_index": 1},
        {"rows": 40, "vocab": 300, "width": 64, "dtype": BF16, "picks": 0},
        {"rows": 1, "vocab": 1, "width": 1, "dtype": BF16, "bias": False},
        {"rows": 130, "vocab": 257, "width": 65, "dtype": FP32},
        {"rows": 130, "vocab": 257, "width": 65, "dtype": FP64},
        {"rows": 0, "vocab": 257, "width": 65, "dtype": BF16},
    ],
    ids=str,
)
def test_results_are_no_worse_than_eagers(case, precision):
    case = cases.Case(**case, device="cuda")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        results = cases.ours(case, cuda, workspace_bytes=MIB // 2)
        references, eagers, allowances = cases.exact(case), cases.eager(case), cases.uncertainty(case)
    finally:
        torch.set_float32_matmul_precision(before)
    if precision == "high" and case.compute_dtype == FP32:
        # how cuBLAS rounds operands to TF32 depends on shapes, and ours are of another shape than eager's
        allowances = [8192 * allowance for allowance in allowances]
    cases.assert_no_worse(case.names, results, references, eagers, allowances)


@pytest.mark.parametrize(
    "case",
    [
        {"rows": 1000, "vocab": 5003, "width": 128, "dtype": BF16},
        {"rows": 1000, "vocab": 5003, "width": 129, "dtype": BF16, "strides": "sliced"},
        {"rows": 300, "vocab": 3000, "width": 256, "dtype": FP16, "logit_map": "30.0*tanh(z/30.0)"},
        {"rows": 300, "vocab": 3000, "width": 256, "dtype": FP32, "compute_dtype": BF16},
        {"rows": 1, "vocab": 1, "width": 1, "dtype": BF16},
    ],
    ids=str,
)
def test_gradients_that_approximate_next_to_nothing_are_no_worse_than_eagers(case, monkeypatch):
    monkeypatch.setattr(sparse, "LEAST_FLOPS", 0)
    case = cases.Case(**case, bias=False, total=False, class_weight=False, device="cuda")
    results = cases.ours(case, cuda, workspace_bytes=8 * MIB, approximate_mass=2**-20)
    cases.assert_no_worse(case.names, results, cases.exact(case), cases.eager(case), cases.uncertainty(case))


@pytest.mark.parametrize("picks", [5, 64])
def test_several_targets_of_a_row_go_through_the_kernels(picks, monkeypatch):
    """Half of a row's are the same class, and half lie close together."""
    case = cases.Case(1000, 5003, 128, BF16, picks=picks, device="cuda")
    case.targets[:, picks // 2 :] %= 2
    case.targets[500:, : picks // 2] %= 300
    for name in ("forward", "backward"):
        monkeypatch.setattr(cpu, name, None)
    cases.assert_no_worse_than_eager(case, cases.ours(case, cuda))


def test_gradients_are_the_same_bits_every_run(mass, picks):
    hidden, weight = random(3000, 512).requires_grad_(), random(20001, 512).requires_grad_()
    target = targets(20001, 3000, picks)

    def gradients():
        lse, picked = plain(hidden, weight, target, 16, mass)
        return torch.autograd.grad(lse.mean() - picked.mean(), (hidden, weight))

    assert_same_bits(gradients)


def test_nothing_waits_for_the_gpu(mass, picks):
    hidden, weight = random(300, 64).requires_grad_(), random(1000, 64).requires_grad_()
    target = targets(1000, 300, picks)
    with nothing_waits():
        lse, picked = plain(hidden, weight, target, approximate_mass=mass)
        (lse.mean() - picked.mean()).backward()


def test_it_can_be_captured_into_a_cuda_graph(mass, picks):
    hidden, weight = random(300, 64).requires_grad_(), random(1000, 64).requires_grad_()
    target = targets(1000, 300, picks)

    def step():
        lse, picked = plain(hidden, weight, target, approximate_mass=mass)
        return torch.autograd.grad(lse.mean() - picked.mean(), (hidden, weight))

    assert_captured(step)


@pytest.mark.parametrize("data", ["trained", "soft", "uneven"])
@pytest.mark.parametrize("shape", [Shape(8192, 32064, 2048), Shape(2048, 200_064, 1280)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_the_default_is_no_worse_than_eager(dtype, shape, data):
    """On made-up heads that are as peaked as real ones, of which it approximates much, in float16 some at least."""
    torch.compiler.reset()
    hidden, weight, target = make_data(data, shape, dtype, "cuda")
    reference = measure.Reference.of(hidden, weight, target)
    inputs = hidden.requires_grad_(), weight.requires_grad_(), target
    eager, ours = (
        reference.errors(*measure.forward_and_backward(METHODS[name].make(None), inputs)) for name in ("eager", "cce")
    )
    for error in ("hidden_error", "weight_error"):
        assert ours[error] <= eager[error]


@pytest.mark.parametrize("width", [128, 129], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_ignored_rows_do_not_matter(width, share, mass):
    hidden, weight = random(1000, width).requires_grad_(), random(5003, width).requires_grad_()
    target = torch.randint(0, 5003, (1000,), device="cuda")
    ignored = torch.rand(1000, device="cuda") < share
    target[ignored] = -100

    def losses_and_gradients(skip_ignored):
        lse, picked = plain(hidden, weight, target, 16, mass, skip_ignored)
        losses = torch.where(ignored, 0.0, lse - picked)
        return losses, *torch.autograd.grad(losses.sum(), (hidden, weight))

    torch.cuda.set_sync_debug_mode("error")
    try:
        results, wanted = losses_and_gradients(True), losses_and_gradients(False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(results[0], wanted[0])
    # the exact backward has the same operands; the approximate one samples rows and lists them the same way
    assert all(map(torch.equal, results[1:], wanted[1:]))


@pytest.mark.parametrize("workspace_mib", [32, 128])
def test_peak_memory_is_the_gradients_and_the_workspace(workspace_mib):
    rows, vocab, width = 4096, 65536, 512
    hidden, weight = random(rows, width).requires_grad_(), random(vocab, width).requires_grad_()
    target = torch.randint(0, vocab, (rows,), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    lse, picked = plain(hidden, weight, target, workspace_mib)
    (lse - picked).mean().backward()
    peak = torch.cuda.max_memory_allocated() - before
    sums = rows * width * 4  # of the hidden states' gradient, in float32
    gradients = (rows + vocab) * width * 2
    assert peak <= gradients + sums + workspace_mib * MIB + 16 * MIB
    assert peak < rows * vocab * 2 / 2, "as much as half of the logits in bfloat16"


@pytest.mark.parametrize("approximate_mass", [0.0, 2**-20], ids=["exact", "sparse"])
@pytest.mark.parametrize("width", [1024, 1023], ids=["descriptors", "pointers"])
def test_int64_offsets_into_the_weight(width, approximate_mass, monkeypatch):
    monkeypatch.setattr(sparse, "LEAST_FLOPS", 0)
    vocab, rows = 2**31 // 1000 + 300, 64
    hidden, weight = random(rows, width, scale=0.1), random(vocab, width, scale=0.1)
    target = torch.randint(vocab - 200, vocab, (rows,), device="cuda")
    weight[-200:] += hidden[:1]  # what lies past the offset matters for the result
    check_against_a_float32_reference(hidden, weight, target, approximate_mass=approximate_mass)


@pytest.mark.parametrize("width", [1024, 1023], ids=["descriptors", "pointers"])
def test_int64_offsets_into_the_hidden_states(width):
    rows, vocab = 2**31 // 1000 + 300, 64
    hidden, weight = random(rows, width, scale=0.1), random(vocab, width, scale=0.1)
    target = torch.randint(0, vocab, (rows,), device="cuda")
    check_against_a_float32_reference(hidden, weight, target)


@pytest.mark.parametrize(
    ("width", "dtype"), [(64, BF16), (65, BF16), (64, FP32)], ids=["descriptors", "pointers", "float32"]
)
def test_int64_offsets_into_the_workspace_and_the_tiles(width, dtype):
    rows, vocab = 33000, 66000
    hidden, weight = (random(size, width, dtype=dtype, scale=0.3) for size in (rows, vocab))
    target = torch.randint(0, vocab, (rows,), device="cuda")
    check_against_a_float32_reference(hidden, weight, target, workspace_mib=dtype.itemsize * rows * vocab // MIB)


def check_against_a_float32_reference(hidden, weight, target, **how):
    """Losses of the last rows, and gradients of the last rows of both operands, against plain float32."""
    hidden.requires_grad_()
    weight.requires_grad_()
    lse, picked = plain(hidden, weight, target, **how)
    losses = lse - picked
    losses.sum().backward()
    with torch.no_grad():
        last = slice(-64, None)
        logits = _logits(hidden[last], weight)
        expected = F.cross_entropy(logits, target[last], reduction="none")
        torch.testing.assert_close(losses[last], expected, rtol=1e-5, atol=1e-4)
        dz = logits.softmax(1)
        dz[torch.arange(64), target[last]] -= 1
        grad_hidden = _product(dz, weight)
        del logits
        assert (hidden.grad[last] - grad_hidden).norm() < 2**-7 * grad_hidden.norm()
        z = _logits(weight[last], hidden).T  # [N, 64]
        probabilities = (z - lse.unsqueeze(1)).exp()
        hit = target.unsqueeze(1) == torch.arange(len(weight) - 64, len(weight), device="cuda")
        grad_weight = _product((probabilities - hit.float()).T, hidden)
        assert (weight.grad[last] - grad_weight).norm() < 2**-7 * grad_weight.norm()


def _logits(few, many):
    """few @ many.T in float32, piece by piece: a float32 copy of `many` may not fit."""
    return torch.cat([few.float() @ piece.float().T for piece in many.split(2**17)], dim=1)


def _product(few, many):
    """few @ many in float32, piece by piece."""
    return sum(a @ b.float() for a, b in zip(few.split(2**17, dim=1), many.split(2**17), strict=True))
