"""Which rows the sparse backward computes in each vocabulary tile, as lists on the device."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..kernels.active import active_kernel
from ..kernels.lists import lists_kernel, rounds_kernel, skipped_kernel
from .launch import ignore_arguments, slope_arguments
from .problem import Problem, RowGradients, Tiles
from .quick_launch import launch

# A row that needs more than this share of the tiles is dense: all tiles are computed for it, but their products for
# the hidden states' gradient are summed in registers. Additions in memory cost as much as everything else together.
# So a row of a third of the tiles takes as long either way; those of a fifth are flat, and what rare tokens have, they
# have of these: skipping less there halves the error of a real head's median row of the weight's gradient.
DENSE_SHARE = 0.2
# Of no more mass than this times the cube of the budget, no token but the target is computed alone. By its cube, as
# such tokens are most of what is left to compute where much may be approximated, and that is asked for to be fast. Of
# twice as much it would take a twentieth less time, and the median row would be off by four times as much.
TOP_PART = 2.0**-3
# Of no tile more than this part of the budget is approximated. Larger parts save next to nothing, as what two tokens
# leave of a tile is light, and peaked rows are off by more. The gradients that eager computes in float16, with a scaled
# loss, are off by a fifth to a tenth of those in bfloat16: smaller pieces do less harm than as many larger ones.
LARGEST_PIECE = 2.0**-5.5
LARGEST_FLOAT16_PIECE = 2.0**-10.5
PLANNED_AT_ONCE = 4096  # (row, tile) pairs that a program of the first kernel keeps in registers


@dataclass(frozen=True)
class Active:
    """What each row needs, as `kernels/active.py` finds it."""

    pairs: Tensor  # [1 + 3 * tiles, N], bool: which rows are dense; active pairs of others; tops [tiles, N, 2]
    counts: Tensor  # [lists], int32: how many there are, of tops for each part of a tile
    row_tokens: Tensor  # [N, 2 * tiles], int32: the tops of each row: 2 * place in the vocabulary + which of its tile
    row_count: Tensor  # [N], int32: how many there are
    row_dz: Tensor | None  # [N, 2 * tiles]: dz of the tops of each row; None where slopes are not known
    top_dz: Tensor  # [tiles, N, 2], int32: the same with their columns, still to be written where row_dz is None

    @classmethod
    def of(
        cls,
        problem: Problem,
        lse: Tensor,
        tiles: Tiles,
        grads: RowGradients,
        tile_width: int,
        part: int,
        tops: bool = True,
    ) -> "Active":
        """part: columns of a part of a tile. tops: whether tokens may be computed alone."""
        count, num_rows = tiles.lse.shape
        slopes = slope_arguments(problem)
        by_value = problem.logit_map.slope_by_value is not None
        known = by_value and (slopes["SAME_SLOPE"] or grads.target_logit is not None)
        active = cls(
            pairs=torch.zeros(1 + 3 * count, num_rows, dtype=torch.bool, device=lse.device),
            counts=torch.zeros(1 + count + count * tile_width // part, dtype=torch.int32, device=lse.device),
            row_tokens=torch.empty(num_rows, 2 * count, dtype=torch.int32, device=lse.device),
            row_count=torch.zeros(num_rows, dtype=torch.int32, device=lse.device),
            row_dz=tiles.lse.new_empty(num_rows, 2 * count) if known else None,
            top_dz=torch.empty(count, num_rows, 2, dtype=torch.int32, device=lse.device),
        )
        all_tiles = triton.next_power_of_2(count)
        rows = max(1, min(32, PLANNED_AT_ONCE // all_tiles))
        launch(
            active_kernel,
            -(-num_rows // rows),
            tile_lse=tiles.lse,
            tile_tops=tiles.tops,
            lse=lse,
            grad_lse=grads.lse,
            grad_picked=grads.picked,
            target=problem.target,
            target_logit=grads.target_logit,
            active=active.pairs,
            counts=active.counts,
            row_tokens=active.row_tokens,
            row_count=active.row_count,
            row_dz=active.row_dz,
            top_dz=active.top_dz,
            num_rows=num_rows,
            num_tiles=count,
            **ignore_arguments(problem),
            budget=problem.approximate_mass,
            largest_piece=problem.approximate_mass * _largest_piece(problem.compute_dtype),
            lightest_top=problem.approximate_mass**3 * TOP_PART if tops else float("inf"),
            dense_share=DENSE_SHARE,
            **slopes,
            KNOWN=known,
            HAS_TARGET=problem.target is not None,
            TILE_WIDTH=tile_width,
            PART=part,
            TILES=all_tiles,
            ROWS=rows,
            num_warps=8,
        )
        return active


@dataclass(frozen=True)
class RowLists:
    """Lists and rounds as `kernels/lists.py` describes them."""

    counts: Tensor  # [lists], int32
    list_start: Tensor  # [lists + 1], int32
    slot_rows: Tensor  # [slots * block_n], int32, -1 where nothing is listed; one slot more, for what is read ahead
    slot_tile: Tensor  # [slots], int32, of dense rows and active pairs
    round_tiles: Tensor  # [rounds + 1], int32
    rounds: int

    @classmethod
    def of(cls, active: Active, tiles: Tiles, block_n: int, blocks: int, tile_width: int, part: int) -> "RowLists":
        """blocks: how many fit in the workspace, at least `most_blocks_of_a_tile`."""
        counts = active.counts
        count, num_rows, _ = active.top_dz.shape
        most = most_blocks_of_a_tile(num_rows, block_n)
        usable = blocks - most + 1  # of tiles that begin within it the last one adds `most` at most
        rounds = -(-count * most // usable)
        # rows that do not need the tile may have two entries, in as many lists as there are parts
        slots = (count + 1) * (2 * most + tile_width // part) + 1
        lists = cls(
            counts=counts,
            list_start=counts.new_empty(len(counts) + 1),
            slot_rows=counts.new_full((slots * block_n,), -1),
            slot_tile=counts.new_empty(slots),
            round_tiles=counts.new_empty(rounds + 1),
            rounds=rounds,
        )
        launch(
            rounds_kernel,
            1,
            counts=counts,
            list_start=lists.list_start,
            round_tiles=lists.round_tiles,
            num_tiles=count,
            num_lists=len(counts),
            usable=usable,
            rounds=rounds,
            BLOCK_N=block_n,
            LISTS=triton.next_power_of_2(len(counts) + 1),
        )
        launch(
            lists_kernel,
            len(counts),
            active=active.pairs,
            tile_tops=tiles.tops,
            list_start=lists.list_start,
            slot_rows=lists.slot_rows,
            slot_tile=lists.slot_tile,
            num_rows=num_rows,
            num_tiles=count,
            TILE_WIDTH=tile_width,
            PART=part,
            BLOCK_N=block_n,
            ROWS=1024,
            ROW_BLOCKS=triton.next_power_of_2(most),
        )
        return lists


@dataclass(frozen=True)
class Skipped:
    """The probability mass that is not computed."""

    mass: Tensor  # [tiles, N], in the dtype of the matmuls, times grad_lse / grad_peak
    anything: Tensor  # [tiles], bool: whether any row skips the tile
    grad_peak: Tensor  # [], float32

    @classmethod
    def of(
        cls, problem: Problem, lse: Tensor, tiles: Tiles, grad_lse: Tensor, active: Active, tile_width: int
    ) -> "Skipped":
        count, num_rows = tiles.lse.shape
        skipped = cls(
            mass=tiles.lse.new_empty(tiles.lse.shape, dtype=problem.compute_dtype),
            anything=torch.empty(count, dtype=torch.bool, device=lse.device),
            grad_peak=torch.linalg.vector_norm(grad_lse, ord=float("inf")),
        )
        launch(
            skipped_kernel,
            count,
            tile_lse=tiles.lse,
            tile_tops=tiles.tops,
            lse=lse,
            grad_lse=grad_lse,
            grad_peak=skipped.grad_peak,
            active=active.pairs,
            skipped_mass=skipped.mass,
            skips=skipped.anything,
            num_rows=num_rows,
            num_tiles=count,
            TILE_WIDTH=tile_width,
            ROWS=1024,
        )
        return skipped


def _largest_piece(compute_dtype: torch.dtype) -> float:
    return LARGEST_FLOAT16_PIECE if compute_dtype == torch.float16 else LARGEST_PIECE


def most_blocks_of_a_tile(num_rows: int, block_n: int) -> int:
    """All rows, in the list of the dense ones and in the tile's own, both of which may end with a part of a slot."""
    return -(-num_rows // block_n) + 1
