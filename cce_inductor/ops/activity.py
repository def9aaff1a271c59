"""What the sparse backward computes of a problem: for benchmarks and curious users. Waits for the GPU."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.config import product_config, tile_config
from ..logit_map import LogitMap
from ..options import Options
from . import cuda
from .launch import device_properties
from .problem import Problem, RowGradients
from .row_lists import Active


class Activity(NamedTuple):
    """What is computed, each as a share of all (row, vocabulary tile) pairs."""

    pairs: float
    blocks: float  # of as many rows as a kernel takes: those of the pairs, and what fills them up
    tokens: float  # tokens that are computed alone, of which a pair may have two


@torch.no_grad()
def activity(
    hidden: Tensor, weight: Tensor, target: Tensor, approximate_mass: float | None = None, logit_map: str = "z"
) -> Activity | None:
    """What the backward of the mean cross-entropy of hidden @ weight.T computes; None where it would be exact.

    hidden [N, D], weight [V, D], target [N]; approximate_mass: None is the default; logit_map: as in `LogitMap`.
    """
    mass = Options.approximate_mass if approximate_mass is None else approximate_mass
    problem = Problem.plain(hidden, weight, target, Options.workspace_mib, mass)
    problem = replace(problem, logit_map=LogitMap.parse(logit_map))
    if not cuda.may_skip(problem):
        return None
    results = cuda.forward(problem)
    grad = (target != -100).float()
    tiles, rows = results.tile_lse.shape
    capability = device_properties(hidden.device)[0]
    config, part = tile_config(capability, backward=True), product_config(capability).part
    active = Active.of(
        problem, results.lse, results.tiles, RowGradients(grad, -grad, torch.zeros_like(grad)), config.block_v, part
    )
    dense, own, tops = (pairs.sum().item() for pairs in active.pairs.split([1, tiles, 2 * tiles]))
    slots = -(-active.counts[: 1 + tiles] // config.block_n)
    blocks = (slots[1:].sum() + slots[0] * tiles).item()
    of_all = 1 / (tiles * rows)
    return Activity((dense * tiles + own) * of_all, blocks * config.block_n * of_all, tops * of_all)
