"""Where on a GPU logits stay between a forward and the gradient that follows at once: whole tiles of the vocabulary.

The backward takes the vocabulary slice by slice: a slice of dz, [N, C], to the workspace, and then that slice of the
weight's gradient to its place. Until then both are free memory, which holds logits in 16 bits:

    of the first slice       in the workspace, each where its dz will be
    of the slices behind it  in the weight's gradient, tile by tile, [tiles, N, columns of a tile], up to its very end

When a slice is read, the gradients of those before it are written. Where N >= D, its logits take no less room than its
gradient: as the last that are kept end where all gradients end, each slice's begin behind the gradients before. Where
N < D, all logits that are left take less room than their gradients. So of V classes min(V, C + (V - C) D / N) are kept,
and where the weight is float32, whose gradient has twice the room, min(V, C + 2 (V - C) D / N).

A sparse backward takes the vocabulary in the same order, and finds codes of 8 bits (`kernels/codes.py`): of as many
classes as have room in the weight's gradient, V D / N times the size of its numbers, and of the next ones apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .problem import Problem

KEPT_DTYPE = torch.float16  # of what `kernels/kept.py` makes of logits


@dataclass(frozen=True)
class Place:
    """Room for the logits of consecutive tiles, or for their codes."""

    columns: slice
    logits: Tensor  # flat, from the first of them on
    base: Tensor | None  # [tiles, N], float32: what they are differences to; codes have none
    tile_columns: int
    tile_stride: int
    row_stride: int

    def of(self, rows: slice, columns: slice) -> "Place":
        """That of some rows, and of some tiles."""
        first = (columns.start - self.columns.start) // self.tile_columns
        logits = self.logits[first * self.tile_stride + rows.start * self.row_stride :]
        return replace(
            self, columns=columns, logits=logits, base=None if self.base is None else self.base[first:, rows]
        )

    @property
    def tiles(self) -> tuple[int, int]:
        """The number of the first one, and that of the first one behind them."""
        return self.columns.start // self.tile_columns, -(-self.columns.stop // self.tile_columns)


def kept_arguments(place: Place | None) -> dict[str, Any]:
    """How kernels are told of a place."""
    return {
        "kept": place and place.logits,
        "kept_base": place and place.base,
        "stride_kept_tile": place and place.tile_stride,
        "stride_kept_row": place and place.row_stride,
        "stride_kept_base": place.base.stride(0) if place is not None and place.base is not None else None,
    }


class KeptTiles:
    """The logits of the first tiles of the vocabulary, as many as there is room for; none by default."""

    def __init__(self, places: tuple[Place, ...] = (), bytes_apart: int = 0) -> None:
        """places: in the order of the vocabulary, from its start and without gaps.

        bytes_apart: what they take in memory that nothing else uses.
        """
        self.places, self.bytes_apart = places, bytes_apart

    @classmethod
    def within(cls, problem: Problem, tile_columns: int, workspace: Tensor, grad_weight: Tensor) -> "KeptTiles":
        """Room in a workspace for blocks of dz, and in the weight's gradient, or nothing where that is empty.

        Neither is written yet. A workspace of some rows at a time keeps nothing.
        """
        rows, vocab_size = problem.num_rows, problem.vocab_size
        tiles = vocab_size // tile_columns  # what is left is narrower than a tile
        first = workspace.shape[1] if len(workspace) == rows else 0
        in_workspace = min(first // tile_columns, tiles)
        room = grad_weight.flatten().view(KEPT_DTYPE)
        room = room[first * (room.numel() // vocab_size) :]  # behind the first slice's gradient
        size = rows * tile_columns
        in_room = min(room.numel() // size, tiles - in_workspace)
        base = problem.hidden.new_empty((in_workspace + in_room, rows), dtype=torch.float32)
        middle, end = in_workspace * tile_columns, (in_workspace + in_room) * tile_columns
        flat = workspace.flatten().view(KEPT_DTYPE)
        end_of_room = room[room.numel() - in_room * size :]
        return cls(
            (
                Place(slice(0, middle), flat, base[:in_workspace], tile_columns, tile_columns, workspace.shape[1]),
                Place(slice(middle, end), end_of_room, base[in_workspace:], tile_columns, size, tile_columns),
            )
        )

    @classmethod
    def coded(cls, problem: Problem, tile_columns: int, room_bytes: int, grad_weight: Tensor) -> "KeptTiles":
        """Room for codes in the weight's gradient, not yet written, or none if it is empty, and in so many bytes apart.

        Those in the gradient are of the first tiles and end where it ends. So the first one's have room, and the last
        one's lie behind the gradients before it, which are written when its codes have not been read.
        """
        tiles = -(-problem.vocab_size // tile_columns)
        size = problem.num_rows * tile_columns
        room = grad_weight.flatten().view(torch.uint8)
        gradient = room.numel() // problem.vocab_size * tile_columns  # bytes of a tile's
        inside = 0
        if room.numel() >= size:
            inside = min(room.numel() // size, (room.numel() - size) // gradient + 1, tiles)
        apart = min(room_bytes // size, tiles - inside)
        middle, end = (min(count * tile_columns, problem.vocab_size) for count in (inside, inside + apart))
        places = (
            (slice(0, middle), room[room.numel() - inside * size :]),
            (slice(middle, end), room.new_empty(apart * size)),
        )
        return cls(
            tuple(
                Place(columns, codes, None, tile_columns, size, tile_columns)
                for columns, codes in places
                if columns.start < columns.stop
            ),
            bytes_apart=apart * size,
        )

    @property
    def first_left(self) -> int:
        """The first tile that is not kept."""
        return self.places[-1].tiles[1] if self.places else 0

    def code_arguments(self) -> dict[str, Any]:
        """How kernels that read codes are told of those places."""
        first, last = self.places[0], self.places[-1]
        return {
            "codes": first.logits,
            "codes_apart": last.logits,
            "first_apart": last.tiles[0] if last is not first else self.first_left,
        }

    def parts(self, rows: slice, columns: slice) -> Iterator[tuple[slice, Place | None]]:
        """(columns, where their logits of the rows are) of a slice that begins with a tile; None for those not kept."""
        start = columns.start
        for place in self.places:
            part = slice(start, min(place.columns.stop, columns.stop))
            if part.start < part.stop:
                yield part, place.of(rows, part)
                start = part.stop
        if start < columns.stop:
            yield slice(start, columns.stop), None
