"""The Triton kernels as the primitives of ``naslora_kernels/launches.py``.

Triton is imported with the first launch.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from naslora_kernels.cell import Cell
from naslora_kernels.launches import CellSums, FactorSums, Maybe, Primitives
from naslora_kernels.tensors import last_size
from naslora_kernels.triton.partial_sums import partial_sums
from naslora_kernels.triton.tiles import (
    ALL_REGISTERS,
    cell_tiles,
    expand_tiles,
    group_rows,
    pass_tiles,
    power_of_2,
)


class TritonPrimitives(Primitives):
    """The primitives of ``naslora_kernels/launches.py``, which documents them."""

    def __init__(
        self,
        launch: Callable[..., None],
        capability: Callable[[torch.device], tuple[int, int]],
    ) -> None:
        """Stores how kernels are launched and for what.

        Args:
            launch: takes a kernel, its grid, its arguments, and its constants by name.
            capability: returns the compute capability of a device.
        """
        self._launch = launch
        self._capability = capability

    def low_rank_pass(
        self, rows: Tensor, factor: Maybe, u: Maybe, scale: float, product: Maybe, partials: Maybe
    ) -> None:
        from naslora_kernels.triton.low_rank import low_rank_pass_dot_kernel, low_rank_pass_kernel

        tokens, columns = rows.shape
        rank = last_size(u, product)
        tiles = pass_tiles(tokens, rank, rows.dtype, self._capability(rows.device))
        groups, span = self.row_groups(tokens), columns
        if product is None:  # then programs can share the columns, too
            spans = max(1, min(528 // groups, -(-columns // tiles.columns)))
            span = -(-columns // (spans * tiles.columns)) * tiles.columns
        by_dot = "LANES" in tiles.constants
        strides = (rows.stride(0), *((0, 0) if factor is None else factor.stride()))
        self._launch(
            low_rank_pass_dot_kernel if by_dot else low_rank_pass_kernel,
            (groups, -(-columns // span)),
            *(rows, factor, u, product, partials, *in_two(scale)),
            *(tokens, columns, *strides, span),
            **tiles.constants,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **(ALL_REGISTERS if by_dot else {}),
        )

    def low_rank_expand(
        self, u: Tensor, factor: Tensor, bias: Maybe, scale: float, out: Tensor
    ) -> None:
        from naslora_kernels.triton.low_rank import (
            low_rank_expand_dot_kernel,
            low_rank_expand_kernel,
        )

        tiles = expand_tiles(u.shape[-1], out.dtype, self._capability(out.device))
        by_dot = "LANES" in tiles
        tokens, columns = out.shape
        self._launch(
            low_rank_expand_dot_kernel if by_dot else low_rank_expand_kernel,
            (-(-tokens // tiles["ROWS"]), -(-columns // tiles["COLUMNS"])),
            *(u, factor, bias, out, *in_two(scale), tokens, columns, *factor.stride()),
            **tiles,
            num_warps=4,
            **(ALL_REGISTERS if out.dtype == torch.float64 else {}),
        )

    def cell_forward(self, z: Tensor, cell: Cell, y: Tensor) -> None:
        from naslora_kernels.triton.cell_forward import cell_forward_kernel

        pixels, c = z.shape[:-1].numel(), cell.pw.shape[-1]
        tiles = cell_tiles(pixels, c)
        self._launch(
            cell_forward_kernel,
            (-(-pixels // tiles.pixels),),
            *(z, *cell, y, pixels, *z.shape[1:], *z.stride()),
            **_constants(c, z.shape[-1]),
            PIXELS=tiles.pixels,
            num_warps=tiles.num_warps,
        )

    def cell_backward(
        self, grad_y: Tensor, z: Tensor, cell: Cell, grad_z: Maybe, partials: Maybe
    ) -> None:
        from naslora_kernels.triton.cell_backward import cell_backward_kernel

        pixels, c = z.shape[:-1].numel(), cell.pw.shape[-1]
        tiles = cell_tiles(pixels, c)
        map_programs = 0 if grad_z is None else -(-pixels // tiles.pixels)
        sum_programs = 0 if partials is None else tiles.groups * tiles.parts
        self._launch(
            cell_backward_kernel,
            (map_programs + sum_programs,),
            *(grad_y, z, *cell, grad_z, partials),
            *(pixels, *z.shape[1:], *grad_y.stride(), *z.stride()),
            *(map_programs, tiles.steps),
            **_constants(c, z.shape[-1]),
            **{"PIXELS": tiles.pixels, "BLOCK": tiles.block, "BLOCKS": tiles.blocks},
            PARTS=tiles.parts,
            **partial_sums(c, tiles.blocks).constants,
            num_warps=tiles.num_warps,
            **ALL_REGISTERS,
        )

    def folded_cell_forward(
        self, z: Tensor, kernel: Tensor, avg_weight: float, max_weight: float, y: Tensor
    ) -> None:
        from naslora_kernels.triton.folded import folded_cell_kernel

        pixels, c = z.shape[:-1].numel(), z.shape[-1]
        tiles = cell_tiles(pixels, c)
        self._launch(
            folded_cell_kernel,
            (-(-pixels // tiles.pixels),),
            *(z, kernel, y, *in_two(avg_weight), *in_two(max_weight)),
            *(pixels, *z.shape[1:3], *z.stride()),
            **{"AVERAGE": avg_weight != 0, "MAXIMUM": max_weight != 0, "SIZE": kernel.shape[-1]},
            **{"CHANNELS": c, "LANES": tiles.lanes, "PIXELS": tiles.pixels},
            num_warps=tiles.num_warps,
            **(ALL_REGISTERS if z.dtype == torch.float64 else {}),
        )

    def reduce_gradients(
        self, cell: Cell, sums: CellSums | None, A: FactorSums | None, B: FactorSums | None
    ) -> None:
        from naslora_kernels.triton.gradients import reduce_gradients_kernel

        columns = 32  # that a program sums
        c = cell.pw.shape[-1]
        layout = partial_sums(c, cell_tiles(1, c).blocks)
        cell_partials, gradients = (None, [None] * 6) if sums is None else sums
        cell_groups = 0 if cell_partials is None else cell_partials.shape[0]
        A_partials, grad_A = (None, None) if A is None else A
        B_partials, grad_B = (None, None) if B is None else B
        A_groups, A_rank, c_in = (0, 0, 0) if A_partials is None else A_partials.shape
        B_groups, B_rank, c_out = (0, 0, 0) if B_partials is None else B_partials.shape
        weights = layout.a_convolutions - layout.pw
        # One program sums all terms of alpha. Up to 56 channels they fit in as many columns.
        alpha_columns = max(columns, power_of_2(layout.size - layout.a_convolutions))
        weight_programs = 0 if gradients[-1] is None else -(-weights // columns)
        alpha_programs = 0 if gradients[0] is None else 1
        A_programs, B_programs = -(-A_rank * c_in // columns), -(-B_rank * c_out // columns)
        self._launch(
            reduce_gradients_kernel,
            (weight_programs + alpha_programs + A_programs + B_programs,),
            *(cell_partials, cell_groups, cell.alpha, *gradients),
            *(A_partials, A_groups, grad_A, c_in, B_partials, B_groups, grad_B, c_out),
            *(A_rank or B_rank, weight_programs, alpha_programs, A_programs),
            **{"CHANNELS": c, "GROUPS": 32, "COLUMNS": columns, "ALPHA_COLUMNS": alpha_columns},
            **layout.constants,
            num_warps=4,
        )

    def row_groups(self, tokens: int) -> int:
        return -(-tokens // group_rows(tokens))

    def cell_groups(self, batch: int, height: int, width: int, c: int) -> int:
        return cell_tiles(batch * height * width, c).groups

    def cell_partial_size(self, c: int) -> int:
        return partial_sums(c, cell_tiles(1, c).blocks).size


def _constants(c: int, rank: int) -> dict[str, int]:
    """Returns the constants of a cell with c of ``rank`` channels."""
    return {"CHANNELS": c, "LANES": power_of_2(c), "RANK_LANES": power_of_2(rank)}


def in_two(number: float) -> tuple[float, float]:
    """Splits a number into its float32 value and the rest: Triton passes arguments as float32."""
    near = ctypes.c_float(number).value
    return near, number - near


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launches a kernel on the device of its tensors."""
    constants["enable_fp_fusion"] = True  # which Triton 3.10 no longer does by itself
    if torch.version.hip:
        constants.pop("maxnreg", None)
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device.index if other else -1):  # -1 changes nothing
        kernel[grid](*arguments, **constants)


def trace(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Puts a launch into the graph that torch.compile traces."""
    constants.pop("maxnreg", None)  # torch.compile does not know it
    torch.library.wrap_triton(kernel)[grid](*arguments, **constants)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Returns a GPU's compute capability; without a GPU, that of most cards, to trace graphs."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)
