"""Statistics of a softmax: what `--describe` prints, and what the tests hold the generators to."""

from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from .data import logit_chunks

THRESHOLD = 2.0**-12
QUANTILES = (0.1, 0.5, 0.9)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
TILE = 256
BUDGETS = (2.0**-3, 2.0**-4, 2.0**-5, 2.0**-6)
FIRST_IDS = (64, 512, 4096)
SAMPLE_ROWS = 2048


@torch.no_grad()
def statistics(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, Any]:
    """Figures of the softmax of evenly spaced rows, with all probabilities in float32.

    count: probabilities above 2^-12 a row. entropy: in nats. Both with mean and QUANTILES over rows. log_p: quantiles
    of the log-probability at RANKS. active: the share of (row, tile of 256 ids) pairs that are left when each row
    skips its lightest tiles within a budget, for BUDGETS. mass: the share of all probability in the FIRST_IDS.
    loss: the mean of -log p(target). rank: quantiles of the target's rank, from 0.
    """
    step = max(1, hidden.shape[0] // SAMPLE_ROWS)
    hidden, target = hidden[::step], target[::step]
    vocab = weight.shape[0]
    ranks = [rank for rank in RANKS if rank <= vocab]
    parts: dict[str, list[Tensor]] = {
        name: [] for name in ("count", "entropy", "log_p", "active", "mass", "loss", "rank")
    }
    start = 0
    for logits in logit_chunks(hidden, weight):
        labels = target[start : start + len(logits), None]
        start += len(logits)
        log_p = torch.log_softmax(logits, 1)
        p = log_p.exp()
        of_target = log_p.gather(1, labels)
        parts["count"].append((p > THRESHOLD).sum(1).float())
        parts["entropy"].append(-(p * log_p).sum(1))
        parts["log_p"].append(log_p.topk(ranks[-1], 1).values[:, torch.tensor(ranks, device=p.device) - 1])
        tiles = torch.nn.functional.pad(p, (0, -vocab % TILE)).unflatten(1, (-1, TILE)).sum(2)
        lightest = tiles.sort(1).values.cumsum(1)
        parts["active"].append(torch.stack([(lightest > budget).float().mean(1) for budget in BUDGETS], 1))
        parts["mass"].append(torch.stack([p[:, :first].sum(1) for first in FIRST_IDS], 1))
        parts["loss"].append(-of_target[:, 0])
        parts["rank"].append((log_p > of_target).sum(1).float())
    rows = {name: torch.cat(tensors).double().cpu() for name, tensors in parts.items()}
    quantiles = torch.tensor(QUANTILES, dtype=torch.float64)
    return {
        "count": {"mean": rows["count"].mean().item(), "quantiles": rows["count"].quantile(quantiles).tolist()},
        "entropy": {"mean": rows["entropy"].mean().item(), "quantiles": rows["entropy"].quantile(quantiles).tolist()},
        "log_p": dict(zip(ranks, rows["log_p"].quantile(quantiles, 0).T.tolist(), strict=True)),
        "active": dict(zip(BUDGETS, rows["active"].mean(0).tolist(), strict=True)),
        "mass": dict(zip(FIRST_IDS, rows["mass"].mean(0).tolist(), strict=True)),
        "loss": rows["loss"].mean().item(),
        "rank": rows["rank"].quantile(quantiles).tolist(),
    }


def table(title: str, figures: dict[str, Any]) -> Table:
    result = Table("", "mean", *(f"{q:.0%} of rows below" for q in QUANTILES), title=title, title_justify="left")

    def numbers(values: list[float]) -> list[str]:
        return [f"{value:.2f}" for value in values]

    result.add_row("probabilities above 2^-12", *numbers([figures["count"]["mean"], *figures["count"]["quantiles"]]))
    result.add_row("entropy", *numbers([figures["entropy"]["mean"], *figures["entropy"]["quantiles"]]))
    for rank, quantiles in figures["log_p"].items():
        result.add_row(f"log p at rank {rank}", "", *numbers(quantiles))
    result.add_row("rank of the target", "", *numbers(figures["rank"]))
    result.add_row("loss", f"{figures['loss']:.2f}")
    for budget, share in figures["active"].items():
        result.add_row(f"pairs active at budget {budget:g}", f"{share:.3f}")
    for first, share in figures["mass"].items():
        result.add_row(f"mass of the first {first} ids", f"{share:.3f}")
    return result
