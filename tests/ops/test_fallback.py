"""Where an implementation can't run on this machine, the next one does, with one warning and right results."""

import contextlib
import warnings
import weakref

import cases
import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError, OutOfResources, PTXASError

from cce_inductor.ops import cpu, cuda, fallback, in_forward, sparse
from cce_inductor.ops.problem import RowGradients, Tiles

pytestmark = cases.interpreted

OF_THE_MACHINE = {
    "compilation": CompilationError("def kernel(): pass", None, "broken on purpose"),
    "passes": RuntimeError("PassManager::run failed"),
    "assembler": PTXASError("broken on purpose"),
    "shared memory": OutOfResources(300000, 232448, "shared memory"),
    "memory": torch.OutOfMemoryError("CUDA out of memory"),
}
OTHERS = [RuntimeError("CUDA error: device-side assert triggered"), IndexError("Target 9 is out of bounds."),
          ValueError(), InterpreterError("a bug in a kernel"), KeyboardInterrupt()]  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_has_failed_yet(monkeypatch):
    monkeypatch.setattr(fallback, "_cannot_compile", set())
    monkeypatch.setattr(fallback, "_warned", set())


class Broken:
    """In the place of a kernel, or of a function."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        self.calls += 1
        raise self.error


FELL_BACK = "can't run here"


@contextlib.contextmanager
def no_fallback():
    """A warning of one is an error; numpy's, in the interpreter, are not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{FELL_BACK}")
        yield


KERNELS = ("forward_kernel", "picked_kernel", "targets_kernel", "gradient_kernel")


@pytest.mark.parametrize("error", OF_THE_MACHINE.values(), ids=OF_THE_MACHINE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_cannot_run_is_replaced(monkeypatch, kernel, error):
    """With as little error, one warning, and only memory is tried again."""
    case = cases.Case(9, 40, 6)
    monkeypatch.setattr(cuda, kernel, broken := Broken(error))
    with pytest.warns(RuntimeWarning, match="can't run here") as warned:
        results = cases.ours(case, cuda)
    cases.assert_no_worse_than_eager(case, results, interpreted=True)
    tried = broken.calls
    assert tried == (2 if kernel == "gradient_kernel" else 1)
    assert len([w for w in warned if FELL_BACK in str(w.message)]) == tried
    with no_fallback():
        again = cases.ours(case, cuda)
    assert all(map(torch.equal, results, again))
    assert broken.calls == (2 * tried if isinstance(error, torch.OutOfMemoryError) else tried)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kernel", KERNELS)
def test_other_errors_are_raised_as_they_are(monkeypatch, kernel, error):
    monkeypatch.setattr(cuda, kernel, Broken(error))
    with pytest.raises(type(error)) as raised, no_fallback():
        cases.ours(cases.Case(9, 40, 6), cuda)
    assert raised.value is error


def test_a_wrong_target_is_an_error_of_the_fallback_too(monkeypatch):
    case = cases.Case(9, 40, 6)
    case.targets[4] = 40
    monkeypatch.setattr(cuda, "targets_kernel", Broken(OF_THE_MACHINE["compilation"]))
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="a target lies outside"):
        cuda.forward(case.problem())


def test_a_workspace_that_does_not_fit_is_made_smaller(monkeypatch):
    """Each block of the gradient is refused above a size; the kernel itself runs."""
    case, sizes = cases.Case(30, 4000, 6), []
    original = cuda.exact_backward

    def too_large(problem, needs_grad, rows, columns, fill):
        sizes.append(problem.workspace_bytes)
        if problem.workspace_bytes > 2 << 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(problem, needs_grad, rows, columns, fill)

    monkeypatch.setattr(cuda, "exact_backward", too_large)
    with pytest.warns(RuntimeWarning, match="the exact Triton backward can't run here"):
        results = cases.ours(case, cuda, workspace_bytes=16 << 20)
    assert sizes == [16 << 20, 2 << 20]
    cases.assert_no_worse_than_eager(case, results, interpreted=True)


