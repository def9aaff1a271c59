"""Blocks of logits that stay in memory between the forward and a backward that follows at once.

The gradient of the weight is memory that the backward fills slice by slice, in order. Until then it holds logits: those
of slice i where the gradient of slice i, or of a slice before, will be, so that a slice's logits are read before
anything is written over them.
"""

from torch import Tensor

from .problem import Problem, spans


class KeptLogits:
    """hidden @ weight.T of the first slices of the vocabulary, as many as there is room for; none by default."""

    def __init__(self, group_rows: int = 1, block_columns: int = 1, places: list[Tensor] | None = None) -> None:
        """places: for each slice that is kept, room for its columns of group_rows rows."""
        self._rows, self._columns = group_rows, block_columns
        self._places = places or []

    @classmethod
    def within(
        cls, problem: Problem, group_rows: int, block_columns: int, workspace_bytes: int, grad_weight: Tensor
    ) -> "KeptLogits":
        """Room in the memory of grad_weight, contiguous and not yet written, and in a workspace."""
        dtype = problem.compute_dtype
        slices = list(spans(problem.vocab_size, block_columns))
        sizes = [group_rows * (columns.stop - columns.start) for columns in slices]
        places: list[Tensor] = []
        if grad_weight.itemsize >= dtype.itemsize and group_rows > 0:
            room = grad_weight.flatten().view(dtype)
            step = block_columns * max(group_rows, problem.width * grad_weight.itemsize // dtype.itemsize)
            starts = range(0, step * len(slices), step)
            starts_and_sizes = zip(starts, sizes, strict=True)
            places = [room[start : start + size] for start, size in starts_and_sizes if start + size <= room.numel()]
        sizes = sizes[len(places) :]
        while sum(sizes) * dtype.itemsize > workspace_bytes:
            sizes.pop()
        return cls(group_rows, block_columns, [*places, *problem.hidden.new_empty(sum(sizes)).split(sizes)])

    def block(self, rows: slice, columns: slice) -> Tensor | None:
        """[rows, columns] of what is kept, to write to or to read; None where there was no room."""
        number = columns.start // self._columns
        if number >= len(self._places):
            return None
        width = columns.stop - columns.start
        start = rows.start % self._rows
        slice_logits = self._places[number][: self._rows * width].view(self._rows, width)
        return slice_logits[start : start + rows.stop - rows.start]
