"""The backward that computes the rows that matter in each vocabulary tile, and compensates for the rest.

The forward stored the log-sum-exp of every row and vocabulary tile. With the final lse they are probability masses, so
the backward knows before it starts which tiles each row needs: all but the lightest, whose summed mass stays within a
budget (`kernels/active.py`). Each tile gathers the rows that need it (`kernels/lists.py`). Of a tile that is skipped,
the target is computed, and the heaviest tokens that stand out (`kernels/top_gradient.py`). The others are replaced by
their mass, spread over each tile as rows spread it on average (`kernels/share.py`): two products as many times smaller
as a tile has columns. `kernels/sparse.py` has the formulas.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ..kernels.coded_gradient import coded_gradient_kernel
from ..kernels.lists import dense_rows_kernel
from ..kernels.sparse import (
    block_gradient_kernel,
    complete_hidden_kernel,
    hidden_gradient_kernel,
    weight_gradient_kernel,
)
from ..kernels.top_gradient import top_hidden_kernel, top_weight_kernel
from . import shares
from .kept_tiles import KeptTiles
from .launch import ignore_arguments, l2_cache_bytes, slope_arguments
from .problem import Problem, RowGradients, Tiles
from .quick_launch import Rounds, launch
from .row_lists import Active, RowLists, Skipped
from .sparse_operands import SparseOperands
from .sparse_rounds import blocks_of_a_round

LEAST_FLOPS = 10**12  # of the logits, one to two milliseconds: as long as the host takes to start the kernels
WARP_COLUMNS = 256  # 16 bytes of a row for each lane; where rows are narrower, lanes share columns
TOKEN_NUMBERS = 1024  # of rows of the weight that a warp keeps in registers
TOP_DEPTH = 256  # columns of them that it reads, where it need not read whole rows
_compensates = True


def worthwhile(problem: Problem, needs_grad: list[bool]) -> bool:
    """Whether to take the sparse backward, which knows one target a row and no gradients of maximum and entropy.

    Not where the bias needs a gradient, where planning costs more time than it saves, or where the logit map has a
    slope without a known bound, which the fixed-point sums need.
    """
    flops = 2 * problem.num_rows * problem.vocab_size * problem.width
    known = not problem.several_targets and problem.logit_map.slope_bound is not None
    return known and flops >= LEAST_FLOPS and not needs_grad[2]


def keeps_codes(problem: Problem) -> bool:
    """Whether codes that the forward keeps say enough, of slopes too."""
    return problem.logit_map.slope_by_value is not None


def backward(
    problem: Problem,
    lse: Tensor,
    tiles: Tiles,
    grads: RowGradients,
    needs_grad: list[bool],
    kept: KeptTiles | None = None,
    grad_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_hidden, grad_weight, an empty one for the bias), from what `cuda.forward` gave.

    kept: codes of the first tiles, of which some may lie in the memory of grad_weight.
    grad_weight: to be written.
    """
    kept = kept or KeptTiles()
    sparse = _SparseBackward(problem, lse, tiles, grads, needs_grad[0], kept)
    grad_hidden, grad_bias = (problem.hidden.new_empty(0) for _ in range(2))
    if grad_weight is None:
        grad_weight = problem.weight.new_empty(problem.weight.shape if needs_grad[1] else 0)
    kernels = [sparse.coded_blocks()] if kept.places else []
    if kept.first_left < sparse.num_tiles:
        kernels.append(sparse.blocks())
    if needs_grad[1]:
        kernels += [sparse.begin_weight(grad_weight), sparse.weight_gradient(grad_weight)]
    if needs_grad[0]:
        kernels.append(sparse.hidden_gradient())
    for round_index in range(sparse.lists.rounds):
        for kernel in kernels:
            kernel(round_index)
    del kernels, kernel, sparse.dz  # what comes now takes its memory
    if needs_grad[0]:
        grad_hidden = sparse.complete_hidden()
    return grad_hidden, grad_weight, grad_bias


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else a.float() @ b.float()


@contextlib.contextmanager
def without_compensation() -> Iterator[None]:
    """For experiments: what is skipped is lost."""
    global _compensates
    _compensates = False
    try:
        yield
    finally:
        _compensates = True


