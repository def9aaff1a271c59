"""How the probability mass that rows skip is spread over the columns of a tile, estimated from some rows:

    share[v] = sum over n of s[n] * p[n, v] * f'(z[n, v])  /  sum over n and u in v's tile of s[n] * p[n, u]
               of the pairs of n and v that are skipped, or were if v's tile were
    skipped_weight[tile] = sum over v in the tile of share[v] * weight[v]

With a scale s that is large where a row skips the tile, share is the mean of what is skipped. It sums to one over a
tile (where f' is one). A token without probability anywhere gets none here, so its row of the weight is left in peace.
Codes that the forward kept (`codes.py`) tell p without a product.
"""

import triton
import triton.language as tl

from .codes import among_columns, load_cubes, place_of_codes
from .pointwise import exp, log
from .tile import preactivations
from .tops import column_of, shares_of

EVERYWHERE = tl.constexpr(2.0**-10)  # how much a row counts for the share of a tile that it does not skip


@triton.jit(do_not_specialize=["num_rows", "number"])
def sample_kernel(
    grad_lse,  # [N]
    places,  # [N], int32: the rows that have a gradient, in order
    sample,  # [number], int32
    num_rows,
    number,
    NUMBER: tl.constexpr,  # a power of two, at least `number`
    ROWS: tl.constexpr,  # at a time
):
    """One program takes rows that have a gradient, evenly spaced among these; any rows if there is none."""
    found = 0
    for row in range(0, num_rows, ROWS):
        rows = row + tl.arange(0, ROWS)
        has_gradient = tl.load(grad_lse + rows, mask=rows < num_rows, other=0.0) != 0.0
        here = has_gradient.to(tl.int32)
        tl.store(places + found + tl.cumsum(here, 0) - 1, rows, mask=has_gradient)
        found += tl.sum(here, 0)
    tl.debug_barrier()  # other threads of the program wrote what is read now
    index = tl.arange(0, NUMBER)
    wanted = ((2 * index.to(tl.int64) + 1) * found // (2 * number)).to(tl.int32)
    chosen = tl.load(places + wanted, mask=index < number, other=0)
    tl.store(sample + index, tl.where(found > 0, chosen, 0), mask=index < number)


@triton.jit
def _of_sample(
    sample, grad_lse, skipped_mass, active, tile_tops, first, number, tile, num_rows, num_tiles,
    BLOCK_N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(rows, which there are, their scales, the places in the tile of two tokens that each does not skip or -1)."""
    index = first + tl.arange(0, BLOCK_N)
    mask = index < number
    rows = tl.load(sample + index, mask=mask, other=0)
    here = tl.cast(tile, tl.int64) * num_rows + rows
    skips = tl.load(skipped_mass + here, mask=mask, other=0.0) != 0.0
    scale = tl.abs(tl.load(grad_lse + rows, mask=mask, other=0.0)) * tl.where(skips, 1.0 + EVERYWHERE, EVERYWHERE)
    tops = active + (1 + num_tiles.to(tl.int64)) * num_rows
    top = _column_of_top(tops, tile_tops, 2 * here, mask, TILE)
    return rows, mask, scale, top, _column_of_top(tops, tile_tops, 2 * here + 1, mask, TILE)


@triton.jit
def _column_of_top(tops, tile_tops, places, mask, TILE: tl.constexpr):
    is_top = tl.load(tops + places, mask=mask, other=0) != 0
    return tl.where(is_top, column_of(tl.load(tile_tops + places, mask=mask, other=0), TILE), -1)


@triton.jit
def _skipped(top, other_top, TILE: tl.constexpr):
    """Which columns of the tile rows skip, [rows, TILE]."""
    columns = tl.arange(0, TILE)[None, :]
    return (columns != top[:, None]) & (columns != other_top[:, None])


@triton.jit(do_not_specialize=["num_rows", "num_columns", "num_tiles", "number", "first_left"])
def share_kernel(
    sampled_hidden,  # TMA descriptor or pointer, [number, D]: the hidden states of the sample
    weight,  # TMA descriptor or pointer, [V, D]
    bias,  # [V]
    sample,  # [number], int32
    lse,  # [N]
    grad_lse,  # [N]
    skipped_mass,  # [tiles, N]
    active,  # bool: dense rows [N], active pairs [tiles, N], tops [tiles, N, 2]
    tile_tops,  # [tiles, N, 2], int32
    skips,  # [tiles], bool: whether any row skips the tile
    share,  # [V]
    num_rows,
    num_columns,  # V
    num_tiles,
    number,
    first_left,  # the first tile that is left to this kernel
    width,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    VALUE_AND_SLOPE: tl.constexpr,  # the generated function (f, f')
    HAS_BIAS: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    """share of the tiles from one on."""
    for tile in tl.range(first_left + tl.program_id(0), num_tiles, NUM_PROGRAMS):
        column = tile * BLOCK_V
        columns = column + tl.arange(0, BLOCK_V)
        column_mask = columns < num_columns
        mass = tl.zeros((BLOCK_V,), dtype=tl.float32)
        force = tl.zeros((BLOCK_V,), dtype=tl.float32)
        for first in range(0, tl.where(tl.load(skips + tile), number, 0), BLOCK_N):
            z = preactivations(
                sampled_hidden, weight, bias, first, column, number, num_columns, width,
                stride_hn, stride_hd, stride_wv, stride_wd, HAS_BIAS, USE_TMA, BLOCK_N, BLOCK_V, BLOCK_D,
            )  # fmt: skip
            x, slope = VALUE_AND_SLOPE(z)
            rows, row_mask, scale, top, other_top = _of_sample(
                sample, grad_lse, skipped_mass, active, tile_tops, first, number, tile, num_rows, num_tiles,
                BLOCK_N, BLOCK_V,
            )  # fmt: skip
            row_lse = tl.load(lse + rows, mask=row_mask, other=float("inf"))
            p = exp(x - row_lse[:, None]) * scale[:, None]
            p = tl.where(column_mask[None, :] & _skipped(top, other_top, BLOCK_V), p, 0.0)
            mass += tl.sum(p, 0)
            force += tl.sum(p * slope, 0)
        tile_mass = tl.sum(mass, 0)
        tl.store(share + columns, tl.where(tile_mass > 0.0, force / tile_mass, 0.0), mask=column_mask)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "num_tiles", "number", "first_apart"])
def coded_share_kernel(
    codes,
    codes_apart,
    sample,  # [number], int32
    tile_lse,  # [tiles, N]
    lse,  # [N]
    grad_lse,  # [N]
    skipped_mass,  # [tiles, N]
    active,  # bool: dense rows [N], active pairs [tiles, N], tops [tiles, N, 2]
    tile_tops,  # [tiles, N, 2], int32
    skips,  # [tiles], bool: whether any row skips the tile
    share,  # [V]
    num_rows,
    num_columns,  # V
    num_tiles,
    number,
    first_apart,
    SAME_SLOPE: tl.constexpr,  # whether f' is the same everywhere
    SLOPE_BY_VALUE: tl.constexpr,  # the generated function f' of x
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program writes share of a tile that has codes."""
    tile = tl.program_id(0)
    kept, tile_there = place_of_codes(codes, codes_apart, first_apart, tile)
    mass = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    force = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for first in range(0, tl.where(tl.load(skips + tile), number, 0), BLOCK_N):
        rows, row_mask, scale, top, other_top = _of_sample(
            sample, grad_lse, skipped_mass, active, tile_tops, first, number, tile, num_rows, num_tiles,
            BLOCK_N, BLOCK_V,
        )  # fmt: skip
        here = tile.to(tl.int64) * num_rows + rows
        first_top, second_top = tl.load(tile_tops + 2 * here), tl.load(tile_tops + 2 * here + 1)
        row_lse = tl.load(lse + rows)
        of_tile = exp(tl.load(tile_lse + here) - row_lse)
        cubes = load_cubes(kept, first_top, second_top, tile_there, rows, row_mask, num_rows, BLOCK_V)
        of_first, of_second, of_others = shares_of(first_top, second_top, BLOCK_V)
        p = among_columns(cubes, of_tile * of_first, of_tile * of_second, of_tile * of_others)
        skipped = tl.where(_skipped(top, other_top, BLOCK_V), p * scale[:, None], 0.0)
        mass += skipped
        if not SAME_SLOPE:
            force += skipped * SLOPE_BY_VALUE(log(p) + row_lse[:, None])
    of_column = tl.sum(mass, 0)
    tile_mass = tl.sum(of_column, 0)
    of_force = of_column * SLOPE_BY_VALUE(of_column) if SAME_SLOPE else tl.sum(force, 0)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    spread = tl.where(tile_mass > 0.0, of_force / tile_mass, 0.0)
    tl.store(share + columns, spread, mask=columns < num_columns)


@triton.jit(do_not_specialize=["num_columns"])
def skipped_weight_kernel(
    weight,  # [V, D]
    share,  # [V]
    skipped_weight,  # [tiles, D]
    weight_peak,  # one int32, zero before: the bits of the largest |weight|, a float32
    num_columns,  # V
    width,
    stride_wv,
    stride_wd,
    TILE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,  # columns of the tile at a time
    BLOCK_D: tl.constexpr,
):
    """A program writes BLOCK_D columns of a row. The largest number of the weight bounds sums in fixed point."""
    depth_blocks = tl.cdiv(width, BLOCK_D)
    tile = tl.program_id(0) // depth_blocks
    depths = (tl.program_id(0) % depth_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.float32)
    largest = tl.zeros((BLOCK_V, BLOCK_D), dtype=tl.int32)
    for first in range(0, TILE_WIDTH, BLOCK_V):
        columns = tile * TILE_WIDTH + first + tl.arange(0, BLOCK_V)
        mask = (columns < num_columns)[:, None] & (depths < width)[None, :]
        offsets = columns[:, None].to(tl.int64) * stride_wv + depths[None, :].to(tl.int64) * stride_wd
        w = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
        total += w * tl.load(share + columns, mask=columns < num_columns, other=0.0)[:, None]
        # the bits of floats that are not negative, nan among them, are in order as integers
        largest = tl.maximum(largest, tl.abs(w).to(tl.int32, bitcast=True))
    sums = tl.sum(total, 0).to(skipped_weight.dtype.element_ty)
    tl.store(skipped_weight + tile.to(tl.int64) * width + depths, sums, mask=depths < width)
    tl.atomic_max(weight_peak, tl.max(tl.max(largest, 1), 0), sem="relaxed")
