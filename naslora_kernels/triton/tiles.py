"""How the Triton kernels divide their work.

Nothing is tuned at run time. Tiles depend on shapes, dtypes and the kind of card alone, so CUDA
graphs can capture the launches and every run gives the same bits.
"""

import functools
import os
from typing import Any, NamedTuple

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs on the CPU


# Triton's option maxnreg: ptxas otherwise uses fewer registers, and spills some bytes, to fit one
# more program on a processor.
ALL_REGISTERS = {"maxnreg": 255}


def multiplies_in_shared_memory(capability: tuple[int, int]) -> bool:
    """Whether tensor cores read operands from shared memory (wgmma, tcgen05), not from registers.

    Those of data centres' cards do from capability 9.0 on.
    """
    return (9, 0) <= capability < (12, 0)


class CellTiles(NamedTuple):
    """How ``cell_forward_kernel`` and ``cell_backward_kernel`` divide their maps."""

    lanes: int
    """The channels of S, padded to a power of two."""
    pixels: int
    """Pixels of a tile."""
    block: int
    """Output channels that a program sums at a time."""
    blocks: int
    """Blocks of output channels."""
    parts: int
    """Programs that share the sums of one group."""
    steps: int
    """Tiles of a group."""
    groups: int
    """Groups of pixels; each leaves one set of partial sums."""
    num_warps: int


