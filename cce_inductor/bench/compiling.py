"""`--compile-time`: what the pass adds to the time of torch.compile, and what caches save in the next process.

The model is a small Llama: that of transformers where it is installed, else the one in `models.py`. Each compilation
runs in a process of its own; the first finds an empty cache of compiled code, the second what the first left.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .. import backend
from .heads import Budget, Row, attempt
from .models import LanguageModel, Sizes

SIZES = {"vocab": 32000, "width": 128, "heads": 4, "inner": 256, "kv_heads": 2, "seq_len": 256}
BATCH = 2
FEW, MANY = 2, 32  # layers; with many, only the pass is timed
METHODS: dict[str, dict[str, Any]] = {"compile": {}, "cce": {"backend": "cce"}}  # arguments of torch.compile


def run(names: list[str], device: str, budget: Budget) -> Iterator[Row]:
    """A row for each method with few layers, then one for the pass alone with many."""
    for name in names:
        yield {"method": name, "layers": FEW} | attempt(budget, _cold_and_warm, name, device)
    yield {"method": "pass alone", "layers": MANY} | attempt(budget, _pass_alone, device)


def _cold_and_warm(name: str, device: str) -> Row:
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (_in_a_process(cache, name, device) for _ in range(2))
    return {"cold_s": cold["seconds"], "warm_s": warm["seconds"]} | {
        key: cold[key] for key in ("pass_ms", "rewrites", "model")
    }


def _in_a_process(cache: str, name: str, device: str) -> Row:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, name, device], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def _pass_alone(device: str) -> Row:
    kind, step = _step(MANY, device, backend=_rewritten)
    return {"model": kind} | _timed(step)


def _rewritten(module: torch.fx.GraphModule, inputs: list) -> Callable:
    """A backend that rewrites and does not compile."""
    backend.rewrite_module(module, backend.Options())
    return module.forward


def _step(layers: int, device: str, **how: Any) -> tuple[str, Callable[[], None]]:
    """(which Llama, what compiles it and runs its forward and backward)."""
    torch.manual_seed(0)
    ids = torch.randint(SIZES["vocab"], (BATCH, SIZES["seq_len"]), device=device)
    with torch.device(device):
        kind, model = _transformers_model(layers) if find_spec("transformers") else _own_model(layers)

    def step() -> None:
        compiled = torch.compile(model, **how)  # imports Inductor, which any other backend than "inductor" does later
        loss: Tensor = compiled(ids, ids) if kind == "own" else compiled(input_ids=ids, labels=ids).loss
        loss.backward()

    return kind, step


def _own_model(layers: int) -> tuple[str, torch.nn.Module]:
    return "own", LanguageModel(Sizes(layers=layers, **SIZES))


def _transformers_model(layers: int) -> tuple[str, torch.nn.Module]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SIZES["vocab"],
        hidden_size=SIZES["width"],
        intermediate_size=SIZES["inner"],
        num_hidden_layers=layers,
        num_attention_heads=SIZES["heads"],
        num_key_value_heads=SIZES["kv_heads"],
        use_cache=False,
    )
    return "transformers", LlamaForCausalLM(config)


def _timed(step: Callable[[], None]) -> Row:
    """Of the first step: seconds, and milliseconds of it in the pass."""
    spent, original = 0.0, backend.rewrite_module

    def rewrite_module(*args: Any) -> Any:
        nonlocal spent
        gc.disable()  # the garbage of all that ran before, which may be collected anywhere, takes longer than the pass
        begin = time.thread_time()  # other processes do not count: with 100 ms, they would
        report = original(*args)
        spent += time.thread_time() - begin
        gc.enable()
        reports.append(report)
        return report

    reports: list = []
    with mock.patch.object(backend, "rewrite_module", rewrite_module):
        begin = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    rewrites = sum(len(report.rewritten) for report in reports)
    return {"seconds": seconds, "pass_ms": 1000 * spent, "rewrites": rewrites}


def line(row: Row) -> str:
    start = f"  Llama, {row['layers']:>2} layers  {row['method']:<12}"
    if "skipped" in row:
        return f"{start} skipped: {row['skipped']}"
    times = f" cold {row['cold_s']:.1f} s   warm {row['warm_s']:.1f} s" if "cold_s" in row else ""
    return f"{start}{times}   pass {row['pass_ms']:.0f} ms   {row['rewrites']} rewritten   ({row['model']})"


if __name__ == "__main__":
    _kind, _first = _step(FEW, sys.argv[2], **METHODS[sys.argv[1]])
    print(json.dumps(_timed(_first) | {"model": _kind}))
