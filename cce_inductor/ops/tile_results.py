"""What the forward kernel leaves of each vocabulary tile, and what that makes of the whole vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.log_sum import log_sum_kernel
from .combine import largest
from .problem import LEAST_LOG, Problem, Reductions, Tiles
from .quick_launch import launch

LOG_SUM_TILES, LOG_SUM_ROWS = 64, 32  # of a program at a time: a line of the cache of each tile


@dataclass(frozen=True)
class TileResults:
    """What the forward kernel stores of each vocabulary tile and row, [tiles, N]; None where nobody wants it."""

    lse: Tensor
    total: Tensor | None
    maximum: Tensor | None
    argmax: Tensor | None  # int32
    entropy: Tensor | None
    tops: Tensor | None  # [tiles, N, 2], int32

    @classmethod
    def allocate(cls, problem: Problem, tiles: int, want_tops: bool) -> "TileResults":
        """Zeros where the kernel may leave rows out, so that what is read of them never depends on old memory."""

        def room(dtype: torch.dtype = torch.float32, *records: int) -> Tensor:
            new = problem.hidden.new_zeros if problem.leaves_out else problem.hidden.new_empty
            return new((tiles, problem.num_rows, *records), dtype=dtype)

        return cls(
            lse=room(),
            total=room() if problem.want_total else None,
            maximum=room() if problem.want_max else None,
            argmax=room(torch.int32) if problem.want_max else None,
            entropy=room() if problem.want_entropy else None,
            tops=room(torch.int32, 2) if want_tops else None,
        )

    def combined(self, problem: Problem) -> Reductions:
        """Of the whole vocabulary, but for picked; with the records of tiles where they are wanted."""
        counts = problem.counts

        def counted(vector: Tensor, otherwise: float) -> Tensor:
            """What the kernel left out is not a result."""
            return vector if counts is None else torch.where(counts, vector, otherwise)

        lse = self._log_sum(problem)
        total, (picked, maximum, entropy) = torch.zeros_like(lse), (problem.zeros(0) for _ in range(3))
        argmax = maximum.long()
        if self.total is not None:
            total = counted(self.total.sum(0), 0.0)
        if self.maximum is not None and self.argmax is not None:
            maximum, argmax = largest(self.maximum, self.argmax, lse)
            maximum, argmax = counted(maximum, 0.0), counted(argmax, 0)
        if self.entropy is not None:
            entropy = counted(_entropy(self.lse - lse, self.entropy), 0.0)
        records = problem.tiles(0) if self.tops is None else Tiles(self.lse, self.tops)
        return Reductions(lse, picked, total, maximum, argmax, entropy, torch.zeros_like(lse), *records)

    def _log_sum(self, problem: Problem) -> Tensor:
        """Of all tiles; +inf where the kernel left a row out."""
        tiles, rows = self.lse.shape
        lse = self.lse.new_empty(rows)
        launch(
            log_sum_kernel,
            -(-rows // LOG_SUM_ROWS),
            tile_lse=self.lse,
            target=problem.target,
            lse=lse,
            num_rows=rows,
            num_tiles=tiles,
            ignore_index=problem.ignore_index or 0,
            SOME_ROWS=problem.leaves_out,
            TILES=LOG_SUM_TILES,
            ROWS=LOG_SUM_ROWS,
        )
        return lse


def _entropy(log_mass: Tensor, tile_entropy: Tensor) -> Tensor:
    """The entropy of which tile a class lies in, plus the mean of that of which class of a tile it is."""
    within = tile_entropy - log_mass.clamp(min=LEAST_LOG)
    return torch.where(log_mass < LEAST_LOG, 0.0, log_mass.exp() * within).sum(0)
