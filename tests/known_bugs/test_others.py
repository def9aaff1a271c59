"""What went wrong in other implementations of this loss, each as one test."""

import importlib
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from common import Head, both_ways, compiled, gpu, mean_loss
from helpers import D, V, assert_close_to_eager, check, hidden, labels, nodes_of, weight
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from triton.runtime.autotuner import Autotuner

import cce_inductor.kernels
from cce_inductor import capture_reports, linear_cross_entropy
from cce_inductor.kernels.forward import forward_kernel
from cce_inductor.ops import cpu, cpu_fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bias_is_added_once_to_the_targets_logit(dtype):
    """Added twice, it makes losses negative."""
    b = torch.full((V,), 3.0, dtype=dtype)
    b[::2] = 20.0
    loss = both_ways(hidden(dtype=dtype), weight(dtype=dtype), labels(), b.requires_grad_(), reduction="none")
    assert (loss >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_losses_of_certain_rows_are_not_negative(dtype):
    w = 4 * weight(dtype=dtype, requires_grad=False)
    t = labels()
    h = (4 * w[t]).requires_grad_()
    loss = both_ways(h, w.requires_grad_(), t, reduction="none")
    assert (loss >= 0).all()


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7, V - 1, V, 10**6])
def test_any_ignore_index_is_heeded(ignore_index):
    both_ways(hidden(), weight(), labels(ignored=ignore_index), ignore_index=ignore_index)


def test_an_ignore_index_is_heeded_by_the_compiled_backend():
    def program(h, w, t):
        return F.cross_entropy(F.linear(h, w).flatten(0, -2), t.flatten(), ignore_index=-1)

    with capture_reports() as reports:
        assert_close_to_eager(compiled(program), program, (hidden(), weight(), labels(ignored=-1)))
    assert [len(report.rewritten) for report in reports] == [1]


def test_the_weights_gradient_keeps_its_precision_however_many_blocks_it_is_summed_over(monkeypatch):
    """Summed over blocks of rows in bfloat16, its error would grow with their number."""
    h, w, t = hidden(1024, D, dtype=torch.bfloat16), weight(dtype=torch.bfloat16), labels(1024)
    [exact] = torch.autograd.grad(mean_loss(h.double(), w64 := w.detach().double().requires_grad_(), t), w64)

    def error(gradient):
        return (gradient.double() - exact).norm() / exact.norm()

    def ours(rows):
        for way in (cpu, cpu_fused):
            monkeypatch.setattr(way, "BLOCK_ROWS", rows)
        return error(torch.autograd.grad(linear_cross_entropy(h, w, t), w)[0])

    few, many = ours(128), ours(4)
    assert many <= 1.1 * few
    rounded = torch.zeros_like(w)  # what is not done
    for rows in torch.arange(1024).split(4):
        rounded += torch.autograd.grad(linear_cross_entropy(h[rows], w, t[rows], reduction="sum"), w)[0] / 1024
    assert error(rounded) > 1.5 * many


def test_every_class_gets_its_gradient():
    """None is rounded to zero or filtered out, on a CPU."""
    h, w, t = hidden(), 0.1 * weight(V, D), labels()
    w = w.detach().requires_grad_()
    [gradient] = torch.autograd.grad(linear_cross_entropy(h, w, t), w)
    assert gradient.abs().amax(1).min() > 0


@gpu
@pytest.mark.parametrize("scale", [0.01, 1.0], ids=["untrained", "trained"])
def test_every_class_gets_its_gradient_from_the_approximate_backward(scale):
    """A filter would leave a tenth of the classes without; here what is skipped is put back. Eager is the measure."""
    torch.manual_seed(0)
    rows, vocab, width = 8192, 65536, 1024  # large enough for the sparse backward
    h = (scale * torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)).requires_grad_()
    w = (0.3 * torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16)).requires_grad_()
    t = torch.randint(0, vocab, (rows,), device="cuda")
    [ours] = torch.autograd.grad(linear_cross_entropy(h, w, t), w)
    [eagers] = torch.autograd.grad(mean_loss(h, w, t), w)
    missing = ((ours.abs().amax(1) == 0) & (eagers.abs().amax(1) > 0)).float().mean()
    assert missing == 0


def test_no_kernel_is_inlined_into_inductors_code():
    """There its arguments would be Inductor's to type, Python floats as float64; an operator is called as it is."""
    ours = check(mean_loss, hidden(), weight(), labels())
    targets = {str(node.target) for module in ours.modules for node in nodes_of(module)}
    assert not any("triton" in target for target in targets)


def test_nothing_is_tuned_at_run_time():
    """Tile shapes come from a table; a tuner would run again for every new length."""
    for module in pkgutil.iter_modules(cce_inductor.kernels.__path__):
        members = vars(importlib.import_module(f"cce_inductor.kernels.{module.name}"))
        assert not any(isinstance(member, Autotuner) for member in members.values())


@gpu
def test_new_lengths_compile_no_new_kernels():
    w = torch.randn(5000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def run(rows):
        h = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        linear_cross_entropy(h, w, torch.randint(0, 5000, (rows,), device="cuda")).backward()
        return sum(len(cache[0]) for cache in forward_kernel.device_caches.values())

    kernels = [run(rows) for rows in (512, 513, *range(514, 700, 9))]
    assert kernels[-1] == kernels[1], "one for multiples of 16, one for the others"


def test_the_number_of_valid_tokens_is_not_read():
    """No `.item()`, no `nonzero()`: neither a graph break nor a wait for the GPU."""
    seen = []

    def lower(module, inputs):
        def compiler(graph, _):
            seen.extend(str(node.target) for node in nodes_of(graph))
            return make_boxed_func(graph.forward)

        return aot_module_simplified(module, inputs, fw_compiler=compiler)

    check(mean_loss, hidden(), weight(), labels(ignored=-100), lower=lower, fullgraph=True)
    assert any("cce_inductor" in target for target in seen)
    assert not any(name in target for target in seen for name in ("nonzero", "_local_scalar_dense", "masked_select"))


@gpu
def test_a_compiled_training_step_does_not_wait_for_the_gpu():
    h = torch.randn(4096, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(32000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    t = torch.randint(0, 32000, (4096,), device="cuda")
    t[::3] = -100
    step = compiled(mean_loss)
    step(h, w, t).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(h, w, t).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_model_is_not_touched():
    """Its parameters stay the same objects with their attributes, its methods and names its own."""
    model = Head()
    model.head.weight.tensor_model_parallel = True
    before = dict(model.named_parameters()), list(model.state_dict()), type(model).forward, dict(vars(model.head))
    step = compiled(model)
    with capture_reports() as reports:
        step(labels()).backward()
    assert [len(report.rewritten) for report in reports] == [1]
    after = dict(model.named_parameters()), list(model.state_dict()), type(model).forward, dict(vars(model.head))
    assert after[1:] == before[1:]
    assert all(after[0][name] is parameter for name, parameter in before[0].items())
    assert model.head.weight is model.embed.weight
    assert model.head.weight.tensor_model_parallel
    assert "forward" not in vars(model)
