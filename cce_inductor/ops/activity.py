"""What the sparse backward computes of a problem: for benchmarks and curious users. Waits for the GPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.config import tile_config
from ..options import Options
from . import cuda
from .launch import device_properties
from .problem import Problem
from .row_lists import Active, RowLists, most_blocks_of_a_tile


class Activity(NamedTuple):
    """What is computed, each as a share of all (row, vocabulary tile) pairs."""

    pairs: float
    blocks: float  # of as many rows as a kernel takes: those of the pairs, and what fills them up
    tokens: float  # pairs of which the heaviest token is computed alone


@torch.no_grad()
def activity(hidden: Tensor, weight: Tensor, target: Tensor, approximate_mass: float | None = None) -> Activity | None:
    """What the backward of the mean cross-entropy of hidden @ weight.T computes; None where it would be exact.

    hidden [N, D], weight [V, D], target [N]; approximate_mass: None is the default.
    """
    mass = Options.approximate_mass if approximate_mass is None else approximate_mass
    problem = Problem.plain(hidden, weight, target, Options.workspace_mib, mass)
    if not cuda.may_skip(problem):
        return None
    results = cuda.forward(problem)
    grad = (target != -100).float()
    tiles, rows = results.tile_lse.shape
    config = tile_config(device_properties(hidden.device)[0], backward=True)
    active = Active.of(problem, results.lse, results.tiles, grad, -grad, config.block_v)
    most = most_blocks_of_a_tile(rows, config.block_n)
    starts = RowLists.of(active, config.block_n, tiles * most).list_start[: tiles + 1]
    own, tops, dense = (part.sum().item() for part in active.counts.split([tiles, tiles, 1]))
    blocks = (starts[-1] - starts[0] + starts[0] * tiles).item()
    of_all = 1 / (tiles * rows)
    return Activity((dense * tiles + own) * of_all, blocks * config.block_n * of_all, tops * of_all)
