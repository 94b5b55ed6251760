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
    """How the kernels of attention divide queries and keys."""

    queries: int
    """Queries of a block."""
    rows: int
    """Rows of the grid in a tile of keys."""
    columns: int
    """Columns of the grid in a tile of keys."""
    constants: dict[str, Any]
    """The constants of the forward, and how it is launched."""
    keys_pass: dict[str, Any]
    """The same for the pass that keeps keys."""
    queries_pass: dict[str, Any]
    """The same for the passes that keep queries."""


@functools.cache
def attention_tiles(
    width: int, features: int, dtype: torch.dtype, capability: tuple[int, int]
) -> AttentionTiles:
    """Returns the tiles for a grid of this width and heads of so many features.

    A tile of keys has whole rows of the grid where these are narrow enough: in 16 bits up to 128
    columns with heads of at most 64 features, and up to 64 with heads of at most 128. 16-bit
    operands are widened on cards before capability 8.0, as in ``pass_tiles``.
    """
    widen = dtype.itemsize == 2 and capability < (8, 0)
    exact = widen or dtype.itemsize > 2
    lanes = max(16, power_of_2(features))  # of tensor cores, which multiply 16 or more
    if dtype == torch.float64:
        keys, most_columns, queries = 16, 32, 16
    elif exact:
        keys, most_columns, queries = (32, 64, 16) if lanes <= 64 else (16, 16, 16)
    else:
        keys, most_columns, queries = (64, 128, 64) if lanes <= 64 else (64, 64, 64)
        if lanes > 64 and width > 64:  # the sums of drel_w spill in a launch of their own
            keys, most_columns, queries = 32, 32, 32
    columns = min(power_of_2(width), most_columns)
    rows = max(1, keys // columns)
    if columns > 64 or rows > 2:  # else the addresses of so many biases spill
        queries = min(queries, 32)
    constants: dict[str, Any] = {"FEATURES": features, "LANES": lanes, "QUERIES": queries}
    constants |= {"ROWS": rows, "COLUMNS": columns, "WIDEN": widen}
    constants |= {"num_warps": 8, "num_stages": 1 if exact else 2, **ALL_REGISTERS}
    if width > columns:  # prefetched tiles spill beside the sums of drel_w
        constants["num_stages"] = 1
    # The passes of the backward hold more: two sums, or dO beside q.
    fewer = {**constants, "QUERIES": min(queries, 32)}
    from_registers = not multiplies_in_shared_memory(capability)
    keys_pass = {**fewer, "num_stages": 1 if exact or from_registers else 2}
    queries_pass = constants
    if from_registers and rows > 2:
        queries_pass = {**constants, "QUERIES": 16}
    elif from_registers and lanes > 64:
        queries_pass = fewer
    if from_registers and lanes > 64 and queries > 32:
        # Prefetched tiles spill on sm_80. They do not fit the shared memory of sm_120.
        constants = {**constants, "num_stages": 1}
    return AttentionTiles(queries, rows, columns, constants, keys_pass, queries_pass)


def power_of_2(number: int) -> int:
    """Returns the smallest power of two that is not less than ``number``."""
    return 1 << (int(number) - 1).bit_length()
