"""How a sparse backward divides its workspace: lists, codes of logits that the forward keeps, and dz of a round.

More codes spare products; a larger dz spares rounds, each of which adds to all of the hidden states' gradient. So dz
has a quarter of what lists leave at least, as much as keeps all processors busy, and enough for `FEW_ROUNDS`.
"""

from ..kernels.config import ProductConfig, TileConfig
from .problem import Problem
from .row_lists import most_blocks_of_a_tile

LIST_BYTES = 18  # of slots, skipped mass and what is computed alone, for a pair of a tile and a row
LEAST_SHARE = 4  # dz has a fourth
FEW_ROUNDS = 32
MOST_ROUNDS = 64  # each is a few launches, which the host must not be slower with than the GPU is with the whole


def room_for_codes(problem: Problem, config: TileConfig, products: ProductConfig, processors: int) -> int:
    """How many bytes codes may take beside the weight's gradient."""
    room, depth_blocks = _room(problem, config), -(-problem.width // products.weight_depth)
    tiles = 1 + max(-(-processors // depth_blocks), -(-_tiles(problem, config) // FEW_ROUNDS))
    dz = tiles * -(-problem.num_rows // config.block_n) * _block_bytes(problem, config)
    return max(0, room - max(dz, room // LEAST_SHARE))


def blocks_of_a_round(
    problem: Problem, config: TileConfig, products: ProductConfig, processors: int, codes: int
) -> int:
    """For how many blocks of dz there is room beside so many bytes of codes, but enough for `MOST_ROUNDS`; at most all.

    Where all rows are dense, a round of whole tiles takes the programs a number of turns, each a block of the weight's
    gradient. What a round adds to the hidden states' gradient takes about as long as a turn. Of the numbers of tiles
    that fit, one is taken with which there are the fewest turns and rounds.
    """
    tiles, most = _tiles(problem, config), most_blocks_of_a_tile(problem.num_rows, config.block_n)
    least = most + -(-tiles * most // MOST_ROUNDS)
    blocks = min(max((_room(problem, config) - codes) // _block_bytes(problem, config), least), tiles * most)
    dense, depth_blocks = most - 1, -(-problem.width // products.weight_depth)  # blocks of a tile

    def turns(count: int) -> int:
        return -(-count * depth_blocks // processors)

    def turns_and_rounds(count: int) -> int:
        return tiles // count * turns(count) + turns(tiles % count) + -(-tiles // count)

    fitting = min((blocks - dense) // dense, tiles)
    full = {turn * processors // depth_blocks for turn in range(1, turns(fitting))} | {fitting}
    enough = [count for count in sorted(full, reverse=True) if count * dense + dense >= least]
    return min(enough, key=turns_and_rounds) * dense + dense if enough else blocks


def _room(problem: Problem, config: TileConfig) -> int:
    """What is left of the workspace beside lists and the hidden states of dense rows."""
    rows = -(-problem.num_rows // config.block_n) * config.block_n
    lists = LIST_BYTES * _tiles(problem, config) * problem.num_rows
    return problem.workspace_bytes - lists - rows * problem.width * problem.compute_dtype.itemsize


def _tiles(problem: Problem, config: TileConfig) -> int:
    return -(-problem.vocab_size // config.block_v)


def _block_bytes(problem: Problem, config: TileConfig) -> int:
    return config.block_n * config.block_v * problem.compute_dtype.itemsize
