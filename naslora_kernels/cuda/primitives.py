"""The CUDA kernels as the primitives of ``naslora_kernels/launches.py``.

Each method is one launch, on the current stream of the tensors' device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from naslora_kernels.cell import Cell
from naslora_kernels.cuda.extension import _CUDA, EMULATION
from naslora_kernels.launches import CellPartials, CellSums, GPUPrimitives, MatrixSums, Maybe
from naslora_kernels.plans import Launch
from naslora_kernels.tensors import DTYPE_CODES, addresses, last_size


def stream(tensor: Tensor) -> tuple[int, int]:
    """Returns the device and the address of its current stream, as torch.compile gets them."""
    if EMULATION:
        return 0, 0
    device = tensor.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device)


def launch(function: Callable[..., None], *arguments: Any) -> None:
    """Launches a kernel on the device of its tensors."""
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    function(*stream(first), *addresses(arguments))


class CUDAPrimitives(GPUPrimitives):
    """The primitives of ``naslora_kernels/launches.py``, which documents them."""

    def __init__(self, launch: Launch = launch) -> None:
        """Stores how kernels are launched."""
        self._launch = launch

    def low_rank_pass(
        self, rows: Tensor, matrix: Maybe, u: Maybe, scale: float, product: Maybe, partials: Maybe
    ) -> None:
        shape = (rows.stride(0), *rows.shape, last_size(u, product))
        maps = (DTYPE_CODES[rows.dtype], rows, *shape)
        strides = (0, 0) if matrix is None else matrix.stride()
        sums = (u, scale, product, partials)
        self._launch(_CUDA.low_rank_pass, *maps, *_parameter(matrix), *strides, *sums)

    def low_rank_expand(
        self, u: Tensor, matrix: Tensor, bias: Maybe, scale: float, out: Tensor
    ) -> None:
        maps = (DTYPE_CODES[out.dtype], u, *out.shape, u.shape[-1])
        parameters = (*_parameter(matrix), *matrix.stride(), *_parameter(bias))
        self._launch(_CUDA.low_rank_expand, *maps, *parameters, scale, out)

    def cell_forward(self, z: Tensor, cell: Cell, y: Tensor) -> None:
        maps = _maps(z, cell.pw.shape[-1], cell.channels)
        self._launch(_CUDA.cell_forward, *maps, *_parameters(cell.parameters), y)

    def cell_backward(
        self, grad_y: Tensor, z: Tensor, cell: Cell, grad_z: Maybe, partials: CellPartials
    ) -> None:
        maps = _maps(z, cell.pw.shape[-1], cell.channels)
        gradients = (grad_y, *grad_y.stride(), grad_z, partials)
        self._launch(_CUDA.cell_backward, *maps, *_parameters(cell.parameters), *gradients)

    def reduce_gradients(
        self, cell: Cell, sums: CellSums | None, A: MatrixSums | None, B: MatrixSums | None
    ) -> None:
        partials = next(s.partials for s in (sums, A, B) if s is not None)
        cell_partials, gradients = (None, [None] * 6) if sums is None else sums
        groups = 0 if cell_partials is None else cell_partials.shape[0]
        self._launch(
            _CUDA.reduce_gradients,
            int(partials.dtype is torch.float64),
            *(groups, cell.pw.shape[-1], cell_partials),
            *_parameters(cell.parameters),
            *_parameters(gradients),
            *_matrix_sums(A),
            *_matrix_sums(B),
        )

    def folded_cell_forward(
        self, z: Tensor, kernel: Tensor, average: float, maximum: float, y: Tensor
    ) -> None:
        maps = _maps(z, z.shape[-1], None)
        cell = (*_parameter(kernel), kernel.shape[-1], average, maximum)
        self._launch(_CUDA.folded_cell_forward, *maps, *cell, y)

    def row_groups(self, tokens: int) -> int:
        return _CUDA.row_groups(tokens)

    def cell_groups(self, batch: int, height: int, width: int, c: int) -> int:
        return _CUDA.cell_groups(batch, height, width, c)

    def cell_partial_size(self, c: int) -> int:
        return _CUDA.cell_partial_size(c)


def _maps(z: Tensor, c: int, channels: Tensor | None) -> tuple[Any, ...]:
    """Returns the arguments that describe the maps of a cell with c channels."""
    return (DTYPE_CODES[z.dtype], *z.shape, c, channels, z, *z.stride())


def _matrix_sums(sums: MatrixSums | None) -> tuple[Any, ...]:
    """Returns the arguments that describe the partial sums and the gradient of a matrix."""
    if sums is None:
        return (0,) * 6
    return (*sums.partials.shape, sums.partials, *_parameter(sums.gradient))


def _parameters(tensors: Sequence[Maybe]) -> list[Any]:
    """Returns the tensors and the dtypes of the parameters of a cell or of their gradients."""
    return [value for tensor in tensors for value in _parameter(tensor)]


def _parameter(tensor: Tensor | None) -> tuple[Maybe, int]:
    """Returns a parameter or its gradient, and its dtype."""
    return (None, 0) if tensor is None else (tensor, DTYPE_CODES[tensor.dtype])
