"""The backward that computes the blocks of the logits that matter, and compensates for the rest.

The forward stored the log-sum-exp of every row and vocabulary tile. With the final lse they are probability masses, so
the backward knows before it starts which tiles each row needs: all but the lightest, whose summed mass stays within a
budget (`kernels/active.py`). Rows are sorted by how many tiles they need, so that those of a block agree. What is
skipped is replaced by its exact mass, spread over each tile as rows spread it on average (`kernels/share.py`): two
products as many times smaller as a tile has columns. `kernels/sparse.py` has the formulas.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels import template
from ..kernels.active import active_kernel
from ..kernels.config import product_config, tile_config
from ..kernels.share import share_kernel
from ..kernels.sparse import block_gradient_kernel, hidden_gradient_kernel, weight_gradient_kernel
from .block_plan import BlockPlan
from .launch import can_use_tma, device_properties, interpretable
from .problem import Problem

LEAST_FLOPS = 10**12  # of the logits, one to two milliseconds: as long as the host takes to start the kernels
SAMPLED_ROWS = 512  # from which the share of each token in its tile is estimated
EVERYWHERE = 2.0**-10  # how much a row counts for the share of a tile that it does not skip


def worthwhile(problem: Problem, needs_grad: list[bool]) -> bool:
    """Whether to take the sparse backward: not where the bias needs a gradient, nor where planning costs more time."""
    flops = 2 * problem.num_rows * problem.vocab_size * problem.width
    return flops >= LEAST_FLOPS and not needs_grad[2]


def backward(
    problem: Problem, lse: Tensor, tile_lse: Tensor, grads: list[Tensor], needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_hidden, grad_weight, an empty one for the bias), from what `cuda.forward` gave."""
    grad_lse, grad_picked = grads[:2]
    config = tile_config(device_properties(lse.device)[0], backward=True)
    active = _active(problem, lse, tile_lse, grad_lse, grad_picked, config.block_v)
    order = active.sum(0).argsort(descending=True, stable=True)
    rows = _Rows.of(problem, order, lse, grad_lse, grad_picked)
    blocks = _any_in_block(active[:, order], config.block_n)  # [tiles, row blocks]
    skipped = ~blocks.repeat_interleave(config.block_n, 1)[:, : problem.num_rows]
    mass = torch.exp(tile_lse[:, order] - rows.lse).mul_(rows.grad_lse)
    skipped_mass = torch.where(skipped, mass, 0.0).to(rows.hidden.dtype)
    sparse = _SparseBackward(problem, rows, blocks, skipped)

    empty = rows.hidden.new_empty(0)
    grad_hidden, grad_weight, skipped_hidden = empty, empty, empty
    if needs_grad[0]:
        skipped_weight = _tile_sums(sparse.share, sparse.weight, config.block_v)
        grad_hidden = (skipped_mass.T @ skipped_weight).float()
    if needs_grad[1]:
        skipped_hidden = skipped_mass @ rows.hidden
        grad_weight = torch.empty(problem.weight.shape, dtype=problem.weight.dtype, device=lse.device)
    for round_index in range(sparse.plan.rounds):
        sparse.compute_blocks(round_index)
        if needs_grad[1]:
            sparse.complete_weight(round_index, skipped_hidden, grad_weight)
        if needs_grad[0]:
            sparse.add_hidden(round_index, grad_hidden)
    if needs_grad[0]:
        in_order = grad_hidden.to(problem.hidden_dtype)
        grad_hidden = torch.empty_like(in_order).index_copy_(0, order, in_order)
    return grad_hidden, grad_weight, empty


@dataclass(frozen=True)
class _Rows:
    """What belongs to the rows of the logits, sorted."""

    hidden: Tensor  # [N, D], contiguous
    target: Tensor | None
    lse: Tensor
    grad_lse: Tensor
    grad_picked: Tensor

    @classmethod
    def of(cls, problem: Problem, order: Tensor, lse: Tensor, grad_lse: Tensor, grad_picked: Tensor) -> "_Rows":
        target = None if problem.target is None else problem.target[order]
        return cls(problem.hidden[order], target, lse[order], grad_lse[order], grad_picked[order])


