"""`python -m cce_inductor doctor`: what is installed, what would run, and a small loss compiled and compared.

Every finding is a line. One that is not ok comes with what to do about it, and makes the exit code 1.
"""

import copy
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .backend import cce_backend
from .compat import cache_dir, cpp_compiler
from .ops.plan import plan
from .options import Options
from .report import capture_reports

OLDEST_TORCH = (2, 11)
OLDEST_GPU = (8, 0)
TYPICAL = (8192, 128256, 4096)  # rows, vocabulary and width of Llama 3 8B
ROWS, VOCAB, WIDTH = 256, 4096, 64
ROUNDINGS = 8  # units of rounding of the result that we may be further from it than eager PyTorch
TURNED_OFF = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")


@dataclass(frozen=True)
class Finding:
    """One line. advice: what to do; "" where nothing is to be done. ok: False where the package can't work so."""

    name: str
    text: str
    ok: bool = True
    advice: str = ""

    def __str__(self) -> str:
        line = f"{'  ' if self.ok else '! '}{self.name:<12} {self.text}"
        return f"{line}\n{'':<15}{self.advice}" if self.advice else line


def main(device_type: str | None = None) -> int:
    """Prints all findings as they are made; the exit code: 0 where every one is ok, else 1."""
    device = torch.device(device_type or ("cuda" if torch.cuda.is_available() else "cpu"))
    failed = 0
    for finding in findings(device):
        print(finding, flush=True)
        failed += not finding.ok
    print("all is well" if failed == 0 else f"{failed} of these (!) need attention")
    return int(failed > 0)


def findings(device: torch.device) -> Iterator[Finding]:
    yield from _versions()
    yield _device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return
    yield from _plans(device)
    yield _name()
    yield _compiler()
    yield from _environment()
    yield _cache()
    for dtype in (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16):
        yield _rewrite(device, dtype)


def _versions() -> Iterator[Finding]:
    try:
        package = importlib.metadata.version("cce_inductor")
    except importlib.metadata.PackageNotFoundError:
        package = "not installed"
    yield Finding("cce_inductor", f"{package}, in {Path(__file__).parent}")
    numbers = tuple(int(part) for part in torch.__version__.split(".")[:2])
    advice = "" if numbers >= OLDEST_TORCH else f"install torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer"
    yield Finding("torch", torch.__version__, not advice, advice)
    yield Finding("triton", triton.__version__)
    yield Finding("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")


def _device(device: torch.device) -> Finding:
    has_gpu = torch.cuda.is_available()
    advice = (
        "" if has_gpu or shutil.which("nvidia-smi") is None else "to use the GPU here install a CUDA build of torch"
    )
    if device.type == "cpu":
        return Finding("device", f"CPU, {torch.get_num_threads()} threads", advice=advice)
    if not has_gpu:
        return Finding("device", "torch finds no GPU", False, advice or "take --device cpu")
    major, minor = torch.cuda.get_device_capability(device)
    old = (major, minor) < OLDEST_GPU
    advice = f"the kernels need {OLDEST_GPU[0]}.{OLDEST_GPU[1]} or newer (Ampere)" if old else ""
    return Finding(
        "device", f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}", not old, advice
    )


def _plans(device: torch.device) -> Iterator[Finding]:
    """What would run for a loss of a usual size."""
    rows, vocab, width = TYPICAL
    for dtype in (torch.bfloat16, torch.float32):
        what = plan(device, dtype, *TYPICAL, Options().approximate_mass)
        yield Finding("plan", f"{str(dtype).removeprefix('torch.')} {rows} x {vocab}, width {width}: {what}")


def _name() -> Finding:
    if "cce" in torch.compiler.list_backends():
        return Finding("backend", 'torch.compile knows the name "cce"')
    advice = "install the package (pip install -e .), or give torch.compile backend=cce_inductor.cce_backend"
    return Finding("backend", 'torch.compile does not know the name "cce"', False, advice)


