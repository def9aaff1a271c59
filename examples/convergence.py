"""Does an approximate backward train as well as an exact one? A small GPT, pre-trained from scratch, several ways.

    python examples/convergence.py --minutes 8

The runs differ only in how the gradient of the loss is computed:

    exact      approximate_mass=0
    default    what the package does by itself
    2^-3       approximate_mass=2**-3: each row approximates an eighth of its probability
    dropped    the same, but what is skipped is lost instead of put back: an experiment, not an option

Each is run with the same seeds: a seed fixes the initial weights and the order of the batches. The text is the
Python standard library and the source and documentation of the installed packages. One block of it in twenty is held
out. Rare tokens are the least frequent ones of the training text that together make up a tenth of the held-out text: a
drop of their loss is what a norm of a gradient does not show, as optimizers like Adam amplify their small gradients.

An approximate way holds up where its mean loss over the seeds is at most the largest of exact's, overall and on
rare tokens. Prints a table and verdicts; writes convergence.json (after each run) and convergence.png to --output.
A GPU is needed for anything to be approximate: elsewhere every way is exact. --tokens FILE keeps the tokenized text,
so that it can be made on another machine.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from train_gpt import GPT, add_sizes, fill_in_sizes, standard_library, tokenize

import cce_inductor

WAYS: dict[str, dict[str, Any]] = {
    "exact": {"approximate_mass": 0.0},
    "default": {},
    "2^-3": {"approximate_mass": 2.0**-3},
    "dropped": {"approximate_mass": 2.0**-3},
}
SIZES = {
    "cpu": {"batch": 4, "seq_len": 256, "vocab": 4096, "layers": 1, "width": 64, "steps": 40},
    "cuda": {"batch": 64, "seq_len": 512, "vocab": 32768, "layers": 4, "width": 768, "steps": 900},
}
TEXT_LIMIT = {"cpu": 2_000_000, "cuda": 80_000_000}  # characters
SUFFIXES = {".py", ".md", ".rst", ".txt", ".h"}
BLOCK, HELD_OUT = 8192, 20  # tokens of a block; every twentieth is for validation
MOST_HELD_OUT = 1 << 18  # tokens
RARE_SHARE = 0.1
LEARNING_RATE = 1e-3
WARMUP = 0.05  # of the steps
CHECKS = 10  # validations of a run, the last on all held-out text
COMPILE_STEPS, TIMED_STEPS = 2, 10

# text ---------------------------------------------------------------------------------------------


def installed_text(limit: int) -> list[str]:
    """The standard library, then text files of the installed packages, in a fixed order, up to `limit` characters."""
    texts = standard_library()
    left = limit - sum(map(len, texts))
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*")):
        if left <= 0:
            break
        if path.suffix in SUFFIXES and path.is_file():
            texts.append(path.read_text(encoding="utf-8", errors="replace")[: min(left, 100_000)])
            left -= len(texts[-1])
    return texts


def load_tokens(path: Path | None, vocab: int, limit: int) -> Tensor:  # [tokens], int64
    if path and path.exists():
        tokens = np.load(path)
    else:
        tokens = tokenize(installed_text(limit), vocab)
        if path:
            np.save(path, tokens)
    if tokens.max() >= vocab:
        sys.exit(f"{path} holds tokens of a larger vocabulary than {vocab}")
    return torch.from_numpy(tokens.astype(np.int64))


@dataclass(frozen=True)
class Text:
    train: Tensor  # [tokens]
    held_out: Tensor  # [windows, S + 1]
    rare: Tensor  # [V], bool

    @classmethod
    def of(cls, tokens: Tensor, vocab: int, seq_len: int, device: str) -> "Text":
        blocks = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
        held_out = torch.arange(len(blocks)) % HELD_OUT == HELD_OUT - 1
        train, rest = blocks[~held_out].flatten(), blocks[held_out].flatten()[:MOST_HELD_OUT]
        windows = rest[: len(rest) // (seq_len + 1) * (seq_len + 1)].view(-1, seq_len + 1)
        return cls(train.to(device), windows.to(device), rare_tokens(train, windows, vocab).to(device))


def rare_tokens(train: Tensor, held_out: Tensor, vocab: int) -> Tensor:  # [V], bool
    """The least frequent tokens in `train` that make up at most RARE_SHARE of `held_out`."""
    order = torch.bincount(train, minlength=vocab).argsort(stable=True)
    share = torch.bincount(held_out.flatten(), minlength=vocab)[order].cumsum(0) / held_out.numel()
    rare = torch.zeros(vocab, dtype=torch.bool)
    rare[order[share <= RARE_SHARE]] = True
    return rare


# one run ------------------------------------------------------------------------------------------


@dataclass
class Run:
    way: str
    seed: int
    steps: list[int]  # at which the curve was taken
    curve: list[float]  # validation loss on a part of the held-out text
    loss: float  # on all of it
    rare_loss: float  # on its rare tokens
    seconds: float
    active: tuple[float, float] | None  # shares of pairs and blocks that the last backward computed, where known


def dropping() -> contextlib.AbstractContextManager:
    """Where this is on, what a backward skips is not compensated for. For this experiment alone."""
    from cce_inductor.ops import sparse

    return sparse.without_compensation()


class Trainer:
    """Runs of one size on one text."""

    def __init__(self, args: argparse.Namespace, text: Text) -> None:
        self.args, self.text = args, text
        self.cuda = args.device == "cuda"

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.args.device, torch.bfloat16, enabled=self.cuda)

    def model(self, way: str, seed: int) -> tuple[GPT, Any]:
        args = self.args
        torch.manual_seed(seed)
        model = GPT(args.vocab, args.seq_len, args.layers, args.width).to(args.device)
        options = {"on_refusal": "raise", **WAYS[way]}
        return model, torch.compile(model, backend=cce_inductor.cce_backend, options=options)

    def steps(self, model: GPT, compiled: Any, seed: int, number: int) -> Iterator[int]:
        """Trains; yields the number of steps done, after each."""
        args = self.args
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
        warmup = max(1, int(WARMUP * number))

        def rate(i: int) -> float:
            return min((i + 1) / warmup, max(0.02, 1 - i / number))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        batches = torch.Generator(args.device).manual_seed(seed)
        window = torch.arange(args.seq_len + 1, device=args.device)
        for i in range(number):
            starts = torch.randint(
                len(self.text.train) - args.seq_len, (args.batch, 1), generator=batches, device=args.device
            )
            ids = self.text.train[starts + window]  # [B, S + 1]
            with self.autocast():
                loss = compiled(ids[:, :-1], ids[:, 1:].contiguous())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            yield i + 1

    def run(self, way: str, seed: int, number: int) -> Run:
        torch.compiler.reset()
        begin = time.perf_counter()
        model, compiled = self.model(way, seed)
        steps, curve = [], []
        with dropping() if way == "dropped" else contextlib.nullcontext():
            for done in self.steps(model, compiled, seed, number):
                if done % max(1, number // CHECKS) == 0:
                    steps.append(done)
                    curve.append(self.validate(model, len(self.text.held_out) // 8 + 1)[0])
        loss, rare_loss = self.validate(model, len(self.text.held_out))
        seconds = time.perf_counter() - begin
        return Run(way, seed, steps, curve, loss, rare_loss, seconds, self.activity(model, way))

    def hidden(self, model: GPT, ids: Tensor) -> Tensor:  # [B, S] -> [B * S, D]
        x = model.tokens(ids) + model.positions.weight
        for block in model.blocks:
            x = block(x)
        return model.norm(x).flatten(0, 1)

    @torch.no_grad()
    def validate(self, model: GPT, windows: int) -> tuple[float, float]:
        """(loss, loss on rare tokens) of the first held-out windows; exact, logits in float32, a few at a time."""
        total, rare_total, rare_count, count = (torch.zeros((), device=self.args.device) for _ in range(4))
        for part in self.text.held_out[:windows].split(max(1, 8192 // self.args.seq_len)):
            targets = part[:, 1:].flatten()
            with self.autocast():
                logits = F.linear(self.hidden(model, part[:, :-1]), model.head.weight)
            losses = F.cross_entropy(logits.float(), targets, reduction="none")
            rare = self.text.rare[targets]
            total += losses.sum()
            rare_total += losses[rare].sum()
            rare_count += rare.sum()
            count += targets.numel()
        return (total / count).item(), (rare_total / rare_count.clamp_min(1)).item()

    @torch.no_grad()
    def activity(self, model: GPT, way: str) -> tuple[float, float] | None:
        """What a backward at the end of the training computes, where the package can tell."""
        from cce_inductor.ops.activity import activity

        part = self.text.held_out[: self.args.batch]
        with self.autocast():
            hidden = self.hidden(model, part[:, :-1])
        inputs = (hidden.bfloat16(), model.head.weight.bfloat16(), part[:, 1:].flatten())
        return activity(*inputs, WAYS[way].get("approximate_mass"))


def affordable_steps(trainer: Trainer, ways: int, runs: int) -> int:
    """--steps, or fewer where --minutes don't reach. Two models are timed for that, with a cold and a warm cache."""
    args = trainer.args
    if math.isinf(args.minutes):
        return args.steps
    cold, _ = _start_and_step(trainer)
    warm, step = _start_and_step(trainer)
    left = 60 * args.minutes - ways * cold - runs * warm
    return max(CHECKS, min(args.steps, int(left / runs / step)))


