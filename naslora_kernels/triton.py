"""The ``triton`` backend: how the kernels of ``triton_*.py`` are launched, and in what shapes.

Nothing here is tuned at run time: tiles depend on shapes alone, so that CUDA graphs can capture the
launches and every card gives the same bits. Triton is imported with the first launch.
"""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from naslora_kernels import gpu
from naslora_kernels.ops import entry_points

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Where the assembler, left to itself, spills a few bytes to fit one more program on a processor.
ALL_REGISTERS = {"maxnreg": 255}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # by Triton's interpreter, on the CPU


def unavailable_reason() -> str | None:
    """Why Triton cannot be used, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU, and TRITON_INTERPRET=1 is not set"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (7, 5):
        return f"it needs a GPU of compute capability 7.5, this one has {major}.{minor}"
    return None


def unsupported_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Why these tensors cannot be served, or None."""
    expected = "cpu" if INTERPRETED else "cuda"
    if device_type != expected:
        return f"it computes on {expected!r}, the tensors are on {device_type!r}"
    return None if dtype in DTYPES else f"it has no kernels for {dtype}"


mixed_cell, nas_lora_linear, folded_cell, folded_linear = entry_points("triton")


# ---- Tiles -------------------------------------------------------------------------------------


class CellTiles(NamedTuple):
    """How ``cell_forward_kernel`` and ``cell_backward_kernel`` cut their maps."""

    lanes: int  # channels of S, padded
    pixels: int  # of a tile
    block: int  # output channels at a time
    parts: int  # programs of a group
    steps: int  # tiles of a group
    groups: int
    num_warps: int


