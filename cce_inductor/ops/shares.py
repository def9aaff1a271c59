"""How the mass that is skipped of a vocabulary tile is spread over its columns: `kernels/share.py` has the formulas."""

import torch
import triton
from torch import Tensor

from ..kernels.share import coded_share_kernel, sample_kernel, share_kernel, skipped_weight_kernel
from .kept_tiles import KeptTiles
from .launch import slope_arguments
from .problem import Tiles
from .quick_launch import launch
from .row_lists import Active, Skipped
from .sparse_operands import SparseOperands

SAMPLED_ROWS = 128  # whose logits are computed again for it
SAMPLED_CODES = 512  # rows whose codes are read
WEIGHT_ROWS = 32  # that a program reads at a time
WEIGHT_DEPTH = 256  # columns of the weight that it sums up


def of_columns(
    operands: SparseOperands,
    kept: KeptTiles,
    lse: Tensor,
    grad_lse: Tensor,
    active: Active,
    tiles: Tiles,
    skipped: Skipped,
) -> Tensor:
    """The share of each column in its tile [V], from some of the rows."""
    problem, config, coded_config = operands.problem, operands.config, operands.coded_config
    count = len(tiles.lse)
    share = torch.empty(problem.vocab_size, dtype=torch.float32, device=lse.device)
    known = {
        "lse": lse,
        "grad_lse": grad_lse,
        "skipped_mass": skipped.mass,
        "active": active.pairs,
        "tile_tops": tiles.tops,
        "skips": skipped.anything,
        "share": share,
        "num_rows": problem.num_rows,
        "num_tiles": count,
    }
    if kept.places:
        sample = sample_of(grad_lse, SAMPLED_CODES)
        launch(
            coded_share_kernel,
            kept.first_left,
            **known,
            **kept.code_arguments(),
            sample=sample,
            tile_lse=tiles.lse,
            num_columns=problem.vocab_size,
            number=len(sample),
            **slope_arguments(problem),
            BLOCK_N=coded_config.block_n,
            BLOCK_V=coded_config.block_v,
            num_warps=coded_config.num_warps,
        )
    if kept.first_left < count:
        sample = sample_of(grad_lse, SAMPLED_ROWS)
        hidden = operands.hidden[sample]
        launch(
            share_kernel,
            min(count - kept.first_left, operands.processors),
            **known,
            **operands.logits(),
            sampled_hidden=operands.blocks_of(hidden, config.block_n, config.block_d),
            sample=sample,
            number=len(sample),
            first_left=kept.first_left,
            stride_hn=hidden.stride(0),
            stride_hd=hidden.stride(1),
            NUM_PROGRAMS=operands.processors,
        )
    return share


def sample_of(grad_lse: Tensor, number: int) -> Tensor:
    """So many rows that have a gradient, or all rows if they are no more, [number], int32."""
    rows = len(grad_lse)
    places = torch.empty(rows, dtype=torch.int32, device=grad_lse.device)
    sample = torch.empty(min(number, rows), dtype=torch.int32, device=grad_lse.device)
    launch(
        sample_kernel,
        1,
        grad_lse=grad_lse,
        places=places,
        sample=sample,
        num_rows=rows,
        number=len(sample),
        NUMBER=triton.next_power_of_2(len(sample)),
        ROWS=1024,
    )
    return sample


def of_weight(operands: SparseOperands, share: Tensor) -> tuple[Tensor, Tensor]:
    """(what is skipped of each tile as a row of the weight [tiles, D], the bits of the weight's largest number [1])."""
    problem, weight, tile_width = operands.problem, operands.weight, operands.config.block_v
    tiles, width = -(-problem.vocab_size // tile_width), problem.width
    skipped_weight = weight.new_empty(tiles, width, dtype=problem.compute_dtype)
    weight_peak = torch.zeros(1, dtype=torch.int32, device=weight.device)
    depth = min(WEIGHT_DEPTH, triton.next_power_of_2(width))
    launch(
        skipped_weight_kernel,
        tiles * -(-width // depth),
        weight=weight,
        share=share,
        skipped_weight=skipped_weight,
        weight_peak=weight_peak,
        num_columns=problem.vocab_size,
        width=width,
        stride_wv=weight.stride(0),
        stride_wd=weight.stride(1),
        TILE_WIDTH=tile_width,
        BLOCK_V=min(WEIGHT_ROWS, tile_width),
        BLOCK_D=depth,
        num_warps=8,
    )
    return skipped_weight, weight_peak