class _SparseBackward(SparseOperands):
    """The kernels of one sparse backward with what they share."""

    def __init__(
        self,
        problem: Problem,
        lse: Tensor,
        tiles: Tiles,
        grads: RowGradients,
        want_hidden: bool,
        kept: KeptTiles,
    ) -> None:
        super().__init__(problem)
        self.lse, self.grads = lse, grads
        block_n, block_v = self.config.block_n, self.config.block_v
        self.tiles, self.num_tiles, self.kept = tiles, len(tiles.lse), kept
        blocks = blocks_of_a_round(problem, self.config, self.products, self.processors, kept.bytes_apart)
        part = self.products.part
        active = Active.of(problem, lse, tiles, grads, block_v, part, tops=_compensates)
        self.lists = RowLists.of(active, tiles, block_n, blocks, block_v, part)
        self.skipped = Skipped.of(problem, lse, tiles, grads.lse, active, block_v)
        if not _compensates:
            self.skipped.mass.zero_()
        self.dense_hidden = self._dense_hidden()
        self.share = shares.of_columns(self, self.kept, lse, grads.lse, active, tiles, self.skipped)
        self.skipped_weight, self.weight_peak = shares.of_weight(self, self.share)
        self._compute_tops(active, want_hidden)
        del active  # the workspace takes its memory
        self.dz = self.hidden.new_empty(blocks * block_n, block_v)

    def _dense_hidden(self) -> Tensor:
        """The hidden states of the dense rows, as they are listed; what comes after them is not read."""
        block_n = self.config.block_n
        slots = -(-self.problem.num_rows // block_n)  # should all be dense
        dense_hidden = self.hidden.new_empty(slots * block_n, self.problem.width)
        launch(
            dense_rows_kernel,
            slots,
            hidden=self.hidden,
            slot_rows=self.lists.slot_rows,
            list_start=self.lists.list_start,
            dense_hidden=dense_hidden,
            width=self.problem.width,
            stride_hn=self.hidden.stride(0),
            stride_hd=self.hidden.stride(1),
            BLOCK_N=block_n,
            BLOCK_D=self.config.block_d,
        )
        return dense_hidden

    def _compute_tops(self, active: Active, want_hidden: bool) -> None:
        """The tokens that are computed alone. Their part of the hidden states' gradient begins its sums."""
        problem = self.problem
        rows, width = problem.hidden.shape
        known = active.row_dz is not None
        pairs = -(-width // 2) if want_hidden else 0
        self.top_dz = active.top_dz
        self.fixed = torch.empty(rows, pairs, dtype=torch.int64, device=self.lse.device)
        if known and not want_hidden:
            return
        block_d = max(2, triton.next_power_of_2(width))  # sums are kept in pairs
        # short loops that end at once in many programs, or whole rows, for which loads go ahead of the products
        block_d, warps, stages = (min(block_d, TOP_DEPTH), 1, 1) if known else (block_d, 8, self.config.num_stages)
        launch(
            top_hidden_kernel,
            rows * -(-width // block_d),
            hidden=self.hidden,
            weight=self.weight,
            bias=problem.bias,
            **self._rows(),
            **self._targets(),
            weight_peak=self.weight_peak,
            row_tokens=active.row_tokens,
            row_count=active.row_count,
            row_dz=active.row_dz,
            top_dz=self.top_dz,
            fixed=self.fixed,
            num_rows=rows,
            num_tiles=self.num_tiles,
            width=width,
            slope_bound=problem.logit_map.slope_bound,
            stride_hn=self.hidden.stride(0),
            stride_hd=self.hidden.stride(1),
            stride_wv=self.weight.stride(0),
            stride_wd=self.weight.stride(1),
            VALUE_AND_SLOPE=self.function,
            HAS_BIAS=problem.bias is not None,
            KNOWN=known,
            WANT_HIDDEN=want_hidden,
            BLOCK_V=self.config.block_v,
            BLOCK_D=block_d,
            TOKENS=max(1, warps * TOKEN_NUMBERS // block_d),
            NUM_STAGES=stages,
            num_warps=warps,
            enable_fp_fusion=self._lanes_share_no_column(block_d),
        )

    def _lanes_share_no_column(self, block_d: int) -> bool:
        """Where lanes of a warp add up a column together, each gets the sum and any of them may write it. They would
        not get the same bits if their own products were fused with the additions, and so not be rounded."""
        return self.hidden.stride(1) == self.weight.stride(1) == 1 and block_d >= WARP_COLUMNS

    def coded_blocks(self) -> Rounds:
        """dz of the blocks of a round into the workspace, of the tiles that have codes."""
        config = self.coded_config
        return Rounds(
            coded_gradient_kernel,
            self.processors * config.programs,
            **self.kept.code_arguments(),
            tile_lse=self.tiles.lse,
            tile_tops=self.tiles.tops,
            **self._rows(),
            **self._targets(),
            **slope_arguments(self.problem),
            target_logit=self.grads.target_logit,
            dz=self.dz,
            slot_tile=self.lists.slot_tile,
            last_kept=self.kept.first_left,
            num_rows=self.problem.num_rows,
            SLOT=self.config.block_n,
            BLOCK_N=config.block_n,
            BLOCK_V=config.block_v,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **self._lists(config.programs),
        )

    def blocks(self) -> Rounds:
        """dz of the blocks of a round into the workspace, of the other tiles."""
        config = self.config
        return Rounds(
            block_gradient_kernel,
            self.processors,
            **self.logits(),
            hidden=self.hidden,
            dense_hidden=self.blocks_of(self.dense_hidden, config.block_n, config.block_d),
            **self._rows(),
            **self._targets(),
            dz=self.blocks_of(self.dz, config.block_n, config.block_v),
            slot_tile=self.lists.slot_tile,
            first_left=self.kept.first_left,
            stride_hn=self.hidden.stride(0),
            stride_hd=self.hidden.stride(1),
            **self._lists(),
        )

    def begin_weight(self, grad_weight: Tensor) -> Rounds:
        """Writes the rows of the weight's gradient that belong to the tiles of a round, by the tokens that are computed
        alone and those that are skipped."""
        problem, products = self.problem, self.products
        return Rounds(
            top_weight_kernel,
            self.processors * products.part_programs,
            hidden=self.hidden,
            top_dz=self.top_dz,
            places=torch.arange(self.config.block_v, dtype=torch.int32, device=self.lse.device),
            share=self.share,
            skipped_hidden=_float32_product(self.skipped.mass, problem.hidden),
            grad_peak=self.skipped.grad_peak,
            skips=self.skipped.anything,
            scale=problem.weight_scale,
            grad_weight=grad_weight,
            counts=self.lists.counts,
            num_rows=problem.num_rows,
            num_columns=problem.vocab_size,
            num_tiles=self.num_tiles,
            width=problem.width,
            stride_hn=self.hidden.stride(0),
            stride_hd=self.hidden.stride(1),
            TILE_WIDTH=self.config.block_v,
            PART=products.part,
            BLOCK_N=self.config.block_n,
            BLOCK_D=products.part_depth,
            STEP=products.part_step,
            num_warps=4,
            num_stages=self.config.num_stages,
            **self._lists(products.part_programs),
        )

    def weight_gradient(self, grad_weight: Tensor) -> Rounds:
        """Adds to the rows of the weight's gradient that belong to the tiles of a round."""
        step = self.products.step
        return Rounds(
            weight_gradient_kernel,
            self.processors,
            hidden=self.hidden,
            dense_hidden=self.blocks_of(self.dense_hidden, step, self.products.weight_depth),
            dz=self.blocks_of(self.dz, step, self.config.block_v),
            skips=self.skipped.anything,
            scale=self.problem.weight_scale,
            grad_weight=grad_weight,
            counts=self.lists.counts,
            num_tiles=self.num_tiles,
            stride_hn=self.hidden.stride(0),
            stride_hd=self.hidden.stride(1),
            USE_TMA=self.tma,
            BLOCK_D=self.products.weight_depth,
            PARTS=self.config.block_v // self.products.part,
            **self.product(),
            **self._lists(),
        )

    def hidden_gradient(self) -> Rounds:
        """Adds the blocks of a round to the gradient of the hidden states, in fixed point."""
        products = self.products
        return Rounds(
            hidden_gradient_kernel,
            self.processors,
            **self.weight_operand(products.step, products.hidden_depth),
            dz=self.blocks_of(self.dz, self.config.block_n, products.step),
            **self._rows(),
            weight_peak=self.weight_peak,
            fixed=self.fixed,
            slot_tile=self.lists.slot_tile,
            depths_at_once=self._depths_at_once(),
            slope_bound=self.problem.logit_map.slope_bound,
            BLOCK_D=products.hidden_depth,
            **self.product(),
            **self._lists(),
        )

    def _depths_at_once(self) -> int:
        """How many blocks of columns of the hidden states' gradient fit in a third of the L2 cache: half of it is far
        from each processor, and what is read needs some too."""
        column_bytes = self.problem.num_rows * self.products.hidden_depth * 4
        return max(1, l2_cache_bytes(self.lse.device) // 3 // column_bytes)

    def complete_hidden(self) -> Tensor:
        """The gradient of the hidden states, from what all rounds added and what was skipped."""
        problem = self.problem
        grad_hidden = torch.empty(problem.hidden.shape, dtype=problem.hidden_dtype, device=self.lse.device)
        launch(
            complete_hidden_kernel,
            problem.num_rows,
            fixed=self.fixed,
            skipped=self.skipped.mass.T @ self.skipped_weight,
            **self._rows(),
            weight_peak=self.weight_peak,
            grad_peak=self.skipped.grad_peak,
            grad_hidden=grad_hidden,
            num_rows=problem.num_rows,
            width=problem.width,
            slope_bound=problem.logit_map.slope_bound,
            BLOCK_D=min(4096, triton.next_power_of_2(problem.width)),
        )
        return grad_hidden

    def _rows(self) -> dict[str, Any]:
        """What a kernel is told of each row."""
        return {"lse": self.lse, "grad_lse": self.grads.lse, "grad_picked": self.grads.picked}

    def _targets(self) -> dict[str, Any]:
        """The arguments of a kernel that looks at targets."""
        target = self.problem.target
        return {"target": target, "HAS_TARGET": target is not None, **ignore_arguments(self.problem)}

    def _lists(self, programs: int = 1) -> dict[str, Any]:
        """The arguments of a kernel that works on the blocks of a round, so many programs at a time on a processor."""
        return {
            "slot_rows": self.lists.slot_rows,
            "list_start": self.lists.list_start,
            "round_tiles": self.lists.round_tiles,
            "NUM_PROGRAMS": self.processors * programs,
        }
