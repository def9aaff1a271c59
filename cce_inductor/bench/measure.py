"""Measurements of one method: medians of times, peak memory above the inputs, errors of gradients against float64."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from .methods import Loss

Inputs = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor]
Step = Callable[..., object]
"""step(loss, *inputs): what is timed."""

CHUNK_ELEMENTS = 1 << 26  # logits that the reference holds at a time


def forward(loss: Loss, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    with torch.no_grad():
        loss(hidden, weight, target)


def forward_and_backward(loss: Loss, hidden: Tensor, weight: Tensor, target: Tensor) -> Gradients:
    grad_hidden, grad_weight = torch.autograd.grad(loss(hidden, weight, target), (hidden, weight))
    return grad_hidden, grad_weight


def milliseconds(step: Step, loss: Loss, inputs: Inputs, seconds: float) -> list[float]:
    """Times of single runs, for about as many seconds and at least three; the first run of all is not among them."""
    step(loss, *inputs)
    times: list[float] = []
    while len(times) < 3 or sum(times) < 1000 * seconds:
        times.append(_one_run(step, loss, inputs))
    return times


def _one_run(step: Step, loss: Loss, inputs: Inputs) -> float:
    if not inputs[0].is_cuda:
        begin = time.perf_counter()
        step(loss, *inputs)
        return 1000 * (time.perf_counter() - begin)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    step(loss, *inputs)
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def peak_mib(loss: Loss, inputs: Inputs) -> float | None:
    """Peak of the GPU memory that one forward and backward takes, gradients included; unknown on a CPU."""
    if not inputs[0].is_cuda:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward_and_backward(loss, *inputs)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@torch.no_grad()
def exact_gradients(hidden: Tensor, weight: Tensor, target: Tensor) -> Gradients:
    """The gradients of the mean cross-entropy in float64, a few rows at a time."""
    weight = weight.double()
    grad_hidden, grad_weight = torch.empty_like(hidden, dtype=torch.float64), torch.zeros_like(weight)
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    for start in range(0, hidden.shape[0], rows):
        chunk = slice(start, start + rows)
        h, t = hidden[chunk].double(), target[chunk]
        dz = torch.softmax(h @ weight.T, dim=1)
        dz[torch.arange(len(t), device=t.device), t] -= 1
        dz /= hidden.shape[0]
        grad_hidden[chunk] = dz @ weight
        grad_weight.addmm_(dz.T, h)
    return grad_hidden, grad_weight


def error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||."""
    return ((value.double() - reference).norm() / reference.norm()).item()
