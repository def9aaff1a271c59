"""`scaled_loss` on a CPU in bfloat16, where most of the softmax is next to nothing: the gradients of what matters.

The forward keeps the log-sum-exp of every row and tile of the vocabulary, from which follows how much probability each
row has in each tile. A row needs all tiles but the lightest (`needed_tiles`). Tile by tile, the rows that need it are
gathered, and their logits computed again:

    mass[j, n]        = sum over v in tile j of p[n, v] = exp(tile_lse[j, n] - lse[n])
    dz[n, v]          = (p[n, v] - [v == target[n]]) * coefficient[n] * f'(z[n, v])     where row n needs the tile of v
    skipped[j, n]     = mass[j, n] * coefficient[n]                                     where it doesn't, else 0
    skipped_hidden[j] = sum over n of skipped[j, n] * hidden[n]
    skipped_weight[j] = sum over v in tile j of share[v] * weight[v]

    grad_weight[v] = sum over n of dz[n, v] * hidden[n] + share[v] * skipped_hidden[tile of v]
    grad_hidden[n] = sum over v of dz[n, v] * weight[v] + sum over j of skipped[j, n] * skipped_weight[j]

Of what is skipped all is known but its place within the tile. That is taken to be where a sample of rows has it: the
share, which sums to one over a tile (where f' is one). To the products of a tile this is one row more: its hidden state
is skipped_hidden[j], its dz is the share, and its product with the weight is skipped_weight[j].

Products are rounded to 16 bits, as eager's are, but relative to that of the row's target (`_level`): where a softmax is
peaked, logits that matter are close to each other and may be far from zero.

A look at a few rows says beforehand whether there is enough to skip. If not, gradients are exact (`in_forward.py`).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import compat
from . import cpu
from .blocks import Gradients, add_matmul
from .counted import with_rows
from .kept import KeptLogits
from .problem import Problem, Reductions, RowGradients, evenly_spaced, spans

TILE = 64  # columns: the narrower, the more can be skipped, down to where small products get slow
BUDGET_PART = 0.5  # of what may be approximated; where no token is computed alone, skipping does twice the harm
PIECES = 128  # no skipped tile is heavier than the budget / PIECES
BISECTIONS = 5
LOOKED_AT = 32  # rows, to see whether there is enough to skip
MOST_NEEDED = 0.6  # of all pairs of a row and a tile; with more of them exact gradients take less time
SAMPLED_ROWS = 128  # from which the share is estimated
SAMPLED_SHARE = 16  # at most one row in so many
LEAST_PRODUCT = 1 << 19  # rows x width; below, a tile's operations take longer to start than to run
EVERYWHERE = 2.0**-10  # how much a row counts for the share of a tile that it doesn't skip
MULTIPLE = 64  # of the rows of a product: each shape that is new takes a millisecond


def may_skip(problem: Problem) -> bool:
    """Whether gradients may be approximate, and it can pay: in a large problem, where products take long.

    Where the CPU has units for them, all of them take less time than gathering rows for some.
    """
    if compat.multiplies_in_hardware():
        return False
    large = problem.num_rows * problem.width >= LEAST_PRODUCT and problem.vocab_size > TILE
    bfloat16 = not problem.hidden.is_cuda and problem.compute_dtype == torch.bfloat16
    return large and bfloat16 and problem.approximate_mass > 0


def skips_enough(problem: Problem, coefficient: Tensor) -> bool:
    """Whether there is enough to skip, by the look of a few rows."""
    sample = _Sample.of(problem, coefficient, LOOKED_AT, problem.hidden.new_empty(0))
    return sample is not None and sample.needed.float().mean().item() <= MOST_NEEDED


def token_shares(problem: Problem, coefficient: Tensor, grad_weight: Tensor) -> Tensor:
    """The share [V] of each token in its tile.

    grad_weight: memory that is free until the gradient is written; the logits of the sample are kept there.
    """
    share = problem.zeros(problem.vocab_size)
    sample = _Sample.of(problem, coefficient, SAMPLED_ROWS, grad_weight)
    if sample is None:
        return share
    scale = torch.where(sample.needed, EVERYWHERE, 1 + EVERYWHERE) * sample.coefficient.abs()  # [tiles, rows]
    for columns in spans(problem.vocab_size, sample.block_columns):
        p = sample.probabilities(columns)  # times f'
        for tokens, part in zip(spans(columns.stop, TILE, columns.start), p.split(TILE, 1), strict=True):
            share[tokens] = scale[tokens.start // TILE] @ part.to(share.dtype)
    tile_sum = (scale * sample.mass).sum(1).repeat_interleave(TILE)[: problem.vocab_size]
    return torch.where(tile_sum > 0, share / tile_sum, 0.0)


@dataclass(frozen=True)
class _Sample:
    """Evenly spaced rows among those that have a gradient."""

    problem: Problem  # of these rows
    coefficient: Tensor  # [rows]
    lse: Tensor  # [rows]
    mass: Tensor  # [tiles, rows]
    needed: Tensor  # [tiles, rows]
    block_columns: int
    kept: KeptLogits
    scratch: cpu.Scratch

    @classmethod
    def of(cls, problem: Problem, coefficient: Tensor, most: int, grad_weight: Tensor) -> "_Sample | None":
        """None without such rows."""
        matters = coefficient != 0
        number = min(most, max(1, problem.num_rows // SAMPLED_SHARE), int(matters.sum()))
        if number == 0:
            return None
        rows = evenly_spaced(matters, number)
        few = replace(with_rows(problem, rows), target=None)
        columns = _block_shape(few)[1]
        kept, scratch = KeptLogits.within(few, number, columns, 0, grad_weight), cpu.Scratch(few, number, columns)
        results = cpu.reduce_rows(few, slice(0, number), number, columns, kept, scratch, tile=TILE)
        mass = _tile_masses(results)
        needed = needed_tiles(mass, BUDGET_PART * problem.approximate_mass)
        return cls(few, coefficient[rows], results.lse, mass, needed, columns, kept, scratch)

    def probabilities(self, columns: slice) -> Tensor:
        """[rows, columns] of p[n, v] * f'(z[n, v])."""
        ones = torch.ones_like(self.lse)
        fill = cpu.gradient_of(self.problem, self.lse, RowGradients(ones, ones, ones), self.kept, self.scratch)
        weight = self.problem.weight_rows(columns)
        p = self.problem.hidden.new_empty(len(ones), len(weight))
        fill(slice(0, len(ones)), columns, weight, p, None)
        return p