@functools.cache
def cell_tiles(pixels: int, c: int) -> CellTiles:
    """Tiles for so many pixels in all maps.

    A thread has one channel of one pixel. A group is as small as spreads the sums over some 1500
    programs, but at least 32 pixels, and at most 256: then its partial sums are a tenth of the maps
    that they are summed from.
    """
    lanes = _power_of_2(c)
    tile = max(1, (4096 if INTERPRETED else 32) // lanes)
    block = min(lanes, 8)
    parts = 2 * -(-c // block) + 3
    group = min(max(_power_of_2(-(-pixels * parts // 1500)), 32), 256)
    group = max(group, tile)
    num_warps = max(1, lanes // 32)
    return CellTiles(lanes, tile, block, parts, group // tile, -(-pixels // group), num_warps)


@functools.cache
def group_rows(tokens: int) -> int:
    """How many rows a group of ``low_rank_pass`` has: one group for each processor of a large card,
    but at most 128 rows, a share of 0.05 of which the partial sums of three ranks take."""
    return min(max(_power_of_2(-(-tokens // 132)), 16), 128)


class PassTiles(NamedTuple):
    """How a kernel of ``low_rank_pass`` cuts the rows of a group."""

    constants: dict[str, object]
    columns: int
    num_warps: int
    num_stages: int


@functools.cache
def pass_tiles(
    tokens: int, rank: int, dtype: torch.dtype, capability: tuple[int, int]
) -> PassTiles:
    """Tiles for so many tokens, by the kernel that ``low_rank_pass`` takes for these ranks.

    Few ranks of 32-bit numbers and more are multiplied one by one. Others go to the tensor cores,
    or, in 32 bits, to products from shared memory. So do those in 16 bits before capability 8.0:
    there bfloat16 has no tensor cores, and on those for float16 Triton's products spill.
    """
    rows = group_rows(tokens)
    widen = dtype.itemsize == 2 and capability < (8, 0)
    exact = widen or dtype.itemsize > 2
    if rank <= 4 and exact:
        tile, columns = rows, 4096 // rows
        constants = {}
    else:
        tile = min(rows, 64)
        columns = 2048 // tile if exact else 64
        lanes = max(16, _power_of_2(rank))
        constants = {"LANES": lanes, "STEPS": rows // tile, "WIDEN": widen}
    constants |= {"RANK": rank, "ROWS": tile, "COLUMNS": columns}
    return PassTiles(constants, columns, num_warps=8, num_stages=1 if exact else 3)


def _power_of_2(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (int(number) - 1).bit_length()


# ---- Launches ----------------------------------------------------------------------------------


class Primitives:
    """The primitives that ``gpu.py`` asks for, each one launch."""

    def __init__(self, launch: Callable, capability: Callable) -> None:
        self._launch = launch  # of (kernel, grid, *arguments, **constants)
        self._capability = capability  # of a device

    def low_rank_pass(
        self,
        rows: Tensor,
        matrix: Tensor | None,
        u: Tensor | None,
        scale: float,
        product: Tensor | None,
        partials: Tensor | None,
    ) -> None:
        from naslora_kernels import triton_low_rank as kernels

        tokens, columns = rows.shape
        rank = (product if u is None else u).shape[1]
        tiles = pass_tiles(tokens, rank, rows.dtype, self._capability(rows.device))
        groups, span = self.row_groups(tokens), columns
        if product is None:  # then columns can be spread over programs, too
            spans = max(1, min(528 // groups, -(-columns // tiles.columns)))
            span = -(-columns // (spans * tiles.columns)) * tiles.columns
        by_dot = "LANES" in tiles.constants
        self._launch(
            kernels.low_rank_pass_dot_kernel if by_dot else kernels.low_rank_pass_kernel,
            (groups, -(-columns // span)),
            rows, matrix, u, product, partials, *_in_two(scale), tokens, columns, rows.stride(0),
            *((0, 0) if matrix is None else matrix.stride()), span, **tiles.constants,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            **(ALL_REGISTERS if by_dot else {}),
        )  # fmt: skip

    def low_rank_expand(
        self, u: Tensor, matrix: Tensor, bias: Tensor | None, scale: float, out: Tensor
    ) -> None:
        from naslora_kernels.triton_low_rank import low_rank_expand_kernel

        tokens, columns = out.shape
        rank = u.shape[1]
        block = next(block for block in range(8, 0, -1) if rank % block == 0)
        tile = 64 if out.dtype == torch.float64 else 256
        self._launch(
            low_rank_expand_kernel, (-(-tokens // 16), -(-columns // tile)),
            u, matrix, bias, out, *_in_two(scale), tokens, columns, *matrix.stride(),
            RANK=rank, BLOCK=block, ROWS=16, COLUMNS=tile, num_warps=4,
            **(ALL_REGISTERS if out.dtype == torch.float64 else {}),
        )  # fmt: skip

    def cell_forward(
        self,
        z: Tensor,
        alpha: Tensor,
        depthwise: list[Tensor],
        pw: Tensor,
        channels: Tensor | None,
        y: Tensor,
    ) -> None:
        from naslora_kernels.triton_cell import cell_forward_kernel

        batch, height, width, rank = z.shape
        pixels, c = batch * height * width, pw.shape[-1]
        tiles = cell_tiles(pixels, c)
        self._launch(
            cell_forward_kernel, (-(-pixels // tiles.pixels),),
            z, alpha, *depthwise, pw, channels, y, pixels, height, width, rank, *z.stride(),
            CHANNELS=c, LANES=tiles.lanes, RANK_LANES=_power_of_2(rank), PIXELS=tiles.pixels,
            num_warps=tiles.num_warps,
        )  # fmt: skip

    def cell_backward(
        self,
        grad_y: Tensor,
        z: Tensor,
        alpha: Tensor,
        depthwise: list[Tensor],
        pw: Tensor,
        channels: Tensor | None,
        grad_z: Tensor | None,
        partials: Tensor | None,
    ) -> None:
        from naslora_kernels.triton_cell import cell_backward_kernel

        batch, height, width, rank = z.shape
        pixels, c = batch * height * width, pw.shape[-1]
        tiles = cell_tiles(pixels, c)
        map_programs = 0 if grad_z is None else -(-pixels // tiles.pixels)
        sum_programs = 0 if partials is None else tiles.groups * tiles.parts
        self._launch(
            cell_backward_kernel, (map_programs + sum_programs,),
            grad_y, z, alpha, *depthwise, pw, channels, grad_z, partials,
            pixels, height, width, rank, *grad_y.stride(), *z.stride(), map_programs,
            CHANNELS=c, LANES=tiles.lanes, RANK_LANES=_power_of_2(rank), PIXELS=tiles.pixels,
            BLOCK=tiles.block, STEPS=tiles.steps, num_warps=tiles.num_warps, **ALL_REGISTERS,
        )  # fmt: skip

    def reduce_gradients(
        self,
        cell_partials: Tensor | None,
        alpha: Tensor,
        depthwise: list[Tensor],
        pw: Tensor,
        grad_alpha: Tensor | None,
        grad_depthwise: list[Tensor] | None,
        grad_pw: Tensor | None,
        A_partials: Tensor | None,
        grad_A: Tensor | None,
        B_partials: Tensor | None,
        grad_B: Tensor | None,
    ) -> None:
        from naslora_kernels.triton_gradients import reduce_gradients_kernel

        columns = 32
        c = pw.shape[-1]
        blocks = -(-c // 8)
        sums = [(0, 0, 0) if p is None else p.shape for p in (A_partials, B_partials)]
        (A_groups, rank, c_in), (B_groups, B_rank, c_out) = sums
        rank = rank or B_rank
        weight_programs = 0 if grad_pw is None else -(-(4 * c + 68) * c // columns)
        alpha_programs = 0 if grad_alpha is None else 1
        A_programs, B_programs = -(-rank * c_in // columns), -(-rank * c_out // columns)
        self._launch(
            reduce_gradients_kernel,
            (weight_programs + alpha_programs + A_programs + B_programs,),
            cell_partials, 0 if cell_partials is None else cell_partials.shape[0], alpha,
            grad_alpha, *(grad_depthwise or [None] * 4), grad_pw,
            A_partials, A_groups, grad_A, c_in, B_partials, B_groups, grad_B, c_out, rank,
            weight_programs, alpha_programs, A_programs,
            CHANNELS=c, BLOCKS=blocks, GROUPS=32, COLUMNS=columns, num_warps=4,
        )  # fmt: skip

    def folded_cell_forward(
        self, z: Tensor, kernel: Tensor, average: float, maximum: float, y: Tensor
    ) -> None:
        from naslora_kernels.triton_cell import folded_cell_kernel

        batch, height, width, c = z.shape
        pixels = batch * height * width
        tiles = cell_tiles(pixels, c)
        self._launch(
            folded_cell_kernel, (-(-pixels // tiles.pixels),),
            z, kernel, y, *_in_two(average), *_in_two(maximum), pixels, height, width, *z.stride(),
            AVERAGE=average != 0, MAXIMUM=maximum != 0, SIZE=kernel.shape[-1],
            CHANNELS=c, LANES=tiles.lanes, PIXELS=tiles.pixels, num_warps=tiles.num_warps,
            **(ALL_REGISTERS if z.dtype == torch.float64 else {}),
        )  # fmt: skip

    def row_groups(self, tokens: int) -> int:
        return -(-tokens // group_rows(tokens))

    def cell_groups(self, batch: int, height: int, width: int, c: int) -> int:
        return cell_tiles(batch * height * width, c).groups

    def cell_partial_size(self, c: int) -> int:
        return (4 * c + 68) * c + 4 * -(-c // 8) + 3


def _launch(kernel, grid, *arguments, **constants) -> None:
    """Launches on the device where the tensors are."""
    if torch.version.hip:
        constants.pop("maxnreg", None)
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def _trace(kernel, grid, *arguments, **constants) -> None:
    """Puts a launch into the graph that torch.compile traces, which knows no ``maxnreg``."""
    constants.pop("maxnreg", None)
    torch.library.wrap_triton(kernel)[grid](*arguments, **constants)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability; for a graph that is traced without one, that of most."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)


def _in_two(number: float) -> tuple[float, float]:
    """A number as float32, which is what Triton passes, and what that leaves."""
    near = ctypes.c_float(number).value
    return near, number - near


_library = gpu.register(
    "triton",
    Primitives(_launch, _capability),
    traced=None if INTERPRETED else Primitives(_trace, _capability),  # needs compiled kernels
)
