"""Measurements of one loss: times, peak memory above the inputs, errors of its gradients against float64."""

import ctypes
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..logit_map import LogitMap
from .methods import Loss, logit_map

Inputs = tuple[Tensor, Tensor, Tensor]

IGNORED = -100
CHUNK_ELEMENTS = 1 << 26  # logits that the reference holds at a time, in float64
MOST_RUNS = 100
ALIGNMENT = 64  # of the vocabulary in the bare product: an odd row length costs cuBLAS a factor of six
PEAK_RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def forward(loss: Loss, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return loss(*inputs)


def forward_and_backward(loss: Loss, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of hidden, gradient of weight), the gradients times `loss_scale` of their dtype."""
    value = loss(*inputs)
    scale = torch.full_like(value, loss_scale(inputs[0].dtype))
    grad_hidden, grad_weight = torch.autograd.grad(value, inputs[:2], scale)
    return value.detach(), grad_hidden, grad_weight


def loss_scale(dtype: torch.dtype) -> float:
    """What a loss is multiplied by: in float16 by about what a gradient scaler begins with, as gradients underflow."""
    return 2.0**15 if dtype == torch.float16 else 1.0


@dataclass(frozen=True)
class Times:
    """Of single runs: the median, and the distance from the first to the third quartile, both in ms."""

    median: float
    spread: float
    runs: int


def times(run: Callable[[], Any], device: str, seconds: float) -> Times:
    """For about as many seconds and at least three runs; two runs before are not counted."""
    run()
    estimate = _milliseconds(run, device, 1)[0]
    runs = max(3, min(MOST_RUNS, int(1000 * seconds / max(estimate, 1e-3))))
    measured = _milliseconds(run, device, runs)
    first, _, third = statistics.quantiles(measured, n=4)
    return Times(statistics.median(measured), third - first, runs)


def _milliseconds(run: Callable[[], Any], device: str, runs: int) -> list[float]:
    """On a GPU the runs are queued together, so that it never waits for the host, as in a training step."""
    if device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(runs):
            run()
            marks.append(time.perf_counter())
        return [1000 * (end - begin) for begin, end in itertools.pairwise(marks)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]


def peak_mib(run: Callable[[], Any], device: str) -> float | None:
    """The most memory that a run takes above what is held before it, its results included.

    On a CPU that is resident memory, which needs Linux's /proc; None elsewhere.
    """
    free_memory()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not PEAK_RESET.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, and would serve from it what is to be measured
    PEAK_RESET.write_text("5")  # proc(5): resets the "high water mark"
    before = _resident_kib("VmRSS")
    run()
    return max(0, _resident_kib("VmHWM") - before) / 2**10


def _resident_kib(field: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field))


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bare_product(hidden: Tensor, weight: Tensor, seconds: float) -> tuple[Times, float]:
    """(times, TFLOP/s) of the one matrix product that stores the logits in the dtype of the operands."""
    aligned = weight.detach()[: max(1, weight.shape[0] // ALIGNMENT) * ALIGNMENT]
    hidden = hidden.detach()
    logits = hidden.new_empty(hidden.shape[0], aligned.shape[0])
    measured = times(lambda: torch.mm(hidden, aligned.T, out=logits), hidden.device.type, seconds)
    return measured, teraflops(1, (hidden.shape[0], *aligned.shape), measured.median)


def teraflops(products: int, sizes: tuple[int, ...], milliseconds: float) -> float:
    """Of a dense computation: what is skipped counts as done."""
    rows, vocab, width = sizes
    return products * 2 * rows * vocab * width / milliseconds / 1e9


@dataclass(frozen=True)
class Reference:
    """Loss and gradients by float64 arithmetic; those of 16-bit inputs are kept in float32."""

    loss: float
    grad_hidden: Tensor
    grad_weight: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, hidden: Tensor, weight: Tensor, target: Tensor, softcap: float | None = None) -> "Reference":
        """A few rows at a time: no N x V tensor. softcap: c of c * tanh(logits / c)."""
        capped = LogitMap.parse(logit_map(softcap))
        kept = torch.float32 if hidden.dtype.itemsize == 2 else torch.float64
        wide = weight.double()
        counts = target != IGNORED
        number = counts.sum()
        grad_hidden, grad_weight = torch.empty_like(hidden, dtype=kept), torch.zeros_like(wide)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            h, scale = hidden[chunk].double(), counts[chunk, None].double() / number
            label = target[chunk, None].clamp_min(0)
            logits, slope = capped.value_and_derivative(h @ wide.T)
            log_p = torch.log_softmax(logits, 1)
            total -= (log_p.gather(1, label) * scale).sum()
            dz = log_p.exp_()
            dz.scatter_add_(1, label, dz.new_full((), -1.0).expand(label.shape))
            dz *= scale
            if slope is not None:
                dz *= slope
            grad_hidden[chunk] = dz @ wide
            grad_weight.addmm_(dz.T, h)
        return cls(total.item(), grad_hidden, grad_weight.to(kept))

    def errors(self, loss: Tensor, grad_hidden: Tensor, grad_weight: Tensor) -> dict[str, float]:
        """||g - r|| / ||r|| of both gradients, the median of the same over the rows of the weight, and the loss's.

        The gradients are those that `forward_and_backward` gives.
        """
        scale = loss_scale(grad_hidden.dtype)
        hidden = grad_hidden.to(self.grad_hidden.dtype) / scale
        chunks = zip(grad_weight.split(1 << 16), self.grad_weight.split(1 << 16), strict=True)
        norms = [((g.to(r.dtype) / scale - r).norm(dim=1), r.norm(dim=1)) for g, r in chunks]
        error, norm = (torch.cat(parts) for parts in zip(*norms, strict=True))
        counted = norm > 0
        return {
            "loss_error": abs(loss.item() - self.loss) / abs(self.loss),
            "hidden_error": ((hidden - self.grad_hidden).norm() / self.grad_hidden.norm()).item(),
            "weight_error": (error.norm() / norm.norm()).item(),
            "weight_row_error": (error[counted] / norm[counted]).median().item(),
        }
