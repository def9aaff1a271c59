"""Blocks of logits are multiplied in parts and laid out as fast products need them; numbers stay what they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cce_inductor.ops.blocks import ALIGNMENT, column_by_column, fast_parts, logits_into


@given(st.integers(0, 5 * ALIGNMENT))
def test_parts_are_all_columns_and_none_is_empty(width):
    parts = fast_parts(width)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(width))
    assert all(part.start < part.stop for part in parts)
    assert all(part.start % ALIGNMENT == 0 for part in parts)
    assert len(parts) <= 2


@pytest.mark.parametrize("vocab", [1, 7, 8, 16, 19])
def test_logits_go_to_their_place_alone(vocab):
    hidden, weight = torch.randn(5, 4), torch.randn(vocab, 4)
    room = torch.full((5, 24), -1.0)
    out = room[:, :vocab]
    assert logits_into(out, hidden, weight) is out
    torch.testing.assert_close(out, hidden @ weight.T)
    assert (room[:, vocab:] == -1).all()


@given(st.integers(1, 20), st.integers(1, 20))
def test_a_matrix_laid_out_column_by_column_is_the_same(rows, columns):
    matrix = torch.randn(rows, columns)
    other = column_by_column(matrix)
    assert torch.equal(other, matrix)
    assert rows == 1 or other.stride(0) == 1
    assert columns == 1 or other.stride(1) % ALIGNMENT == 0
    assert columns == 1 or other.stride(1) >= rows
