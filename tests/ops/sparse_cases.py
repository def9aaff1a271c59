"""Problems for sparse backwards, and what the forward records of them."""

import pytest
import torch
from cases import Case

from cce_inductor.logit_map import LogitMap
from cce_inductor.ops import cuda, row_lists, sparse
from cce_inductor.ops.problem import RowGradients, Tiles
from cce_inductor.ops.row_lists import Active

TILE_ROWS, TILE_WIDTH, PART = 16, 32, 16  # of the interpreter's tiles


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
    columns = torch.stack([tile.argmax(1) for tile in log_q])
    rows = (case.targets != case.ignore_index).nonzero().squeeze(1)
    columns[case.targets[rows] // TILE_WIDTH, rows] = case.targets[rows] % TILE_WIDTH
    of_tops = torch.stack([tile.gather(1, column[:, None])[:, 0] for tile, column in zip(log_q, columns, strict=True)])
    rests = -torch.expm1(of_tops)
    lse = torch.stack([tile.logsumexp(1) for tile in x.split(TILE_WIDTH, dim=1)])
    return Tiles(lse.float(), (rests.float().view(torch.int32) & -TILE_WIDTH) | columns.int())


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
    """Two [tiles, N]."""
    return active.pairs[1:].chunk(2)


def rests_of(tiles):
    """The shares of the tiles that are left without their tops."""
    return (tiles.top & -TILE_WIDTH).view(torch.float32)


def backward(case, mass, workspace_bytes=1 << 16):
    problem = case.problem(approximate_mass=mass, workspace_bytes=workspace_bytes)
    lse = cuda.forward(problem)[0]
    return sparse.backward(problem, lse, recorded(case), case.row_gradients(), [True, True, False])