@pytest.mark.parametrize("broken_too", [False, True], ids=["exact", "ATen"])
def test_the_sparse_backward_gives_way_to_the_exact_one(monkeypatch, broken_too):
    case = cases.Case(9, 40, 6, bias=False, total=False, class_weight=False)
    problem = case.problem(approximate_mass=2**-4)
    monkeypatch.setattr(sparse, "LEAST_FLOPS", 0)
    lse, *_ = cuda.forward(problem)
    tile_lse = torch.stack([x.logsumexp(1) for x in (case.hidden @ case.weight.T).split(32, dim=1)])
    tiles = Tiles(tile_lse, torch.zeros_like(tile_lse, dtype=torch.int32))
    needs_grad = [True, True, False]
    grads = RowGradients(*case.grads[:3])
    expected = cpu.backward(problem, lse, tiles, grads, needs_grad)
    monkeypatch.setattr(sparse, "block_gradient_kernel", sparse_kernel := Broken(OF_THE_MACHINE["shared memory"]))
    if broken_too:
        monkeypatch.setattr(cuda, "gradient_kernel", Broken(OF_THE_MACHINE["compilation"]))
    with pytest.warns(RuntimeWarning, match="the sparse backward can't run here"):
        gradients = cuda.backward(problem, lse, tiles, grads, needs_grad)
    assert sparse_kernel.calls == 1
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_after_a_forward_through_aten_a_sparse_backward_skips_nothing(monkeypatch):
    """Its tiles are unknown then."""
    case = cases.Case(9, 100, 6, bias=False, total=False, class_weight=False, ignore_index=3)
    case.hidden = 8 * case.hidden  # a softmax that would be skipped in most tiles
    case.grads[0] = case.grads[0].masked_fill(case.targets == 3, 0.0)  # of an ignored row
    problem = case.problem(approximate_mass=0.5)
    monkeypatch.setattr(sparse, "LEAST_FLOPS", 0)
    monkeypatch.setattr(cuda, "recorded_tiles", lambda *_: 4)
    monkeypatch.setattr(cuda, "forward_kernel", Broken(OF_THE_MACHINE["compilation"]))
    with pytest.warns(RuntimeWarning, match="the Triton forward"):
        lse, *_, tile_lse, tile_tops = cuda.forward(problem)
    assert tile_lse.shape == (4, 9)
    assert tile_tops.shape == (4, 9, 2)
    needs_grad = [True, True, False]
    grads = RowGradients(*case.grads[:3])
    saved = problem, lse, Tiles(tile_lse, tile_tops), grads, needs_grad
    gradients, expected = cuda.backward(*saved), cpu.backward(*saved)
    # exp(z - lse) is as far off, relatively, as z and lse are, on both sides
    rounding = 4 * torch.finfo(torch.float32).eps * (case.hidden @ case.weight.T).abs().max().item()
    for mine, theirs in zip(gradients[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rounding, atol=rounding * theirs.abs().max().item())
    torch.testing.assert_close(gradients[2], expected[2])  # nothing: no gradient of a bias is asked for


def test_a_loss_with_its_gradients_is_computed_in_less_memory(monkeypatch):
    case = cases.Case(9, 40, 6, total=False, class_weight=False)
    problem = case.problem(workspace_bytes=16 << 20)
    coefficient, needs_grad = torch.ones(9), [True, True, True]
    expected = in_forward.loss_and_gradients(problem, coefficient, needs_grad)
    original = in_forward.KeptLogits.within

    def within(problem, *args):
        if problem.workspace_bytes > 2 << 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(problem, *args)

    monkeypatch.setattr(in_forward.KeptLogits, "within", within)
    with pytest.warns(RuntimeWarning, match="the loss with its gradients can't run here"):
        results = in_forward.loss_and_gradients(problem, coefficient, needs_grad)
    assert all(map(torch.equal, results, expected))


def test_where_nothing_runs_the_last_error_is_raised():
    def fail(text):
        raise torch.OutOfMemoryError(text)

    with pytest.warns(RuntimeWarning, match="first"), pytest.raises(torch.OutOfMemoryError, match="last"):
        fallback.first_that_runs("kind", {"first": lambda: fail("first"), "last": lambda: fail("last")})


def test_a_failed_implementation_holds_no_memory_while_the_next_runs():
    held = []

    def fail():
        tensor = torch.zeros(10)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError

    with pytest.warns(RuntimeWarning):
        assert fallback.first_that_runs("kind", {"first": fail, "last": lambda: held[0]()}) is None
