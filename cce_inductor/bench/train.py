"""`--train`: whole training steps, head and all: tokens per second, peak memory, the largest batch that fits.

bfloat16 autocast over float32 parameters on a GPU, AdamW, random tokens. The batch dimension is compiled as dynamic,
for all methods alike, so that each compiles once for all the batches tried.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import cce_inductor

from . import measure
from .heads import Budget, Row, attempt
from .models import MODELS, LanguageModel, Sizes

METHODS: dict[str, dict[str, Any]] = {  # arguments of torch.compile
    "compile": {},
    "cce": {"backend": "cce"},
    "cce-approx": {"backend": "cce", "options": {"approximate_mass": 2.0**-3}},
}


def run(
    models: list[str], names: list[str], device: str, batch: int, most: int, seconds: float, budget: Budget
) -> Iterator[Row]:
    """A row for each model and method. batch: sequences a step for the timing; most: the largest batch to try."""
    for model in models:
        for name in names:
            sizes = MODELS[model]
            figures = attempt(budget, _measure, name, sizes, device, batch, most, seconds, budget)
            yield {"model": model, "method": name, "batch": batch, "seq_len": sizes.seq_len} | figures


def _measure(name: str, sizes: Sizes, device: str, batch: int, most: int, seconds: float, budget: Budget) -> Row:
    step = _step(name, sizes, device)
    begin = time.perf_counter()
    with cce_inductor.capture_reports() as reports:
        step(batch)
    _synchronize(device)
    first_seconds = time.perf_counter() - begin
    taken = measure.times(lambda: step(batch), device, seconds)
    peak = measure.peak_mib(lambda: step(batch), device)
    row = {
        "step_ms": taken.median,
        "step_spread_ms": taken.spread,
        "tokens_per_s": 1000 * batch * sizes.seq_len / taken.median,
        "step_mib": peak,
        "first_step_s": first_seconds,
        "rewrites": sum(len(report.rewritten) for report in reports),
    }
    if device == "cuda":
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return row | {"largest_batch": largest_batch(step, batch, most, device, budget)}


def _step(name: str, sizes: Sizes, device: str) -> Callable[[int], None]:
    torch.manual_seed(0)
    with torch.device(device):
        model = LanguageModel(sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compiled = torch.compile(model, **METHODS[name])

    def step(batch: int) -> None:
        tokens = torch.randint(sizes.vocab, (2, batch, sizes.seq_len), device=device)
        ids, targets = tokens.unbind(0)
        for tensor in (ids, targets):
            torch._dynamo.mark_dynamic(tensor, 0)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss: Tensor = compiled(ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def largest_batch(step: Callable[[int], None], fits: int, most: int, device: str, budget: Budget) -> int:
    """The largest batch up to `most` that runs, given one that does; to within an eighth. Memory is freed between."""
    too_large = most + 1
    while fits < most and too_large - fits > max(1, fits // 8):
        budget.check()
        trial = min(2 * fits, most) if too_large > most else (fits + too_large) // 2
        measure.free_memory()
        try:
            step(trial)
            _synchronize(device)
            fits = trial
        except torch.OutOfMemoryError:
            too_large = trial
    return fits


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def line(row: Row) -> str:
    start = f"  {row['model']:<12} {row['method']:<12} batch {row['batch']} x {row['seq_len']}"
    if "skipped" in row:
        return f"{start}  skipped: {row['skipped']}"
    peak = f"   peak {row['peak_mib']:.0f} MiB" if "peak_mib" in row else ""
    return (
        f"{start}  {row['step_ms']:.1f} ms ± {row['step_spread_ms']:.1f}   {row['tokens_per_s']:.0f} tokens/s"
        f"{peak}   largest batch {row['largest_batch']}"
    )
