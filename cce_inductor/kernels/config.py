"""Tile shapes: a small table by architecture, measured once. Nothing is tuned at run time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TileConfig:
    """How a kernel cuts the logits into tiles and how its pipeline is set up."""

    block_n: int  # rows of a tile
    block_v: int  # columns of a tile
    block_d: int  # depth of one step of the inner product
    num_warps: int
    num_stages: int
    programs: int = 1  # at a time on a multiprocessor


INTERPRETER = TileConfig(16, 32, 16, 4, 1)
HOPPER = TileConfig(128, 256, 64, 8, 4)
HOPPER_BACKWARD = TileConfig(128, 256, 64, 8, 3)  # a tile of gradients needs shared memory too
AMPERE = TileConfig(128, 128, 32, 8, 3)


def _is_like_hopper(capability: tuple[int, int]) -> bool:
    """Whether a multiprocessor has some 200 KiB of shared memory, as Hopper's and Blackwell's in data centres do.

    Blackwell's in workstations (12.0 and 12.1) have 99 KiB, as the smaller ones of Ampere and Ada.
    """
    return (9, 0) <= capability < (12, 0)


def tile_config(capability: tuple[int, int] | None, backward: bool) -> TileConfig:
    """The configuration for 16-bit operands on a GPU of this compute capability; None is the interpreter."""
    if capability is None:
        return INTERPRETER
    if not _is_like_hopper(capability):
        return AMPERE
    return HOPPER_BACKWARD if backward else HOPPER


def kept_config(capability: tuple[int, int] | None) -> TileConfig:
    """The same for gradients of logits that are in memory: no product, so fewer rows for more programs at a time.

    Their tiles have the columns of the forward's.
    """
    forward = tile_config(capability, backward=False)
    return TileConfig(min(32, forward.block_n), forward.block_v, 16, num_warps=8, num_stages=1, programs=3)


def coded_config(capability: tuple[int, int] | None) -> TileConfig:
    """The same for what the forward of a sparse backward keeps."""
    backward = tile_config(capability, backward=True)
    return TileConfig(min(16, backward.block_n), backward.block_v, 16, num_warps=4, num_stages=1, programs=8)


def stored_config(capability: tuple[int, int] | None) -> TileConfig:
    """For passes over float32 logits that are in memory: long rows, so that memory is read in long pieces."""
    return INTERPRETER if capability is None else TileConfig(4, 1024, 16, num_warps=8, num_stages=1)


@dataclass(frozen=True)
class ProductConfig:
    """How the sparse backward cuts the gradients that its blocks are multiplied to."""

    weight_depth: int  # columns of a block of the weight's gradient, which has the rows of a tile's columns
    hidden_depth: int  # columns of a block of the hidden states' gradient, which has the rows of a tile
    step: int  # of the inner product
    part: int  # columns of a tile whose tokens that are computed alone are multiplied together
    part_depth: int  # columns of a block of the weight's gradient there
    part_step: int  # of the inner product there
    part_programs: int  # at a time on a multiprocessor there


INTERPRETER_PRODUCT = ProductConfig(16, 16, 8, 16, 16, 8, 1)
HOPPER_PRODUCT = ProductConfig(128, 256, 64, 64, 256, 64, 2)
AMPERE_PRODUCT = ProductConfig(128, 128, 32, 64, 128, 32, 2)


def product_config(capability: tuple[int, int] | None) -> ProductConfig:
    """The configuration of the sparse backward's products, by compute capability; None is the interpreter."""
    if capability is None:
        return INTERPRETER_PRODUCT
    return HOPPER_PRODUCT if _is_like_hopper(capability) else AMPERE_PRODUCT