@functools.cache
def cell_tiles(pixels: int, c: int) -> CellTiles:
    """Returns the tiles for the number of pixels in all maps.

    A thread holds one channel of one pixel. A group is small enough to spread the sums over some
    1500 programs. It has at least 32 pixels. It has at most 256, for which the partial sums are a
    tenth of the maps.
    """
    lanes = power_of_2(c)
    tile = max(1, (4096 if INTERPRETED else 32) // lanes)
    block = min(lanes, 8)
    blocks = -(-c // block)
    parts = 2 * blocks + 3
    group = min(max(power_of_2(-(-pixels * parts // 1500)), 32), 256)
    group = max(group, tile)
    num_warps = max(1, lanes // 32)
    steps, groups = group // tile, -(-pixels // group)
    return CellTiles(lanes, tile, block, blocks, parts, steps, groups, num_warps)


@functools.cache
def group_rows(tokens: int) -> int:
    """Returns how many rows a group of ``low_rank_pass`` has.

    There is one group for each processor of a large card. A group has at most 128 rows: then the
    partial sums of three ranks move 0.05 of the bytes that the rows move.
    """
    return min(max(power_of_2(-(-tokens // 132)), 16), 128)


class PassTiles(NamedTuple):
    """How a kernel of ``low_rank_pass`` divides the rows of a group."""

    constants: dict[str, object]
    """The constants of the kernel."""
    columns: int
    """Columns of a tile."""
    num_warps: int
    num_stages: int


@functools.cache
def pass_tiles(
    tokens: int, rank: int, dtype: torch.dtype, capability: tuple[int, int]
) -> PassTiles:
    """Returns the tiles for so many tokens, for the kernel that suits the rank and the dtype.

    Up to four ranks in 32 and 64 bits are multiplied one by one. Other products use the tensor
    cores or, in 32 and 64 bits, products from shared memory. 16-bit maps are widened on cards
    before capability 8.0: they have no tensor cores for bfloat16, and Triton's float16 products
    spill there.
    """
    rows = group_rows(tokens)
    widen = dtype.itemsize == 2 and capability < (8, 0)
    exact = widen or dtype.itemsize > 2
    constants: dict[str, object] = {}
    if rank <= 4 and exact:
        tile, columns = rows, 4096 // rows
    else:
        tile = min(rows, 64)
        columns = 2048 // tile if exact else 64 if multiplies_in_shared_memory(capability) else 32
        lanes = max(16, power_of_2(rank))
        constants = {"LANES": lanes, "STEPS": rows // tile, "WIDEN": widen}
    constants |= {"RANK": rank, "ROWS": tile, "COLUMNS": columns}
    return PassTiles(constants, columns, num_warps=8, num_stages=1 if exact else 3)


@functools.cache
def expand_tiles(rank: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, int]:
    """Returns the constants of the kernel of ``low_rank_expand`` that suits the rank and the dtype.

    16-bit maps are multiplied on tensor cores where these know both dtypes.
    """
    if dtype.itemsize == 2 and capability >= (8, 0):
        return {"RANK": rank, "LANES": max(16, power_of_2(rank)), "ROWS": 64, "COLUMNS": 128}
    block = next(block for block in range(8, 0, -1) if rank % block == 0)
    columns = 64 if dtype == torch.float64 else 256
    return {"RANK": rank, "BLOCK": block, "ROWS": 16, "COLUMNS": columns}


def most_features(dtype: torch.dtype) -> int:
    """Returns up to how many features of a head attention has tiles that every card can hold."""
    return 64 if dtype == torch.float64 else 128


class AttentionTiles(NamedTuple):
    """The constants of the kernels of attention, and how they are launched.

    FULL says that no tile reaches beyond the grid, ONE_PIECE that a tile has whole rows of it.
    """

    forward: dict[str, Any]
    keys_pass: dict[str, Any]
    """Of the pass that keeps keys."""
    queries_pass: dict[str, Any]
    """Of the pass that keeps queries."""


@functools.cache
def attention_tiles(
    tokens: int,
    grid: tuple[int, int],
    features: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
) -> AttentionTiles:
    """Returns the tiles for so many queries, a grid of keys and heads of so many features.

    In 16 bits a warp keeps 16 queries or keys, the rows of one product of tensor cores: more warps
    would compute the same products again. Where operands come from registers, the backward spills
    with tiles of 64. 16-bit operands are widened on cards before capability 8.0, as in
    ``pass_tiles``.
    """
    widen = dtype.itemsize == 2 and capability < (8, 0)
    exact = widen or dtype.itemsize > 2
    height, width = grid
    lanes, rest = parts(features)

    def constants(queries: int, keys: int, most_columns: int, **options: int) -> dict[str, Any]:
        columns = min(power_of_2(width), most_columns)
        rows = max(1, keys // columns)
        full = not (width % columns or height % rows or tokens % queries)
        sizes = {"FEATURES": features, "LANES": lanes, "REST": rest, "QUERIES": queries}
        sizes |= {"ROWS": rows, "COLUMNS": columns, "WIDEN": widen, "PRECISION": "ieee"}
        return {**sizes, "FULL": full, "ONE_PIECE": width <= columns, **options, **ALL_REGISTERS}

    if exact:
        cards = ((8, 0), (9, 0))  # the assemblers of others spill
        keys, most_columns = (32, 64) if features <= 64 else (16, 16)
        if dtype == torch.float64:
            keys, most_columns = 16, 32 if capability in cards else 16
        tiles = constants(16, keys, most_columns, num_warps=8, num_stages=1)
        result = AttentionTiles(tiles, tiles, tiles)
        ragged = width % 64 or tokens % 64
        if dtype != torch.float32 or capability not in cards or features > 80 or ragged:
            return result
        launch = {"num_warps": 4, "num_stages": 1, "PRECISION": "tf32x3"}
        by_queries = constants(64, 16, 16, **launch)
        if features > 64:  # the backward would spill
            return result._replace(forward=by_queries)
        return AttentionTiles(by_queries, constants(16, 64, 64, **launch), by_queries)
    most = 128 if tokens > 64 else 64
    wide, ragged = features > 80, width % 64 or tokens % most
    forward_keys, few, keys, most_columns = 64, 64, 64, 64
    kept_columns = 64  # of the pass that keeps keys
    stages = [2, 2, 2]
    if multiplies_in_shared_memory(capability):
        if wide:
            stages[0], few, keys = 1, 32, 16 if ragged else 64
        if width > 64:
            stages[2] = 1
    else:
        few = keys = 32
        if wide:
            forward_keys = few = keys = most_columns = 16
            stages[0], kept_columns = 1, 128
        if capability != (8, 0) or ragged or features <= 64:
            stages[1] = 1
        if features > 64 and (ragged or capability != (8, 0)):
            few = 16
        if capability != (8, 0) and features > 64:  # their assembler moves loads further ahead
            forward_keys = min(forward_keys, 32)
    launches = [{"num_warps": most // 16, "num_stages": n} for n in stages]
    return AttentionTiles(
        constants(most, forward_keys, most_columns, **launches[0]),
        constants(few, most, kept_columns, **launches[1]),
        constants(most, keys, keys, **launches[2]),
    )


def parts(features: int) -> tuple[int, int]:
    """Returns the widths of the one or two parts in which rows of so many features are computed.

    Tensor cores multiply 16 and more.
    """
    lanes = max(16, power_of_2(features))
    rest = max(16, power_of_2(features - lanes // 2))
    return (lanes // 2, rest) if lanes > 16 and rest < lanes // 2 else (lanes, 0)


def power_of_2(number: int) -> int:
    """Returns the smallest power of two that is not less than ``number``."""
    return 1 << (int(number) - 1).bit_length()
