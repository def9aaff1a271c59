"""Problems for sparse backwards, and what the forward records of them."""

import pytest
import torch
from cases import Case

from cce_inductor.logit_map import LogitMap
from cce_inductor.ops import cuda, row_lists, shares, sparse
from cce_inductor.ops.problem import RowGradients, Tiles
from cce_inductor.ops.row_lists import Active

TILE_ROWS, TILE_WIDTH, PART = 16, 32, 16  # of the interpreter's tiles


@pytest.fixture(autouse=True)
def few_sampled_rows(monkeypatch):
    """Shares are of fewer rows than there are, in the modules that have this fixture."""
    for name in ("SAMPLED_ROWS", "SAMPLED_CODES"):
        monkeypatch.setattr(shares, name, 16)


def make(rows, vocab, width, **options):
    """A problem that the sparse backward takes, with a softmax peaked as a trained model's, and gradients of a loss."""
    case = Case(rows, vocab, width, **{"bias": False, "total": False, "class_weight": False} | options)
    case.hidden = case.hidden * 4
    counts = case.targets != case.ignore_index
    case.grads[0] = torch.where(counts, case.grads[0].abs(), 0.0)
    case.grads[1] = -case.grads[0]
    return case


def mapped_logits(case):
    """x, [N, V] in float64."""
    bias = 0.0 if case.bias_vector is None else case.bias_vector.double()
    return LogitMap.parse(case.logit_map)(case.hidden.double() @ case.weight.double().T + bias)


def recorded(case):
    """What the forward records of the tiles, of which it keeps nothing on a CPU."""
    x = mapped_logits(case)
    log_q = [tile.log_softmax(1) for tile in x.split(TILE_WIDTH, dim=1)]
    lse = torch.stack([tile.logsumexp(1) for tile in x.split(TILE_WIDTH, dim=1)])
    return Tiles(lse.float(), torch.stack([_records(case, *tile) for tile in enumerate(log_q)]))


def _records(case, number, log_q):
    """[N, 2]: the places of the two heaviest tokens of a tile, or the target and another, with the shares left."""
    first, columns = number * TILE_WIDTH, torch.arange(log_q.shape[1])
    is_target = (case.targets[:, None] == first + columns) & (case.targets != case.ignore_index)[:, None]
    padded = torch.nn.functional.pad(log_q, (0, 2), value=-torch.inf)  # of a tile of one column
    in_order = torch.where(torch.nn.functional.pad(is_target, (0, 2)), torch.inf, padded)
    places = in_order.topk(2, dim=1).indices
    without = torch.stack([padded.scatter(1, places[:, :count], -torch.inf).logsumexp(1) for count in (1, 2)], 1)
    return (without.exp().float().nan_to_num(0.0).view(torch.int32) & -TILE_WIDTH) | places.int() % TILE_WIDTH


def target_logits(case):
    """x of the targets, [N]; zero where a row has none."""
    counts = case.targets != case.ignore_index
    return torch.where(counts, mapped_logits(case).gather(1, case.targets.clamp(min=0)[:, None])[:, 0], 0.0).float()


def all_active(problem, lse, tiles, grads, tops=True):
    """What each row needs, with no row dense."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_lists, "DENSE_SHARE", 1.0)
        return Active.of(problem, lse, tiles, RowGradients(*grads[:2], total=grads[0]), TILE_WIDTH, PART, tops)


def active_and_tops(active):
    """[tiles, N] and [tiles, N, 2]."""
    tiles = len(active.top_dz)
    return active.pairs[1 : 1 + tiles], active.pairs[1 + tiles :].view(active.top_dz.shape)


def shares_left(tiles):
    """The shares of the tiles that are left without the first and without both tokens, [tiles, N, 2]."""
    return (tiles.tops & -TILE_WIDTH).view(torch.float32)


def rests_of(tiles, tops):
    """The shares of the tiles that are left without those of their tops that are computed alone, [tiles, N]."""
    first, both = shares_left(tiles).unbind(2)
    return torch.where(tops[..., 1], both, torch.where(tops[..., 0], first, 1.0))


def backward(case, mass, workspace_bytes=1 << 16):
    problem = case.problem(approximate_mass=mass, workspace_bytes=workspace_bytes)
    lse = cuda.forward(problem)[0]
    return sparse.backward(problem, lse, recorded(case), case.row_gradients(), [True, True, False])
