"""Train a small GPT three times: eager, torch.compile with Inductor, torch.compile with backend="cce".

    python examples/train_gpt.py

The data is the Python standard library, cut into tokens by a byte-level BPE trained on the spot. The three
runs differ in one argument of `torch.compile` and in nothing else: same initial weights, same batches in the
same order. Each has a process of its own and starts with an empty compiler cache, so that its peak memory and
its compile time are its own.

Prints a table; writes train_gpt.png and train_gpt.json to --output (default: examples/output). On a CPU with
two cores the defaults take about three minutes. On a GPU, the model is larger and runs in bfloat16.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

METHODS = {
    "eager": lambda model: model,
    "inductor": lambda model: torch.compile(model),
    "cce": lambda model: torch.compile(model, backend="cce"),
}

# Used where the command line says nothing. Logits in float32 take batch * seq_len * vocab * 4 bytes: 64 MiB
# on a CPU, 2 GiB on a GPU.
SIZES = {
    "cpu": {"batch": 4, "seq_len": 256, "vocab": 16384, "layers": 2, "width": 128},
    "cuda": {"batch": 16, "seq_len": 1024, "vocab": 32768, "layers": 8, "width": 1024},
}
HEAD_WIDTH = 64
TEXT_LIMIT = 8_000_000  # characters: the tokenizer trains on them in two seconds
LEARNING_RATE = 1e-3
LAST = 20  # the final loss is the mean of this many
MIB = 2**20

# data ---------------------------------------------------------------------------------------------


def standard_library(limit: int = TEXT_LIMIT) -> list[str]:
    """Source files of the running Python, in a fixed order, up to so many characters."""
    root = Path(sysconfig.get_paths()["stdlib"])
    not_prose = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
    texts, left = [], limit
    for path in sorted(root.rglob("*.py")):
        if left > 0 and not not_prose & set(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="replace")[:left]
            texts.append(text)
            left -= len(text)
    return texts


def tokenize(texts: list[str], vocab: int) -> np.ndarray:  # [tokens], uint16
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(texts)])


# model --------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, D]
        B, S, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, S, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, S, D / heads]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, S, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """The usual GPT. Its loss is written the usual way too, through logits of [B * S, V]."""

    def __init__(self, vocab: int, seq_len: int, layers: int, width: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(seq_len, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # GPT-2: what adds to the residual stream starts smaller, the more often it is added to.
                shrink = math.sqrt(2 * layers) if name.endswith(("proj.weight", "down.weight")) else 1
                nn.init.normal_(p, std=0.02 / shrink)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:  # both [B, S] -> []
        x = self.tokens(ids) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


# memory -------------------------------------------------------------------------------------------


class Memory:
    """Bytes this process holds, and the most it has held since `reset`.

    On a CPU that is resident memory, which includes Python, PyTorch and the compiler. To tell the methods
    apart the peak is taken anew for every step, which needs Linux's /proc. Where that is missing, `per_step`
    is false and there is only getrusage's peak of the whole process (even that starts from its parent's).
    """

    RESET = Path("/proc/self/clear_refs")

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.per_step = self.cuda or self.RESET.exists()

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self.per_step:
            self.RESET.write_text("5")  # proc(5): resets the "high water mark"

    def held(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else self._resident("VmRSS")

    def peak(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        if self.per_step:
            return self._resident("VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    @staticmethod
    def _resident(field: str) -> int:
        [line] = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) * 1024


# one method ---------------------------------------------------------------------------------------


@dataclass
class Result:
    method: str
    losses: list[float]
    step_seconds: list[float]  # without the first, which compiles
    compile_seconds: float  # what the first step took longer
    peak: int  # bytes: the most the process ever held
    step_memory: int | None  # bytes: the peak in a step less what was held before it; of steps the median
    rewrites: int

    @property
    def final_loss(self) -> float:
        return statistics.fmean(self.losses[-LAST:])

    @property
    def step_ms(self) -> float:
        return statistics.median(self.step_seconds) * 1e3


def train(method: str, args: argparse.Namespace) -> Result:
    device = args.device
    memory = Memory(device)
    tokens = torch.from_numpy(np.load(Path(args.scratch, "tokens.npy")).astype(np.int64))
    torch.manual_seed(args.seed)
    model = GPT(args.vocab, args.seq_len, args.layers, args.width).to(device)
    step_model = METHODS[method](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 30))
    batches = torch.Generator().manual_seed(args.seed)

    def step() -> float:
        starts = torch.randint(len(tokens) - args.seq_len, (args.batch, 1), generator=batches)
        window = tokens[starts + torch.arange(args.seq_len + 1)].to(device)  # [B, S + 1]
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            loss = step_model(window[:, :-1], window[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        return loss.item()  # waits for all of the above, on a GPU too

    losses, seconds, step_memory, rewrites, peak = [], [], [], 0, memory.peak()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(f"{method:>8}  compiling", total=args.steps)
        for i in range(args.steps):
            memory.reset()
            held = memory.held() if memory.per_step else 0
            begin = time.perf_counter()
            if i == 0 and method == "cce":
                loss, rewrites = first_step_with_reports(step)
            else:
                loss = step()
            seconds.append(time.perf_counter() - begin)
            losses.append(loss)
            peak = max(peak, memory.peak())
            step_memory.append(memory.peak() - held)
            progress.update(task, advance=1, description=f"{method:>8}  loss {loss:.3f}")

    return Result(
        method=method,
        losses=losses,
        step_seconds=seconds[1:],
        compile_seconds=seconds[0] - statistics.median(seconds[1:]),
        peak=peak,
        step_memory=int(statistics.median(step_memory[1:])) if memory.per_step else None,
        rewrites=rewrites,
    )


def first_step_with_reports(step) -> tuple[float, int]:
    """The loss of the first step, and how many sites its compilation rewrote: at least one, or we stop."""
    import cce_inductor

    with cce_inductor.capture_reports() as reports:
        loss = step()
    rewrites = sum(len(report.rewritten) for report in reports)
    if rewrites == 0:
        reasons = [f"  {refusal}" for report in reports for refusal in report.refused] or ["  no site found"]
        sys.exit("\n".join(["backend='cce' rewrote nothing in this model:", *reasons]))
    return loss, rewrites


# all of them --------------------------------------------------------------------------------------


def run_in_fresh_process(method: str, scratch: Path) -> Result:
    command = [sys.executable, __file__, *sys.argv[1:], "--run", method, "--scratch", str(scratch)]
    caches = {f"{tool}_CACHE_DIR": str(scratch / f"{method}-{tool}") for tool in ("TORCHINDUCTOR", "TRITON")}
    environment = caches | os.environ  # a cache that the user has set wins, at the price of a true compile time
    if subprocess.run(command, env=environment).returncode != 0:
        sys.exit(f"the run of {method!r} failed: see above")
    return Result(**json.loads((scratch / f"{method}.json").read_text()))


def largest_difference(result: Result, results: list[Result]) -> float | None:
    """From eager's loss, over all steps; None where there is nothing to compare."""
    for eager in results:
        if eager.method == "eager" and result is not eager:
            return max(abs(a - b) for a, b in zip(result.losses, eager.losses, strict=True))
    return None