def _any_in_block(active: Tensor, block_n: int) -> Tensor:
    """[tiles, row blocks]: whether any row of a block needs the tile."""
    tiles, num_rows = active.shape
    return F.pad(active, (0, -num_rows % block_n)).view(tiles, -1, block_n).any(2)


def _tile_sums(share: Tensor, weight: Tensor, block_v: int) -> Tensor:
    """[tiles, D]: the sum over each tile's columns of share[v] * weight[v]."""
    whole = weight.shape[0] // block_v * block_v
    share = share.to(weight.dtype)
    sums = torch.bmm(share[:whole].view(-1, 1, block_v), weight[:whole].unflatten(0, (-1, block_v))).squeeze(1)
    return sums if whole == weight.shape[0] else torch.cat([sums, share[None, whole:] @ weight[whole:]])


def _active(
    problem: Problem, lse: Tensor, tile_lse: Tensor, grad_lse: Tensor, grad_picked: Tensor, tile_width: int
) -> Tensor:
    """[tiles, N], bool: the tiles that each row needs."""
    tiles, num_rows = tile_lse.shape
    active = torch.empty(tiles, num_rows, dtype=torch.bool, device=lse.device)
    all_tiles = triton.next_power_of_2(tiles)
    rows = max(1, min(32, 16384 // all_tiles))
    active_kernel[(-(-num_rows // rows),)](
        tile_lse=tile_lse,
        lse=lse,
        grad_lse=grad_lse,
        grad_picked=grad_picked,
        target=problem.target,
        active=active,
        num_rows=num_rows,
        num_tiles=tiles,
        ignore_index=problem.ignore_index or 0,
        budget=problem.approximate_mass,
        HAS_TARGET=problem.target is not None,
        HAS_IGNORE_INDEX=problem.ignore_index is not None,
        TILE_WIDTH=tile_width,
        TILES=all_tiles,
        ROWS=rows,
        num_warps=8,
    )
    return active


class _SparseBackward:
    """The kernels of one sparse backward with the operands that they share."""

    def __init__(self, problem: Problem, rows: _Rows, blocks: Tensor, skipped: Tensor) -> None:
        self.problem, self.rows = problem, rows
        self.row_blocks = blocks.shape[1]
        capability, self.processors = device_properties(rows.hidden.device)
        self.config, self.products = tile_config(capability, backward=True), product_config(capability)
        self.weight = problem.weight.to(problem.compute_dtype)
        self.operands = [interpretable(tensor) for tensor in (rows.hidden, self.weight)]
        self.tma = can_use_tma(*self.operands)
        self.function = template.load(problem.logit_map).value_and_slope

        slot_bytes = self.config.block_n * self.config.block_v * problem.compute_dtype.itemsize
        slots = max(problem.workspace_bytes // slot_bytes, self.row_blocks)
        self.plan = BlockPlan.of(blocks, slots)
        dtype = self.operands[0].dtype
        self.dz = rows.hidden.new_empty(slots * self.config.block_n, self.config.block_v, dtype=dtype)
        self.share = self._share(skipped)

    def _share(self, skipped: Tensor) -> Tensor:
        """[V], float32: how a tile's skipped mass is spread over its columns, from evenly spaced rows."""
        step = max(1, self.problem.num_rows // SAMPLED_ROWS)
        sample = slice(step // 2, None, step)
        hidden = self.operands[0][sample].contiguous()
        weights = self.rows.grad_lse[sample].abs()
        scale = ((skipped[:, sample] + EVERYWHERE) * weights).contiguous()
        share = torch.empty(self.problem.vocab_size, dtype=torch.float32, device=hidden.device)
        tiles = skipped.shape[0]
        programs = min(tiles, self.processors)
        share_kernel[(programs,)](
            **self._logits(hidden),
            lse=self.rows.lse[sample].contiguous(),
            scale=scale,
            share=share,
            num_tiles=tiles,
            NUM_PROGRAMS=programs,
        )
        return share

    def compute_blocks(self, round_index: int) -> None:
        """dz of the active blocks of a round into the workspace."""
        problem, rows = self.problem, self.rows
        block_gradient_kernel[(self.processors,)](
            **self._logits(self.operands[0]),
            target=rows.target,
            lse=rows.lse,
            grad_lse=rows.grad_lse,
            grad_picked=rows.grad_picked,
            dz=self._blocks_of(self.dz, self.config.block_n, self.config.block_v),
            numbers=self.plan.numbers,
            round_places=self.plan.round_places,
            round_index=round_index,
            row_blocks=self.row_blocks,
            ignore_index=problem.ignore_index or 0,
            HAS_TARGET=rows.target is not None,
            HAS_IGNORE_INDEX=problem.ignore_index is not None,
            NUM_PROGRAMS=self.processors,
        )

    def complete_weight(self, round_index: int, skipped_hidden: Tensor, grad_weight: Tensor) -> None:
        """The rows of the weight's gradient that belong to the tiles of a round."""
        hidden, products = self.operands[0], self.products
        weight_gradient_kernel[(self.processors,)](
            hidden=self._blocks_of(hidden, products.step, products.weight_depth),
            dz=self._blocks_of(self.dz, products.step, self.config.block_v),
            share=self.share,
            skipped_hidden=skipped_hidden,
            grad_weight=grad_weight,
            numbers=self.plan.numbers,
            tile_start=self.plan.tile_start,
            round_tiles=self.plan.round_tiles,
            stride_hn=hidden.stride(0),
            stride_hd=hidden.stride(1),
            BLOCK_D=products.weight_depth,
            **self._product(round_index),
        )

    def add_hidden(self, round_index: int, grad_hidden: Tensor) -> None:
        """Adds the tiles of a round to the gradient of the sorted hidden states [N, D], float32."""
        weight, products, plan = self.operands[1], self.products, self.plan
        hidden_gradient_kernel[(self.processors,)](
            weight=self._blocks_of(weight, products.step, products.hidden_depth),
            dz=self._blocks_of(self.dz, self.config.block_n, products.step),
            grad_hidden=grad_hidden,
            row_tiles=plan.row_tiles,
            row_places=plan.row_places,
            row_start=plan.row_start,
            round_places=plan.round_places,
            stride_wv=weight.stride(0),
            stride_wd=weight.stride(1),
            BLOCK_D=products.hidden_depth,
            **self._product(round_index),
        )

    def _blocks_of(self, tensor: Tensor, rows: int, columns: int) -> Tensor | TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, [rows, columns]) if self.tma else tensor

    def _logits(self, hidden: Tensor) -> dict[str, Any]:
        """The arguments of a kernel that computes logits of these hidden states."""
        config, weight = self.config, self.operands[1]
        return {
            "hidden": self._blocks_of(hidden, config.block_n, config.block_d),
            "weight": self._blocks_of(weight, config.block_v, config.block_d),
            "bias": self.problem.bias,
            "num_rows": hidden.shape[0],
            "num_columns": self.problem.vocab_size,
            "width": self.problem.width,
            "stride_hn": hidden.stride(0),
            "stride_hd": hidden.stride(1),
            "stride_wv": weight.stride(0),
            "stride_wd": weight.stride(1),
            "VALUE_AND_SLOPE": self.function,
            "HAS_BIAS": self.problem.bias is not None,
            "USE_TMA": self.tma,
            "BLOCK_N": config.block_n,
            "BLOCK_V": config.block_v,
            "BLOCK_D": config.block_d,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def _product(self, round_index: int) -> dict[str, Any]:
        """The arguments that the two kernels for products have in common."""
        return {
            "round_index": round_index,
            "row_blocks": self.row_blocks,
            "num_rows": self.problem.num_rows,
            "num_columns": self.problem.vocab_size,
            "width": self.problem.width,
            "USE_TMA": self.tma,
            "BLOCK_N": self.config.block_n,
            "BLOCK_V": self.config.block_v,
            "STEP": self.products.step,
            "NUM_PROGRAMS": self.processors,
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
        }
