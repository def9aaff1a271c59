"""What every kernel shares: which tile a program works on, and the logits of one tile.

    z[n, v] = sum over d of hidden[n, d] * weight[v, d]  (+ bias[v])        n in a row block, v in a tile's columns

Loads go through TMA descriptors where the hardware and the strides allow it and through pointers elsewhere; both
fill what lies outside the arrays with zeros.
"""

import triton
import triton.language as tl

# Programs work on about as many tiles at a time as there are multiprocessors. What they read is least where these
# tiles form a square of logits: 16 row blocks and 8 tiles of twice their width.
GROUP_ROWS = tl.constexpr(16)


@triton.jit
def tile_position(tile, num_row_blocks, num_column_blocks):
    """(row block, column block) of a tile number: row blocks run fastest within a group of GROUP_ROWS."""
    group_size = GROUP_ROWS * num_column_blocks
    first_row = (tile // group_size) * GROUP_ROWS
    rows_here = tl.minimum(num_row_blocks - first_row, GROUP_ROWS)
    within = tile % group_size
    return first_row + within % rows_here, within // rows_here


@triton.jit
def position_in_tile(targets, first_column, ignore_index, HAS_IGNORE_INDEX: tl.constexpr, BLOCK_V: tl.constexpr):
    """(column of each row's target within the tile, whether the tile holds it and it is not ignored)."""
    local = targets - first_column  # 64-bit, as targets are
    inside = (local >= 0) & (local < BLOCK_V)
    if HAS_IGNORE_INDEX:
        inside = inside & (targets != ignore_index)
    return tl.where(inside, local, -1).to(tl.int32), inside


@triton.jit
def load_block(pointer, row, depth, num_rows, num_depth, stride_row, stride_depth, ROWS: tl.constexpr, K: tl.constexpr):
    """A [ROWS, K] block by pointers, zero outside the array. Offsets are 64-bit: rows * stride can pass 2**31."""
    rows = row + tl.arange(0, ROWS)
    depths = depth + tl.arange(0, K)
    offsets = rows[:, None].to(tl.int64) * stride_row + depths[None, :].to(tl.int64) * stride_depth
    return tl.load(pointer + offsets, mask=(rows[:, None] < num_rows) & (depths[None, :] < num_depth), other=0.0)


@triton.jit
def gather_rows(pointer, rows, depth, num_depth, stride_row, stride_depth, K: tl.constexpr):
    """K columns, from `depth` on, of the given rows, which must exist; zero outside the columns of the array."""
    depths = depth + tl.arange(0, K)
    offsets = rows[:, None].to(tl.int64) * stride_row + depths[None, :] * stride_depth
    return tl.load(pointer + offsets, mask=(depths < num_depth)[None, :], other=0.0)


@triton.jit
def preactivations(
    hidden,  # TMA descriptor or pointer, [N, D]
    weight,  # TMA descriptor or pointer, [V, D]
    bias,  # pointer [V], read where HAS_BIAS
    row,  # first row of the tile
    column,  # first column of the tile
    num_rows,  # N
    num_columns,  # of the vocabulary slice that `weight` holds
    width,  # D
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    HAS_BIAS: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The tile z [BLOCK_N, BLOCK_V] in float32."""
    z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for step in range(tl.cdiv(width, BLOCK_D)):
        depth = step * BLOCK_D
        if USE_TMA:
            h = hidden.load([row, depth])
            w = weight.load([column, depth])
        else:
            h = load_block(hidden, row, depth, num_rows, width, stride_hn, stride_hd, BLOCK_N, BLOCK_D)
            w = load_block(weight, column, depth, num_columns, width, stride_wv, stride_wd, BLOCK_V, BLOCK_D)
        z = tl.dot(h, w.T, z, input_precision="ieee")
    if HAS_BIAS:
        columns = column + tl.arange(0, BLOCK_V)
        z += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    return z