def table_of(results: list[Result], title: str) -> Table:
    caption = (
        f"final loss: mean of the last {LAST} steps. difference: from eager's loss,\n"
        "largest of all steps. step's: peak memory in a step, less what was held\n"
        "before it (median)."
    )
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("method")
    headings = "final\nloss", "differ-\nence", "step\n(ms)", "compile\n(s)", "peak\n(MiB)", "step's\n(MiB)"
    for heading in (*headings, "rewrites"):
        table.add_column(heading, justify="right")
    for r in results:
        difference = largest_difference(r, results)
        table.add_row(
            r.method,
            f"{r.final_loss:.4f}",
            "" if difference is None else f"{difference:.1e}",
            f"{r.step_ms:.1f}",
            "" if r.method == "eager" else f"{r.compile_seconds:.1f}",
            f"{r.peak / MIB:,.0f}",
            "unknown" if r.step_memory is None else f"{r.step_memory / MIB:,.0f}",
            str(r.rewrites) if r.method == "cce" else "",
        )
    return table


def draw(results: list[Result], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"eager": "#9aa0a6", "inductor": "#e07b39", "cce": "#1f6fb4"}
    widths = {"eager": 4.5, "inductor": 2.5, "cce": 0.8}  # the curves lie on each other: let all be seen
    names = [r.method for r in results]
    fill = [colors[r.method] for r in results]
    figure, (curves, speed, memory) = plt.subplots(
        1, 3, figsize=(13, 4.2), width_ratios=(2, 1, 1), layout="constrained"
    )
    figure.suptitle(title, fontsize="medium", color="dimgray")

    for r in results:
        curves.plot(r.losses, color=colors[r.method], linewidth=widths[r.method], label=r.method)
    curves.set(title="training loss", xlabel="step", ylabel="cross-entropy")
    curves.grid(alpha=0.3)
    curves.legend(frameon=False)

    speed.bar_label(speed.bar(names, [r.step_ms for r in results], color=fill), fmt="%.0f", padding=2)
    speed.set(title="median step time", ylabel="ms")

    if all(r.step_memory is not None for r in results):
        bars = memory.bar(names, [r.step_memory / MIB for r in results], color=fill)
        memory.set(title="memory of a step", ylabel="MiB above what was held before it")
    else:
        bars = memory.bar(names, [r.peak / MIB for r in results], color=fill)
        memory.set(title="peak memory of the process", ylabel="MiB")
    memory.bar_label(bars, fmt="{:,.0f}", padding=2)

    for axes in (curves, speed, memory):
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (speed, memory):
        axes.margins(y=0.1)
    figure.savefig(path, dpi=150)


