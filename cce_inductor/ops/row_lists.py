"""Which rows the sparse backward computes in each vocabulary tile, as lists on the device."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..kernels.active import active_kernel
from ..kernels.config import tile_config
from ..kernels.lists import lists_kernel, rounds_kernel
from .launch import device_properties, ignore_arguments
from .problem import Problem

# A row that needs more than this share of the tiles is dense: all tiles are computed for it, but their products for
# the hidden states' gradient are summed in registers. Additions in memory cost as much as everything else together.
DENSE_SHARE = 0.5
PLANNED_AT_ONCE = 16384  # (row, tile) pairs that a program of the first kernel keeps in registers


@dataclass(frozen=True)
class RowLists:
    """Lists and rounds as `kernels/lists.py` describes them."""

    counts: Tensor  # [tiles + 1], int32
    tile_start: Tensor  # [tiles + 1], int32
    slot_rows: Tensor  # [slots * block_n], int32; one slot more than there can be, for what is read ahead
    slot_tile: Tensor  # [slots], int32
    round_tiles: Tensor  # [rounds + 1], int32
    skipped_mass: Tensor  # [tiles, N], in the dtype of the matmuls
    skips: Tensor  # [tiles], bool
    grad_peak: Tensor  # [], float32
    rounds: int

    @classmethod
    def of(
        cls, problem: Problem, lse: Tensor, tile_lse: Tensor, grad_lse: Tensor, grad_picked: Tensor, blocks: int
    ) -> "RowLists":
        """blocks: how many fit in the workspace, at least `most_blocks_of_a_tile`."""
        config = tile_config(device_properties(lse.device)[0], backward=True)
        tiles, num_rows = tile_lse.shape
        most = most_blocks_of_a_tile(num_rows, config.block_n)
        usable = blocks - most + 1  # of tiles that begin within it the last one adds `most` at most
        rounds = -(-tiles * most // usable)
        active, counts = _active(problem, lse, tile_lse, grad_lse, grad_picked, config.block_v)
        slots = (tiles + 1) * most + 1
        lists = cls(
            counts=counts,
            tile_start=counts.new_empty(tiles + 1),
            slot_rows=counts.new_empty(slots * config.block_n),
            slot_tile=counts.new_empty(slots),
            round_tiles=counts.new_empty(rounds + 1),
            skipped_mass=tile_lse.new_empty(tile_lse.shape, dtype=problem.compute_dtype),
            skips=counts.new_empty(tiles, dtype=torch.bool),
            grad_peak=torch.linalg.vector_norm(grad_lse, ord=float("inf")),
            rounds=rounds,
        )
        rounds_kernel[(1,)](
            counts=counts,
            tile_start=lists.tile_start,
            round_tiles=lists.round_tiles,
            num_tiles=tiles,
            usable=usable,
            rounds=rounds,
            BLOCK_N=config.block_n,
            TILES=triton.next_power_of_2(tiles),
        )
        lists_kernel[(tiles + 1,)](
            tile_lse=tile_lse,
            lse=lse,
            grad_lse=grad_lse,
            grad_peak=lists.grad_peak,
            active=active,
            tile_start=lists.tile_start,
            slot_rows=lists.slot_rows,
            slot_tile=lists.slot_tile,
            skipped_mass=lists.skipped_mass,
            skips=lists.skips,
            num_rows=num_rows,
            num_tiles=tiles,
            BLOCK_N=config.block_n,
            ROWS=1024,
            ROW_BLOCKS=triton.next_power_of_2(most),
        )
        return lists


def most_blocks_of_a_tile(num_rows: int, block_n: int) -> int:
    """All rows, in the list of the dense ones and in the tile's own, both of which may end with a part of a slot."""
    return -(-num_rows // block_n) + 1


def _active(
    problem: Problem, lse: Tensor, tile_lse: Tensor, grad_lse: Tensor, grad_picked: Tensor, tile_width: int
) -> tuple[Tensor, Tensor]:
    """[tiles + 1, N], bool: the tiles that each row needs unless it is dense, and whether it is; and their counts."""
    tiles, num_rows = tile_lse.shape
    active = torch.empty(tiles + 1, num_rows, dtype=torch.bool, device=lse.device)
    counts = torch.zeros(tiles + 1, dtype=torch.int32, device=lse.device)
    all_tiles = triton.next_power_of_2(tiles)
    rows = max(1, min(32, PLANNED_AT_ONCE // all_tiles))
    active_kernel[(-(-num_rows // rows),)](
        tile_lse=tile_lse,
        lse=lse,
        grad_lse=grad_lse,
        grad_picked=grad_picked,
        target=problem.target,
        active=active,
        counts=counts,
        num_rows=num_rows,
        num_tiles=tiles,
        **ignore_arguments(problem),
        budget=problem.approximate_mass,
        dense_share=DENSE_SHARE,
        HAS_TARGET=problem.target is not None,
        TILE_WIDTH=tile_width,
        TILES=all_tiles,
        ROWS=rows,
        num_warps=8,
    )
    return active, counts
