"""A training step of Hugging Face's Trainer, with Inductor and with cce_inductor: time and peak memory.

    python examples/hf_trainer_step.py              a Qwen 2 of half a billion parameters, random weights (one GPU)
    python examples/hf_trainer_step.py --size tiny  to try it on a CPU

The Trainer is used as anybody uses it, with `bf16=True` and `torch_compile=True`; for cce_inductor one line comes
before, `cce_inductor.enable()`. Each method runs in a process of its own, on the same weights and random tokens.
Needs transformers and accelerate; nothing is downloaded.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import cce_inductor

METHODS = {
    "eager": "torch_compile=False",
    "inductor": "torch_compile=True",
    "cce": "cce_inductor.enable() and torch_compile=True",
}
SIZES = {  # of transformers.Qwen2Config; "0.5b" is Qwen 2.5 0.5B
    "0.5b": {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 4160, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
    },
}  # fmt: skip
WARMUP = 3  # steps that are not measured: they compile
FIGURES = "figures: "  # begins the line in which a process gives its figures


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="0.5b" if cuda else "tiny")
    parser.add_argument("--methods", default="inductor,cce", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=2048 if cuda else 128, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=20, help="that are measured")
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32", help="the dtype of the model")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that one method may take")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    arguments.methods = arguments.methods.split(",")
    if unknown := set(arguments.methods) - METHODS.keys():
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
    return arguments


# ------------------------------------------------------------------------------------------------- one method, measured


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import transformers

    cuda = torch.cuda.is_available()
    marks: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
            if len(marks) == WARMUP and cuda:
                torch.cuda.reset_peak_memory_stats()

    torch.manual_seed(0)
    sizes = SIZES[arguments.size]
    with torch.device("cuda" if cuda else "cpu"):
        config = transformers.Qwen2Config(**sizes, max_position_embeddings=arguments.length)
        model = transformers.Qwen2ForCausalLM(config).to(getattr(torch, arguments.weights))
    steps = WARMUP + arguments.steps
    tokens = torch.randint(sizes["vocab_size"], (steps * arguments.batch, arguments.length))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if arguments.only == "cce":
            stack.enter_context(cce_inductor.enable())
        reports = stack.enter_context(cce_inductor.capture_reports())
        how = transformers.TrainingArguments(
            folder,
            torch_compile=arguments.only != "eager",
            bf16=True,
            use_cpu=not cuda,
            max_steps=steps,
            per_device_train_batch_size=arguments.batch,
            optim="adamw_torch_fused" if cuda else "adamw_torch",
            learning_rate=1e-4,
            logging_steps=steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data = [{"input_ids": row, "labels": row} for row in tokens]
        begin = time.perf_counter()
        result = transformers.Trainer(model, how, train_dataset=data, callbacks=[Clock()]).train()
    taken = [1000 * (end - start) for start, end in zip(marks[WARMUP - 1 :], marks[WARMUP:], strict=False)]
    median = statistics.median(taken)
    return {
        "step_ms": median,
        "fastest_ms": min(taken),
        "slowest_ms": max(taken),
        "tokens_per_s": 1000 * arguments.batch * arguments.length / median,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
        "first_step_s": marks[0] - begin,
        "loss": result.training_loss,
        "rewrites": sum(len(report.rewritten) for report in reports),
        "refusals": [str(refusal) for report in reports for refusal in report.refused],
    }


# -------------------------------------------------------------------------------------------------------- all of them


def run(method: str, limit: float) -> dict[str, Any]:
    """The figures of a method from a process of its own, or the reason why there are none."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--only={method}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with more, the Trainer splits the batch among them
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {limit:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(FIGURES)]
    if done.returncode or not lines:
        errors = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": next((line for line in reversed(errors) if "Error" in line), errors[-1])[:300]}
    return json.loads(lines[-1].removeprefix(FIGURES))


def table(rows: list[dict[str, Any]]) -> str:
    columns = {
        "method": "{}", "step_ms": "{:.1f}", "fastest_ms": "{:.1f}", "slowest_ms": "{:.1f}", "tokens_per_s": "{:.0f}",
        "peak_mib": "{:.0f}", "first_step_s": "{:.1f}", "loss": "{:.4f}", "rewrites": "{}",
    }  # fmt: skip
    cells = [list(columns)]
    for row in rows:
        if "failed" not in row:
            cells.append(["-" if row[name] is None else form.format(row[name]) for name, form in columns.items()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines += [f"{row['method']} failed: {row['failed']}" for row in rows if "failed" in row]
    lines += [f"{row['method']} left alone: {refusal}" for row in rows for refusal in row.get("refusals", ())]
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    if arguments.only:
        print(FIGURES + json.dumps(measure(arguments)), flush=True)
        return
    import accelerate
    import transformers

    about = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "model": f"Qwen2ForCausalLM {arguments.size}, {arguments.weights} weights, bf16=True",
        "batch": f"{arguments.batch} x {arguments.length}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    rows = []
    for method in arguments.methods:
        print(f"{method}: {METHODS[method]} ...", flush=True)
        rows.append({"method": method} | run(method, arguments.limit))
        print(table(rows), flush=True)  # what has been measured so far, should this be cut short
        if arguments.json:
            arguments.json.write_text(json.dumps({"about": about, "results": rows}, indent=1))
    if any("failed" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
