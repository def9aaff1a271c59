"""Which rows the sparse backward computes in each vocabulary tile, as lists on the device."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..kernels.active import active_kernel
from ..kernels.config import tile_config
from ..kernels.lists import lists_kernel, rounds_kernel
from .launch import device_properties
from .problem import Problem

# A tile that more than this share of the rows need is dense: it is multiplied without additions in memory, but for
# all rows that have a gradient.
DENSE_SHARE = 0.6
PLANNED_AT_ONCE = 16384  # (row, tile) pairs that a program of the first kernel keeps in registers


@dataclass(frozen=True)
class RowLists:
    """Lists and rounds as `kernels/lists.py` describes them; all but skipped_mass and the flags in int32."""

    counts: Tensor  # [tiles + 1], active rows of each tile; then rows that have a gradient
    dense: Tensor  # [tiles], bool
    dense_tiles: Tensor  # [tiles + 2]
    tile_start: Tensor  # [tiles + 1]
    slot_rows: Tensor  # [slots * block_n + block_n]
    slot_tile: Tensor  # [slots]
    round_tiles: Tensor  # [rounds + 1]
    round_slots: Tensor  # [rounds + 1]
    round_dense: Tensor  # [rounds + 1]
    skipped_mass: Tensor  # [tiles, N], in the dtype of the matmuls
    grad_peak: Tensor  # [], float32: the largest |grad_lse|, by which skipped_mass is divided
    rounds: int

    @classmethod
    def of(
        cls, problem: Problem, lse: Tensor, tile_lse: Tensor, grad_lse: Tensor, grad_picked: Tensor, slots: int
    ) -> "RowLists":
        """slots: how many fit in the workspace, at least as many as there are row blocks."""
        config = tile_config(device_properties(lse.device)[0], backward=True)
        tiles, num_rows = tile_lse.shape
        row_blocks = -(-num_rows // config.block_n)
        usable = slots - row_blocks + 1  # of tiles that begin within it the last one adds row_blocks at most
        rounds = -(-tiles * row_blocks // usable)
        active, counts = _active(problem, lse, tile_lse, grad_lse, grad_picked, config.block_v)
        lists = cls(
            counts=counts,
            dense=counts.new_empty(tiles, dtype=torch.bool),
            dense_tiles=counts.new_zeros(tiles + 2),
            tile_start=counts.new_empty(tiles + 1),
            slot_rows=counts.new_empty((tiles * row_blocks + 1) * config.block_n),
            slot_tile=counts.new_empty(tiles * row_blocks),
            round_tiles=counts.new_empty(rounds + 1),
            round_slots=counts.new_empty(rounds + 1),
            round_dense=counts.new_empty(rounds + 1),
            skipped_mass=tile_lse.new_empty(tile_lse.shape, dtype=problem.compute_dtype),
            grad_peak=torch.linalg.vector_norm(grad_lse, ord=float("inf")),
            rounds=rounds,
        )
        rounds_kernel[(1,)](
            counts=counts,
            dense=lists.dense,
            tile_start=lists.tile_start,
            dense_tiles=lists.dense_tiles,
            round_tiles=lists.round_tiles,
            round_slots=lists.round_slots,
            round_dense=lists.round_dense,
            num_tiles=tiles,
            usable=usable,
            rounds=rounds,
            dense_share=DENSE_SHARE,
            BLOCK_N=config.block_n,
            TILES=triton.next_power_of_2(tiles),
        )
        lists_kernel[(tiles,)](
            tile_lse=tile_lse,
            lse=lse,
            grad_lse=grad_lse,
            grad_peak=lists.grad_peak,
            active=active,
            dense=lists.dense,
            tile_start=lists.tile_start,
            slot_rows=lists.slot_rows,
            slot_tile=lists.slot_tile,
            skipped_mass=lists.skipped_mass,
            num_rows=num_rows,
            num_tiles=tiles,
            BLOCK_N=config.block_n,
            ROWS=1024,
            ROW_BLOCKS=triton.next_power_of_2(row_blocks),
        )
        return lists


def _active(
    problem: Problem, lse: Tensor, tile_lse: Tensor, grad_lse: Tensor, grad_picked: Tensor, tile_width: int
) -> tuple[Tensor, Tensor]:
    """[tiles + 1, N], bool: the tiles that each row needs, and whether it has a gradient; and each one's count."""
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
        ignore_index=problem.ignore_index or 0,
        budget=problem.approximate_mass,
        HAS_TARGET=problem.target is not None,
        HAS_IGNORE_INDEX=problem.ignore_index is not None,
        TILE_WIDTH=tile_width,
        TILES=all_tiles,
        ROWS=rows,
        num_warps=8,
    )
    return active, counts
