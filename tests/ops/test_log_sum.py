"""The log-sum-exp of a row from that of its tiles."""

import pytest
import torch
from cases import interpreted
from hypothesis import given
from hypothesis import strategies as st

from cce_inductor.kernels.log_sum import log_sum_kernel

pytestmark = [interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

ENDS = (0.0, 80.0, -80.0, float("-inf"), float("nan"))


def log_sum(tile_lse, target, ignore_index):
    tiles, rows = tile_lse.shape
    lse = torch.full((rows,), 7.0)
    log_sum_kernel[(-(-rows // 8),)](
        tile_lse, target, lse, rows, tiles, ignore_index, SOME_ROWS=target is not None, TILES=4, ROWS=8
    )
    return lse


@given(
    tiles=st.integers(1, 20),
    rows=st.integers(1, 20),
    seed=st.integers(0, 99),
    some=st.booleans(),
    shift=st.sampled_from(ENDS),
)
def test_it_is_that_of_all_tiles(tiles, rows, seed, some, shift):
    """Of rows that are shifted, or -inf or not a number in one of the tiles, too; +inf where a row is left out."""
    generator = torch.Generator().manual_seed(seed)
    tile_lse = 20 * torch.randn(tiles, rows, generator=generator)
    tile_lse[:, 0] += shift if abs(shift) <= 80 else 0
    tile_lse[seed % tiles, rows - 1] += shift
    expected = torch.logsumexp(tile_lse.double(), 0)
    target = None
    if some:
        target = torch.randint(0, 3, (rows,), generator=generator)
        expected = torch.where(target == 1, float("inf"), expected)
    # of each exponential: the argument is rounded, and the function is right to two units in the last place
    allowed = 4 * torch.finfo(torch.float32).eps * (tile_lse.abs().amax(0) + 100)
    results = log_sum(tile_lse, target, 1)
    assert torch.equal(results.isnan(), expected.isnan())
    assert torch.equal(results.isinf(), expected.isinf())
    assert torch.equal(results[results.isinf()], expected[expected.isinf()].float())
    finite = expected.isfinite()
    assert ((results - expected).abs()[finite] <= allowed[finite]).all()