def add_sizes(parser: argparse.ArgumentParser, sizes: dict[str, dict[str, int]]) -> None:
    """An argument for each size, whose default depends on the device."""
    for name in sizes["cpu"]:
        defaults = ", ".join(f"{sizes[device][name]} on {device}" for device in sizes)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {defaults}")


def fill_in_sizes(parser: argparse.ArgumentParser, args: argparse.Namespace, sizes: dict[str, dict[str, int]]) -> None:
    """The defaults of the sizes that were not given; ends the program where the model can't have them."""
    for name, size in sizes[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, size)
    if not 256 <= args.vocab <= 65536:
        parser.error("--vocab must be 256 to 65536: every byte has a token, and tokens are kept as uint16")
    if args.width % HEAD_WIDTH:
        parser.error(f"--width must be a multiple of {HEAD_WIDTH}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated (default: %(default)s)")
    add_sizes(parser, SIZES)
    parser.add_argument("--characters", type=int, default=TEXT_LIMIT, help="of the text (default: %(default)s)")
    parser.add_argument("--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    parser.add_argument("--seed", type=int, default=0)
    for internal in ("--run", "--scratch"):  # how this script calls itself for each method
        parser.add_argument(internal, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.methods = args.methods.split(",")
    fill_in_sizes(parser, args, SIZES)
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"unknown methods {', '.join(sorted(unknown))}: choose from {', '.join(METHODS)}")
    if args.steps < 3:
        parser.error("--steps must be 3 or more: the first one compiles and is not timed")
    return args


def main() -> None:
    args = parse_arguments()
    if args.run:
        result = train(args.run, args)
        Path(args.scratch, f"{args.run}.json").write_text(json.dumps(asdict(result)))
        return

    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        with console.status("training a tokenizer on the standard library"):
            tokens = tokenize(standard_library(args.characters), args.vocab)
            np.save(Path(scratch, "tokens.npy"), tokens)
        console.print(f"{len(tokens):,} tokens of the standard library, vocabulary {args.vocab:,}")
        results = [run_in_fresh_process(method, Path(scratch)) for method in args.methods]

    cuda = args.device == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    title = (
        f"GPT of {args.layers} layers, width {args.width}, vocabulary {args.vocab:,}\n"
        f"{args.batch} x {args.seq_len} tokens a step; {where}, torch {torch.__version__}"
    )
    console.print(table_of(results, title))
    picture, details = args.output / "train_gpt.png", args.output / "train_gpt.json"
    draw(results, title.replace("\n", "; "), picture)
    derived = [{"final_loss": r.final_loss, "difference": largest_difference(r, results)} for r in results]
    details.write_text(json.dumps([asdict(r) | d for r, d in zip(results, derived, strict=True)], indent=1))
    console.print(f"wrote {picture} and {details.name}")


if __name__ == "__main__":
    main()
