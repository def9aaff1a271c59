"""`python -m cce_inductor doctor`: its findings, and that it notices what is broken."""

import os
import subprocess
import sys

import pytest
import torch

from cce_inductor import doctor
from cce_inductor.ops import launch
from cce_inductor.ops.plan import plan

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(**environment):
    """(exit code, what it printed) in a process of its own, without what conftest sets."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "cce_inductor", "doctor", "--device", "cpu"]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_a_good_installation():
    code, printed = run()
    assert code == 0, printed
    names = [line.split()[0] for line in printed.splitlines()]
    for name in ("cce_inductor", "torch", "triton", "python", "device", "plan", "backend", "compiler", "cache"):
        assert name in names
    assert torch.__version__ in printed
    assert "compiled a loss in float32: 1 of 1 rewritten; loss off by " in printed
    assert printed.endswith("all is well\n")


def test_torch_compile_turned_off():
    code, printed = run(TORCHDYNAMO_DISABLE="1", TRITON_INTERPRET="1")
    assert code == 1
    assert "! environment  TORCHDYNAMO_DISABLE is set" in printed
    assert "0 rewrites where 1 should be: nothing was compiled" in printed
    assert "  environment  TRITON_INTERPRET is set" in printed
    assert "2 of these (!) need attention" in printed


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(doctor, "cpp_compiler", lambda: None)
    finding = doctor._compiler()
    assert not finding.ok
    assert "install g++" in str(finding)


def test_cpp_compiler_is_none_where_there_is_none():
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert doctor.cpp_compiler() is None


def test_a_name_that_is_not_registered(monkeypatch):
    monkeypatch.setattr(torch.compiler, "list_backends", lambda: ["inductor"])
    finding = doctor._name()
    assert not finding.ok
    assert "backend=cce_inductor.cce_backend" in finding.advice


def test_an_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert [f.name for f in doctor._versions() if not f.ok] == ["torch"]


def test_a_cache_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    finding = doctor._cache()
    assert not finding.ok
    assert "TORCHINDUCTOR_CACHE_DIR" in finding.advice


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there():
    *_, last = doctor.findings(torch.device("cuda"))
    assert (last.name, last.ok) == ("device", False)


def test_wrong_gradients_are_found(monkeypatch):
    def wrong(*args, **kwargs):
        loss, hidden, weight = right(*args, **kwargs)
        return [loss, hidden, weight * (1 + 1e-3 * (len(args) == 4))]  # those of the compiled model only

    right = doctor._loss_and_gradients
    monkeypatch.setattr(doctor, "_loss_and_gradients", wrong)
    finding = doctor._rewrite(CPU, torch.float32)
    assert not finding.ok
    assert "d weight off by 1.0e-03" in finding.text


def test_an_error_while_compiling_is_a_finding(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("on purpose\nand more")

    monkeypatch.setattr(doctor, "cce_backend", broken)
    finding = doctor._rewrite(CPU, torch.float32)
    assert not finding.ok
    assert "on purpose" in finding.text
    assert "and more" not in str(finding)


def test_a_loss_that_is_not_rewritten_says_why(monkeypatch):
    monkeypatch.setattr(doctor, "VOCAB", 10)
    monkeypatch.setattr(doctor.F, "cross_entropy", lambda x, t: torch.nn.functional.nll_loss(x.softmax(-1).log(), t))
    finding = doctor._rewrite(CPU, torch.float32)
    assert not finding.ok
    assert "softmax" in finding.text


# ------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("dtype", "mass", "end"),
    [
        (torch.float32, 2.0**-4, "in the forward where the loss is alone"),
        (torch.bfloat16, 0.0, "in the forward where the loss is alone"),
        (torch.bfloat16, 2.0**-4, "in the forward where the loss is alone, sparse there if the softmax is peaked"),
        (torch.float16, 2.0**-4, "exact gradients"),
    ],
    ids=str,
)
def test_the_plan_of_a_cpu(dtype, mass, end):
    text = plan(CPU, dtype, 8192, 128256, 4096, mass)
    assert text.startswith("blocks through ATen on the CPU, exact gradients")
    assert text.endswith(end)


PLANS = {  # of an H100 or an A100: (dtype, rows, vocab, width, approximate_mass)
    "large": (
        (9, 0),
        (torch.bfloat16, 8192, 128256, 4096, 2.0**-4),
        "by TMA, sparse backward, in the forward where the",
    ),
    "exact": ((9, 0), (torch.bfloat16, 8192, 128256, 4096, 0.0), "by TMA, exact backward, in the forward where the"),
    "exact, float16": ((8, 0), (torch.float16, 8192, 128256, 4096, 0.0), "by pointers, exact backward"),
    "small": ((9, 0), (torch.bfloat16, 1024, 50257, 768, 2.0**-4), "by TMA, exact backward"),
    "odd width": ((9, 0), (torch.bfloat16, 8192, 128256, 4098, 2.0**-4), "by pointers, sparse backward"),
    "Ampere": ((8, 0), (torch.float16, 8192, 128256, 4096, 2.0**-4), "by pointers, sparse backward"),
    "float32": ((9, 0), (torch.float32, 8192, 128256, 4096, 2.0**-4), "cuBLAS, Triton passes over blocks of logits"),
    "float64": ((9, 0), (torch.float64, 8192, 128256, 4096, 2.0**-4), "ATen on the GPU, exact gradients"),
}


@pytest.mark.parametrize(("capability", "problem", "text"), PLANS.values(), ids=PLANS)
def test_the_plan_of_a_gpu(monkeypatch, capability, problem, text):
    for module in (launch, sys.modules["cce_inductor.ops.cuda"]):
        monkeypatch.setattr(module, "device_properties", lambda device: (capability, 132))
    assert text in plan(torch.device("cuda"), *problem)