def _start_and_step(trainer: Trainer) -> tuple[float, float]:
    """Seconds that a run takes beside its steps, and that a step takes."""
    torch.compiler.reset()
    begin = time.perf_counter()
    model, compiled = trainer.model("exact", 0)
    for done in trainer.steps(model, compiled, 0, COMPILE_STEPS + TIMED_STEPS):
        if done == COMPILE_STEPS:
            _wait(trainer.args.device)
            compiled_at = time.perf_counter()
    _wait(trainer.args.device)
    stepped_at = time.perf_counter()
    trainer.validate(model, 2 * len(trainer.text.held_out))
    return time.perf_counter() - begin - (stepped_at - compiled_at), (stepped_at - compiled_at) / TIMED_STEPS


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# the answer ---------------------------------------------------------------------------------------


def verdicts(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """For each way, overall and on rare tokens: mean, range over seeds, and whether it is within exact's spread."""
    answer: dict[str, dict[str, Any]] = {}
    exact = {key: [getattr(r, key) for r in runs if r.way == "exact"] for key in ("loss", "rare_loss")}
    for way in dict.fromkeys(r.way for r in runs):
        answer[way] = {}
        for key, exacts in exact.items():
            losses = [getattr(r, key) for r in runs if r.way == way]
            mean = statistics.fmean(losses)
            answer[way][key] = {"mean": mean, "least": min(losses), "most": max(losses)}
            if exacts and way != "exact":
                answer[way][key] |= {"holds": mean <= max(exacts), "difference": mean - statistics.fmean(exacts)}
    return answer


def table_of(runs: list[Run], title: str) -> Table:
    seeds = sorted({r.seed for r in runs})
    table = Table(title=title, title_justify="left")
    table.add_column("way")
    for heading in ("loss", "rare tokens"):
        for column in (*(f"{heading}\nseed {seed}" for seed in seeds), f"{heading}\nmean"):
            table.add_column(column, justify="right")
    table.add_column("active\npairs, blocks", justify="right")
    for way, answer in verdicts(runs).items():
        cells = []
        for key in ("loss", "rare_loss"):
            by_seed = {r.seed: getattr(r, key) for r in runs if r.way == way}
            cells += [f"{by_seed[seed]:.4f}" if seed in by_seed else "" for seed in seeds]
            cells.append(f"{answer[key]['mean']:.4f}")
        active = next((r.active for r in runs if r.way == way and r.active), None)
        table.add_row(way, *cells, "" if active is None else f"{active[0]:.3f}, {active[1]:.3f}")
    return table


def sentences(runs: list[Run]) -> list[str]:
    answers = verdicts(runs)
    lines = []
    for key, name in (("loss", "all tokens"), ("rare_loss", "rare tokens")):
        if exact := answers.get("exact"):
            spread = exact[key]["most"] - exact[key]["least"]
            lines.append(f"{name}: seeds of exact spread over {spread:.4f}")
        for way, answer in answers.items():
            if "holds" in answer[key]:
                verdict = "within the spread of exact, or below" if answer[key]["holds"] else "WORSE than exact"
                lines.append(f"{name}: {way} differs by {answer[key]['difference']:+.4f}: {verdict}")
    return lines


def draw(runs: list[Run], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = dict(zip(WAYS, ("#9aa0a6", "#1f6fb4", "#2a9d5c", "#d1495b"), strict=True))
    figure, (curves, *bars) = plt.subplots(1, 3, figsize=(13, 4.2), width_ratios=(2, 1, 1), layout="constrained")
    figure.suptitle(title, fontsize="medium", color="dimgray")
    ways = list(dict.fromkeys(r.way for r in runs))
    for way in ways:
        mine = [r for r in runs if r.way == way]
        for i, r in enumerate(mine):
            curves.plot(r.steps, r.curve, color=colors[way], linewidth=1, alpha=0.8, label=way if i == 0 else None)
        for axes, key in zip(bars, ("loss", "rare_loss"), strict=True):
            axes.plot([ways.index(way)] * len(mine), [getattr(r, key) for r in mine], "o", color=colors[way], alpha=0.8)
    curves.set(title="validation loss, a line a seed", xlabel="step", ylabel="cross-entropy")
    curves.legend(frameon=False)
    for axes, name in zip(bars, ("all held-out tokens", "rare tokens"), strict=True):
        axes.set(title=name, xticks=range(len(ways)), xticklabels=ways)
        axes.margins(x=0.2)
    for axes in (curves, *bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="for all runs: fewer steps where they don't reach; inf for no limit"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS), help="comma-separated (default: %(default)s)")
    add_sizes(parser, SIZES)
    parser.add_argument("--tokens", type=Path, help="a .npy file to keep the tokenized text in, or to take it from")
    parser.add_argument("--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    args = parser.parse_args()
    fill_in_sizes(parser, args, SIZES)
    args.ways = args.ways.split(",")
    if unknown := set(args.ways) - set(WAYS):
        parser.error(f"unknown ways {', '.join(sorted(unknown))}: choose from {', '.join(WAYS)}")
    return args


def main() -> None:
    args = parse_arguments()
    console = Console(width=120)
    args.output.mkdir(parents=True, exist_ok=True)
    tokens = load_tokens(args.tokens, args.vocab, TEXT_LIMIT[args.device])
    text = Text.of(tokens, args.vocab, args.seq_len, args.device)
    console.print(f"{len(text.train):,} tokens to train on, {text.held_out.numel():,} held out, "
                  f"{int(text.rare.sum()):,} of {args.vocab:,} tokens are rare")  # fmt: skip
    trainer = Trainer(args, text)
    end = time.monotonic() + 60 * args.minutes
    number = affordable_steps(trainer, len(args.ways), len(args.ways) * args.seeds)
    title = (
        f"GPT of {args.layers} layers, width {args.width}, vocabulary {args.vocab:,}; {number} steps of "
        f"{args.batch} x {args.seq_len} tokens; torch {torch.__version__}"
    )
    runs: list[Run] = []
    for seed in range(args.seeds):  # all ways of a seed before the next, so that what there is can be compared
        seconds = sum(r.seconds for r in runs) / max(1, seed)
        if time.monotonic() + seconds > end and seed > 0:
            console.print(f"no time for seed {seed} and above")
            break
        for way in args.ways:
            runs.append(trainer.run(way, seed, number))
            done = runs[-1]
            console.print(
                f"  seed {seed} {way:<8} loss {done.loss:.4f}  rare {done.rare_loss:.4f}  {done.seconds:.0f} s"
            )
            record = {"title": title, "runs": [asdict(r) for r in runs], "verdicts": verdicts(runs)}
            (args.output / "convergence.json").write_text(json.dumps(record, indent=1))
    console.print(table_of(runs, title))
    for sentence in sentences(runs):
        console.print(sentence)
    draw(runs, title, args.output / "convergence.png")


if __name__ == "__main__":
    main()
