"""Tile shapes: a small table by architecture and dtype, measured once. Nothing is tuned at run time."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TileConfig:
    """How a kernel cuts the logits into tiles and how its pipeline is set up."""

    block_n: int  # rows of a tile
    block_v: int  # columns of a tile
    block_d: int  # depth of one step of the inner product
    num_warps: int
    num_stages: int
    flatten: bool = False  # let the compiler overlap one tile's epilogue with the next tile's loads


INTERPRETER = TileConfig(16, 32, 16, 4, 1)
HOPPER_16BIT = TileConfig(128, 256, 64, 8, 4)
HOPPER_16BIT_BACKWARD = TileConfig(128, 256, 64, 8, 3)
HOPPER_TF32 = TileConfig(128, 128, 32, 8, 4)
AMPERE_16BIT = TileConfig(128, 128, 32, 8, 3)
AMPERE_TF32 = TileConfig(128, 64, 32, 4, 3)
IEEE_FLOAT32 = TileConfig(64, 64, 16, 4, 3)


def tile_config(
    dtype: torch.dtype, precision: str, capability: tuple[int, int] | None, backward: bool
) -> TileConfig:
    """The configuration for operands of `dtype` on a GPU of this compute capability; None is the interpreter."""
    if capability is None:
        return INTERPRETER
    hopper = capability >= (9, 0)
    if dtype == torch.float32:
        if precision == "ieee":
            return IEEE_FLOAT32
        return HOPPER_TF32 if hopper else AMPERE_TF32
    if not hopper:
        return AMPERE_16BIT
    return HOPPER_16BIT_BACKWARD if backward else HOPPER_16BIT
