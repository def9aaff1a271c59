"""Which blocks of the logits the sparse backward computes, and in what order. All of it stays on the device.

A block is a row block and a vocabulary tile. Blocks are numbered tile by tile: tile * row_blocks + row_block.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class BlockPlan:
    """The active blocks as int32 lists that kernels walk over, in rounds of what the workspace holds.

    A round takes whole tiles, so that one program can complete a tile of the weight's gradient. How many tiles that
    is depends on the data; how many rounds there may be does not: where few blocks are active, the last are empty.
    Lists end with one element more, so that a kernel may read the next element before it knows whether there is one.
    """

    numbers: Tensor  # [blocks + 1], the active blocks, in order
    tile_start: Tensor  # [tiles + 1], where each tile's blocks begin in `numbers`
    row_tiles: Tensor  # [blocks + 1], the active tiles of each row block, one row block after the other
    row_places: Tensor  # [blocks + 1], where each of these blocks stands in `numbers`
    row_start: Tensor  # [rounds + 1, row_blocks], where a row block's tiles of each round begin in `row_tiles`
    round_tiles: Tensor  # [rounds + 1], the first tile of each round
    round_places: Tensor  # [rounds + 1], the first place in `numbers` of each round
    rounds: int

    @classmethod
    def of(cls, active: Tensor, slots: int) -> "BlockPlan":
        """active: [tiles, row_blocks], bool. slots: how many blocks the workspace holds, at least row_blocks."""
        tiles, row_blocks = active.shape
        by_tile, by_row = active.flatten(), active.T.flatten()
        places = by_tile.cumsum(0) - 1
        tile_start = _starts(active.sum(1))
        # tiles that begin within this many blocks of each other fit, for the last one adds row_blocks at most
        usable = slots - row_blocks + 1
        rounds = -(-by_tile.numel() // usable)
        bounds = torch.arange(rounds + 1, device=active.device) * usable
        round_tiles = torch.searchsorted(tile_start[:-1].contiguous(), bounds)  # the last bound is beyond all
        tiles_before = F.pad(active.T.cumsum(1), (1, 0))  # [row_blocks, tiles + 1]
        row_start = tiles_before[:, round_tiles] + _starts(active.sum(0))[:-1, None]
        row_order = _compacted(by_row)
        row_places = places.view(tiles, row_blocks).T.flatten()[row_order]
        return cls(
            numbers=_list(_compacted(by_tile)),
            tile_start=tile_start.int(),
            row_tiles=_list(row_order % tiles),
            row_places=_list(row_places),
            row_start=row_start.T.contiguous().int(),
            round_tiles=round_tiles.int(),
            round_places=tile_start[round_tiles].int(),
            rounds=rounds,
        )


def _starts(counts: Tensor) -> Tensor:
    """Where each group begins if they stand one after the other, and where the last one ends."""
    return F.pad(counts.cumsum(0), (1, 0))


def _compacted(mask: Tensor) -> Tensor:
    """The positions of the true elements, in order, at the front of a tensor of full size; the rest is zero."""
    size = mask.numel()
    positions = torch.arange(size, device=mask.device)
    front = torch.zeros(size + 1, dtype=torch.int64, device=mask.device)
    return front.scatter_(0, torch.where(mask, mask.cumsum(0) - 1, size), positions)[:size]


def _list(values: Tensor) -> Tensor:
    return F.pad(values, (0, 1)).int()