def _block_shape(problem: Problem) -> tuple[int, int]:
    """That of the exact implementation, in whole tiles."""
    rows, columns = cpu.block_shape(problem)
    return rows, max(columns // TILE, 1) * TILE


def _tile_masses(results: Reductions) -> Tensor:
    """[tiles, N]; takes the place of the tiles' log-sum-exps."""
    return results.tile_lse.sub_(results.lse).exp_()


def needed_tiles(mass: Tensor, budget: float) -> Tensor:
    """[tiles, N], bool: all but the lightest tiles of each row, whose masses sum to the budget at most.

    A row whose masses are not numbers needs all tiles.
    """
    high = torch.full_like(mass[0], budget / PIECES)
    low = (high / max(1.0, len(mass) / PIECES)).mul_(0.999)  # all tiles that are lighter are within the budget
    for _ in range(BISECTIONS):
        middle = (low * high).sqrt()
        fits = torch.where(mass < middle, mass, 0.0).sum(0) <= budget
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return ~(mass < low)


def loss_and_gradients(
    problem: Problem, coefficient: Tensor, share: Tensor, gradients: Gradients
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, grad_hidden, grad_weight, grad_bias), where all rows count and their targets are classes.

    gradients: room for them; nothing was written to it.
    """
    target = problem.target
    assert target is not None
    problem = replace(problem, level=_level(problem, target))
    shape = _block_shape(problem)
    everything = slice(0, problem.num_rows)
    results = cpu.reduce_rows(problem, everything, *shape, KeptLogits(), cpu.Scratch(problem, *shape), tile=TILE)
    loss = (coefficient * (results.lse - results.picked + results.lse_rest)).sum()
    mass = _tile_masses(results)
    needed = needed_tiles(mass, BUDGET_PART * problem.approximate_mass) & ((coefficient != 0) | results.lse.isnan())
    needed.scatter_(0, (target // TILE).unsqueeze(0), True)
    skipped = mass.mul_(coefficient).masked_fill_(needed, 0.0)
    _add_tiles(_Rows.of(problem, coefficient, results.lse), needed, skipped, share, gradients)
    return loss, *gradients.results(problem)


def _level(problem: Problem, target: Tensor) -> Tensor:
    """The products of the targets [N], roughly, where they are above zero: more probable ones are closer to that."""
    products = problem.hidden * problem.weight[target].to(problem.compute_dtype)
    return products.sum(1).nan_to_num_(0.0, 0.0, 0.0).clamp_(min=0.0)


def _add_tiles(rows: "_Rows", needed: Tensor, skipped: Tensor, share: Tensor, gradients: Gradients) -> None:
    """Writes the gradients. needed, skipped: [tiles, N]; share: [V]."""
    problem = rows.problem
    needs_hidden, needs_weight, needs_bias = (
        g.numel() > 0 for g in (gradients.hidden, gradients.weight, gradients.bias)
    )
    skipped_bias = skipped.sum(1)
    skipped = skipped.to(problem.compute_dtype)
    skipped_hidden = skipped @ problem.hidden
    skipped_weight = torch.empty_like(skipped_hidden)
    gradients.hidden.zero_()
    room = problem.hidden.new_empty(problem.num_rows + MULTIPLE, problem.width)
    for tile, columns in enumerate(spans(problem.vocab_size, TILE)):
        listed = needed[tile].nonzero().squeeze(1)
        count, weight = len(listed), problem.weight_rows(columns)
        hidden = room[: -(-(count + 1) // MULTIPLE) * MULTIPLE]
        torch.index_select(problem.hidden, 0, listed, out=hidden[:count])
        hidden[count], hidden[count + 1 :] = skipped_hidden[tile], 0.0
        level = torch.nn.functional.pad(rows.level[listed], (0, len(hidden) - count)).unsqueeze(1)
        dz = torch.addmm(level, hidden, weight.T, beta=-1)
        exact = rows.gradient(tile, columns, listed, dz[:count])
        dz[:count], dz[count], dz[count + 1 :] = exact, share[columns], 0.0
        if needs_weight:
            add_matmul(gradients.weight[columns], dz.T, hidden, first=True)
        if needs_hidden:
            product = dz @ weight
            skipped_weight[tile] = product[count]
            gradients.hidden.index_add_(0, listed, product[:count].to(gradients.hidden.dtype))
        if needs_bias:
            gradients.bias[columns] = exact.sum(0) + share[columns] * skipped_bias[tile]
    if needs_hidden:
        gradients.hidden += skipped.T @ skipped_weight


@dataclass(frozen=True)
class _Rows:
    """What a row's dz depends on."""

    problem: Problem
    coefficient: Tensor  # [N]
    lse: Tensor  # [N]
    level: Tensor  # [N]
    by_target: Tensor  # [N]: rows in the order of the tiles of their targets
    last: list[int]  # [tiles]: where each tile's rows end there

    @classmethod
    def of(cls, problem: Problem, coefficient: Tensor, lse: Tensor) -> "_Rows":
        assert problem.target is not None
        assert problem.level is not None
        tiles = problem.target // TILE
        last = tiles.bincount(minlength=-(-problem.vocab_size // TILE)).cumsum(0)
        return cls(problem, coefficient, lse, problem.level, tiles.argsort(stable=True), last.tolist())

    def gradient(self, tile: int, columns: slice, listed: Tensor, product: Tensor) -> Tensor:
        """dz [rows, columns] of the listed rows, which have those whose target is there, from hidden @ weight.T."""
        problem = self.problem
        z = product.to(self.lse.dtype, copy=True).add_(self.level[listed].unsqueeze(1))
        if problem.bias is not None:
            z += problem.bias[columns]
        x, slope = problem.logit_map.value_and_derivative(z)
        dx = (x - self.lse[listed].unsqueeze(1)).exp_().mul_(self.coefficient[listed].unsqueeze(1))
        hits = self.by_target[self.last[tile - 1] if tile > 0 else 0 : self.last[tile]]
        if len(hits) > 0:
            assert problem.target is not None
            dx[torch.searchsorted(listed, hits), problem.target[hits] - columns.start] -= self.coefficient[hits]
        return dx if slope is None else dx.mul_(slope)
