"""The loss with sparse gradients on a GPU, from codes of 8 bits a logit that the forward keeps."""

import functools

import pytest
import torch
import torch.nn.functional as F
from on_a_gpu import BF16, FP16, FP32, assert_captured, assert_same_bits, nothing_waits
from test_gpu_loss import LEADS, ROUNDING, SCALES, SHAPES, in_three_ways, leaves_of, losses_and_gradients
from test_gpu_loss import mean_loss as exact_mean_loss

from cce_inductor.logit_map import LogitMap
from cce_inductor.ops import cuda_loss, sparse
from cce_inductor.ops.kept_tiles import KeptTiles

pytestmark = pytest.mark.gpu

mean_loss = functools.partial(exact_mean_loss, approximate_mass=2.0**-5)
next_to_exact = functools.partial(exact_mean_loss, approximate_mass=2.0**-30)
CODE = 2.0**-7  # of the part of gradients that comes from the probabilities


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """Problems of any size take this way, which is seen by the tiles that are kept; (first, last) of each place."""
    monkeypatch.setattr(sparse, "LEAST_FLOPS", 0)
    places, coded = [], KeptTiles.coded

    def noting(*args):
        tiles = coded(*args)
        places.extend(place.tiles for place in tiles.places)
        return tiles

    monkeypatch.setattr(cuda_loss.KeptTiles, "coded", noting)
    yield places
    assert places


def from_probabilities(hidden, weight, bias, target, logit_map):
    """The part of the gradients of hidden and weight that comes from the probabilities."""
    x, slope = LogitMap.parse(logit_map).value_and_derivative(F.linear(hidden, weight, bias))
    counts = (target != -100).double()
    dz = torch.softmax(x, 1) * (counts / counts.sum())[:, None] * (1.0 if slope is None else slope)
    return dz @ weight, dz.T @ hidden


@pytest.mark.parametrize(
    "how",
    [{}, {"logit_map": "0.5*z + 1.0"}, {"logit_map": "9.0*tanh(z/9.0)"}, {"dtype": FP32}, {"compute_dtype": FP16}],
    ids=str,
)
@pytest.mark.parametrize("lead", LEADS.values(), ids=LEADS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_from_codes_are_no_worse_than_eagers_but_for_the_codes(shape, lead, how):
    ours, eagers, right, doubles = in_three_ways(next_to_exact, shape, lead, how)
    parts, bits = from_probabilities(*doubles, how.get("logit_map", "z")), how.get("compute_dtype", BF16)
    for mine, theirs, exact, part in zip(ours[1:], eagers[1:], right[1:], parts, strict=True):
        most = (theirs.double() - exact).norm() + ROUNDING[bits] * exact.norm() + CODE * SCALES[bits] * part.norm()
        assert (mine.double() - exact).norm() <= most


@pytest.mark.parametrize("lead", LEADS.values(), ids=LEADS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_from_codes_are_the_same_bits_every_run(shape, lead):
    *sizes, workspace = shape
    problem = leaves_of(*sizes, lead)
    assert_same_bits(lambda: losses_and_gradients(mean_loss, *problem, workspace_mib=workspace))


def test_nothing_waits_for_the_gpu_in_the_forward_with_sparse_gradients():
    problem = leaves_of(1000, 20000, 128, 8.0)
    losses_and_gradients(mean_loss, *problem, workspace_mib=4)
    with nothing_waits():
        losses_and_gradients(mean_loss, *problem, workspace_mib=4)


def test_the_forward_with_sparse_gradients_can_be_captured_into_a_cuda_graph():
    problem = leaves_of(1000, 20000, 128, 8.0)
    assert_captured(lambda: losses_and_gradients(mean_loss, *problem, workspace_mib=4))


@pytest.mark.parametrize(
    ("rows", "vocab", "width", "workspace_mib"),
    [(33000, 66000, 64, 5120), (4096, 560000, 4096, 64)],
    ids=["apart", "gradient"],
)
def test_int64_offsets_into_codes(rows, vocab, width, workspace_mib, kept):
    """The last rows, and classes, against those of exact gradients."""
    *leaves, target = leaves_of(rows, vocab, width, 4.0, masked=0.0)
    ours = losses_and_gradients(next_to_exact, *leaves, target, workspace_mib=workspace_mib)
    assert kept[-1][1] == -(-vocab // 256), "all are kept"
    theirs = losses_and_gradients(exact_mean_loss, *leaves, target, workspace_mib=256)
    for mine, other in zip(ours, theirs, strict=True):
        last = (slice(-64, None),) if mine.dim() else ()
        assert (mine[last].float() - other[last].float()).norm() <= 2 * CODE * other[last].float().norm()