def _compiler() -> Finding:
    compiler = cpp_compiler()
    if compiler is not None:
        return Finding("compiler", compiler)
    advice = "install g++ or clang++, or set CXX to one (apt install g++, conda install cxx-compiler)"
    return Finding(
        "compiler", "no C++ compiler, which Inductor needs on a CPU and Triton for its launchers", False, advice
    )


def _environment() -> Iterator[Finding]:
    for name in TURNED_OFF:
        if os.environ.get(name, "0") not in ("", "0"):
            yield Finding("environment", f"{name} is set, so torch.compile compiles nothing", False, "unset it")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        advice = "unset it unless you debug a kernel"
        yield Finding(
            "environment", "TRITON_INTERPRET is set: Triton kernels run in its slow interpreter", advice=advice
        )


def _cache() -> Finding:
    path = Path(cache_dir())
    if os.access(path, os.W_OK):
        return Finding("cache", f"{path} (generated logit maps: {path / 'cce_inductor'})")
    return Finding("cache", f"{path} can't be written to", False, "set TORCHINDUCTOR_CACHE_DIR to a directory that can")


class _Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.head(hidden), target)


def _rewrite(device: torch.device, dtype: torch.dtype) -> Finding:
    """A small loss, compiled: is it rewritten, and are loss and gradients as good as eager PyTorch's?"""
    title = f"compiled a loss in {str(dtype).removeprefix('torch.')}: "
    generator = torch.Generator().manual_seed(0)
    model = _Tiny()
    torch.nn.init.normal_(model.head.weight, std=0.3, generator=generator)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    target = torch.randint(0, VOCAB, (ROWS,), generator=generator).to(device)
    model, hidden = model.to(device, dtype), hidden.to(device, dtype)
    options: Any = {"min_vocab": 0, "min_logits_bytes": 0, "min_flops": 0}
    try:
        with capture_reports() as reports:
            compiled = torch.compile(model, backend=cce_backend, options=options)
            ours = _loss_and_gradients(model, hidden, target, compiled)
    except Exception as error:
        cause = getattr(error, "inner_exception", error)  # of Dynamo's wrapper
        text = f"{title}{type(cause).__name__}: {cause}".splitlines()[0]
        return Finding("rewrite", text, False, "see the lines above, or report it")
    rewrites = sum(len(report.rewritten) for report in reports)
    if rewrites != 1:
        why = "; ".join(str(refusal) for report in reports for refusal in report.refused) or "nothing was compiled"
        return Finding(
            "rewrite", f"{title}{rewrites} rewrites where 1 should be: {why}", False, "see above, or report it"
        )
    errors, wrong = _errors(ours, model, hidden, target)
    text = ", ".join(f"{name} off by {mine:.1e} (eager {eagers:.1e})" for name, mine, eagers in errors)
    return Finding("rewrite", f"{title}1 of 1 rewritten; {text}", not wrong, "please report this" if wrong else "")


def _errors(
    ours: list[Tensor], model: torch.nn.Module, hidden: Tensor, target: Tensor
) -> tuple[list[tuple[str, float, float]], bool]:
    """(name, our relative error, eager's) against float64 for loss and gradients, and whether one is too large."""
    eager = _loss_and_gradients(model, hidden, target)
    exact = _loss_and_gradients(copy.deepcopy(model).double(), hidden.double(), target)
    errors = []
    for name, mine, theirs, right in zip(("loss", "d hidden", "d weight"), ours, eager, exact, strict=True):
        off, eagers = (((value.double() - right).norm() / right.norm()).item() for value in (mine, theirs))
        errors.append((name, off, eagers))
    allowed = ROUNDINGS * torch.finfo(hidden.dtype).eps
    return errors, not all(off <= eagers + allowed for _, off, eagers in errors)


def _loss_and_gradients(model: torch.nn.Module, hidden: Tensor, target: Tensor, run: Callable | None = None) -> list:
    """run: the compiled model, where it is to run in place of the model."""
    hidden = hidden.detach().clone().requires_grad_()
    loss = (model if run is None else run)(hidden, target)
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, *model.parameters()])]
