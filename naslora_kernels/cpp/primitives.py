"""The C++ kernels as the primitives of ``naslora_kernels/launches.py``.

The kernels read parameters and write their gradients in the dtype of sums, and add up their sums
themselves. So partial sums are the gradients themselves, except where a gradient has another dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from naslora_kernels.cell import Cell, LoRALinear
from naslora_kernels.checks import (
    check_cell,
    check_folded_cell,
    check_folded_linear,
    check_layer,
)
from naslora_kernels.cpp.extension import _C
from naslora_kernels.launches import CellPartials, CellSums, Launches, MatrixSums, Maybe, Primitives
from naslora_kernels.plans import Launch
from naslora_kernels.tensors import ACCUMULATORS, DTYPE_CODES, addresses, last_size, rows


def launch(function: Callable[..., None], *arguments: Any) -> None:
    """Runs a kernel."""
    function(*addresses(arguments))


class CPULaunches(Launches):
    """The operators over the C++ kernels. The folded layer is one kernel, not three.

    Anyone can call the operators, so they check shapes. Plans remember calls that passed.
    """

    def __init__(self, launch: Launch = launch) -> None:
        super().__init__(CPUPrimitives(launch))
        self._launch = launch

    def mixed_cell(self, z: Tensor, cell: Cell) -> Tensor:
        """One launch."""
        check_cell("z", z, cell)
        return super().mixed_cell(z, cell)

    def nas_lora_linear(
        self, x: Tensor, linear: LoRALinear, cell: Cell, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Three launches and the frozen product."""
        check_layer(x, linear, cell, scaling)
        return super().nas_lora_linear(x, linear, cell, scaling)

    def folded_cell(self, z: Tensor, kernel: Tensor, average: float, maximum: float) -> Tensor:
        """One launch."""
        check_folded_cell("z", z, kernel, average, maximum)
        return super().folded_cell(z, kernel, average, maximum)

    def folded_linear(
        self, x: Tensor, linear: LoRALinear, kernel: Tensor, average: float, maximum: float
    ) -> Tensor:
        """One kernel, whose z and y stay in the cache, and the product."""
        check_folded_linear(x, linear, kernel, average, maximum)
        weight, bias, lora_A, lora_B = linear
        x_rows, grid, dtype = rows(x), x.shape[:-1], ACCUMULATORS[x.dtype]
        c_out, c = lora_B.shape
        h = x.new_empty((*grid, c_out))
        taps, encoder = _plain(kernel, dtype), _plain(lora_A, dtype)
        decoder = _plain(lora_B.t(), dtype)  # (c, C_out)
        start = None if bias is None else _plain(bias, dtype)
        cell = (DTYPE_CODES[x.dtype], *grid, c, taps, taps.shape[-1], average, maximum)
        inputs = (x_rows, x_rows.stride(0), x_rows.shape[1])
        matrices = (encoder, decoder, start)
        # As in Launches._decode, h starts as the bias and the adapter's part.
        self._launch(_C.folded_update, *cell, *inputs, *matrices, c_out, h)
        h.view(x_rows.shape[0], c_out).addmm_(x_rows, weight.t())
        return h


class CPUPrimitives(Primitives):
    """The primitives of ``naslora_kernels/launches.py``, which documents them."""

    def __init__(self, launch: Launch = launch) -> None:
        """Stores how kernels are called."""
        self._launch = launch

    def prepare(self, cell: Cell, maps: Tensor) -> Cell:
        dtype, channels = ACCUMULATORS[maps.dtype], cell.channels
        alpha, *depthwise, pw = [
            t if t.dtype is dtype and t.is_contiguous() else _plain(t, dtype)
            for t in cell.parameters
        ]
        return Cell(alpha, depthwise, pw, None if channels is None else channels.contiguous())

    def low_rank_pass(
        self, rows: Tensor, matrix: Maybe, u: Maybe, scale: float, product: Maybe, partials: Maybe
    ) -> None:
        matrix = None if matrix is None else _plain(matrix, ACCUMULATORS[rows.dtype])
        maps = (rows, rows.stride(0), *rows.shape, last_size(u, product))
        sums = (None, 0, 0) if partials is None else (partials, *partials.stride())
        arguments = (DTYPE_CODES[rows.dtype], *maps, scale, matrix, product, u, *sums)
        self._launch(_C.low_rank_pass, *arguments)

    def low_rank_expand(
        self, u: Tensor, matrix: Tensor, bias: Maybe, scale: float, out: Tensor
    ) -> None:
        dtype = ACCUMULATORS[out.dtype]
        matrix = _plain(matrix, dtype)
        bias = None if bias is None else _plain(bias, dtype)
        shape = (*out.shape, matrix.shape[0])
        arguments = (DTYPE_CODES[out.dtype], u, matrix, bias, *shape, scale, out)
        self._launch(_C.low_rank_expand, *arguments)

    def cell_forward(self, z: Tensor, cell: Cell, y: Tensor) -> None:
        self._launch(_C.cell_forward, *_cell_arguments(z, cell), y)

    def cell_backward(
        self, grad_y: Tensor, z: Tensor, cell: Cell, grad_z: Maybe, partials: CellPartials
    ) -> None:
        sums = [None] * 6 if partials is None else partials
        gradients = (grad_y, *grad_y.stride(), grad_z, *sums)
        self._launch(_C.cell_backward, *_cell_arguments(z, cell), *gradients)

    def folded_cell_forward(
        self, z: Tensor, kernel: Tensor, average: float, maximum: float, y: Tensor
    ) -> None:
        taps = _plain(kernel, ACCUMULATORS[z.dtype])
        cell = (DTYPE_CODES[z.dtype], *z.shape, taps, taps.shape[-1], average, maximum)
        self._launch(_C.folded_cell, *cell, z, *z.stride(), y)

    def matrix_partials(self, gradient: Tensor, tokens: int, transposed: bool) -> Tensor:
        return _sum_like(gradient.t() if transposed else gradient)

    def cell_partials(self, z: Tensor, cell: Cell, gradients: Sequence[Maybe]) -> CellPartials:
        return [None if gradient is None else _sum_like(gradient) for gradient in gradients]

    def reduce_gradients(
        self, cell: Cell, sums: CellSums | None, A: MatrixSums | None, B: MatrixSums | None
    ) -> None:
        """Rounds the sums whose dtype is not that of the gradient."""
        pairs = [] if sums is None else list(zip(sums.partials, sums.gradients, strict=True))
        if A is not None:
            pairs.append(A)
        if B is not None:
            pairs.append((B.partials.t(), B.gradient))
        for total, gradient in pairs:
            if gradient is not None and gradient.dtype is not total.dtype:
                gradient.copy_(total)


def _sum_like(gradient: Tensor) -> Tensor:
    """Returns the gradient if its dtype is that of sums, else a tensor for the sums."""
    dtype = ACCUMULATORS[gradient.dtype]
    return gradient if gradient.dtype is dtype else torch.empty_like(gradient, dtype=dtype)


def _cell_arguments(z: Tensor, cell: Cell) -> tuple[Any, ...]:
    """Returns the arguments that describe a prepared cell and its maps."""
    alpha, depthwise, pw, channels = cell
    return (
        DTYPE_CODES[z.dtype],
        *z.shape,
        pw.shape[-1],
        *(channels, alpha, *depthwise, pw),
        *(z, *z.stride()),
    )


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the tensor contiguous in a dtype."""
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor  # the calls below return the same tensor, but half a microsecond later
    return tensor.to(dtype).contiguous()
