"""What the sparse backward computes of a problem: for benchmarks and curious users. Waits for the GPU."""

import torch
from torch import Tensor

from ..kernels.config import tile_config
from ..options import Options
from . import cuda
from .launch import device_properties
from .problem import Problem
from .row_lists import RowLists, most_blocks_of_a_tile


@torch.no_grad()
def activity(
    hidden: Tensor, weight: Tensor, target: Tensor, approximate_mass: float | None = None
) -> tuple[float, float] | None:
    """(computed pairs, computed blocks) of the backward of the mean cross-entropy of hidden @ weight.T.

    hidden [N, D], weight [V, D], target [N]; approximate_mass: None is the default. Pairs are those of a row and a
    vocabulary tile, blocks those of as many rows as a kernel takes; both as a share of all there are. None where the
    backward would be exact.
    """
    mass = Options.approximate_mass if approximate_mass is None else approximate_mass
    problem = Problem.plain(hidden, weight, target, Options.workspace_mib, mass)
    if not cuda.may_skip(problem):
        return None
    results = cuda.forward(problem)
    lse, tile_lse, grad = results.lse, results.tile_lse, (target != -100).float()
    tiles, rows = tile_lse.shape
    block_n = tile_config(device_properties(hidden.device)[0], backward=True).block_n
    most = most_blocks_of_a_tile(rows, block_n)
    lists = RowLists.of(problem, lse, tile_lse, grad, -grad, tiles * most)
    *own, dense = lists.counts.tolist()
    pairs = dense * tiles + sum(own)
    blocks = lists.tile_start.diff().sum().item() + lists.tile_start[0].item() * tiles
    return pairs / (tiles * rows), blocks * block_n / (tiles * rows)
