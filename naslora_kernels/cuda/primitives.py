"""The CUDA kernels as the primitives of ``naslora_kernels/launches.py``.

Each method is one launch, on the current stream of the tensors' device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from naslora_kernels.cell import Cell
from naslora_kernels.cuda.extension import _CUDA, EMULATION
from naslora_kernels.launches import CellPartials, CellSums, GPUPrimitives, MatrixSums, Maybe
from naslora_kernels.tensors import DTYPE_CODES, address, last_size


class CUDAPrimitives(GPUPrimitives):
    """The primitives of ``naslora_kernels/launches.py``, which documents them."""

    def low_rank_pass(
        self, rows: Tensor, matrix: Maybe, u: Maybe, scale: float, product: Maybe, partials: Maybe
    ) -> None:
        shape = (rows.stride(0), *rows.shape, last_size(u, product))
        maps = (DTYPE_CODES[rows.dtype], rows.data_ptr(), *shape)
        strides = (0, 0) if matrix is None else matrix.stride()
        sums = (address(u), scale, address(product), address(partials))
        _CUDA.low_rank_pass(*_stream(rows), *maps, *_parameter(matrix), *strides, *sums)

    def low_rank_expand(
        self, u: Tensor, matrix: Tensor, bias: Maybe, scale: float, out: Tensor
    ) -> None:
        maps = (DTYPE_CODES[out.dtype], u.data_ptr(), *out.shape, u.shape[-1])
        parameters = (*_parameter(matrix), *matrix.stride(), *_parameter(bias))
        _CUDA.low_rank_expand(*_stream(out), *maps, *parameters, scale, out.data_ptr())

    def cell_forward(self, z: Tensor, cell: Cell, y: Tensor) -> None:
        maps = _maps(z, cell.pw.shape[-1], cell.channels)
        _CUDA.cell_forward(*_stream(z), *maps, *_parameters(cell.parameters), y.data_ptr())

    def cell_backward(
        self, grad_y: Tensor, z: Tensor, cell: Cell, grad_z: Maybe, partials: CellPartials
    ) -> None:
        maps = _maps(z, cell.pw.shape[-1], cell.channels)
        gradients = (grad_y.data_ptr(), *grad_y.stride(), address(grad_z), address(partials))
        _CUDA.cell_backward(*_stream(z), *maps, *_parameters(cell.parameters), *gradients)

    def reduce_gradients(
        self, cell: Cell, sums: CellSums | None, A: MatrixSums | None, B: MatrixSums | None
    ) -> None:
        partials = next(s.partials for s in (sums, A, B) if s is not None)
        cell_partials, gradients = (None, [None] * 6) if sums is None else sums
        groups = 0 if cell_partials is None else cell_partials.shape[0]
        _CUDA.reduce_gradients(
            *_stream(partials),
            int(partials.dtype is torch.float64),
            *(groups, cell.pw.shape[-1], address(cell_partials)),
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
        _CUDA.folded_cell_forward(*_stream(z), *maps, *cell, y.data_ptr())

    def row_groups(self, tokens: int) -> int:
        return _CUDA.row_groups(tokens)

    def cell_groups(self, batch: int, height: int, width: int, c: int) -> int:
        return _CUDA.cell_groups(batch, height, width, c)

    def cell_partial_size(self, c: int) -> int:
        return _CUDA.cell_partial_size(c)


def _maps(z: Tensor, c: int, channels: Tensor | None) -> tuple[int, ...]:
    """Returns the arguments that describe the maps of a cell with c channels."""
    code, selected = DTYPE_CODES[z.dtype], address(channels)
    return (code, *z.shape, c, selected, z.data_ptr(), *z.stride())


def _matrix_sums(sums: MatrixSums | None) -> tuple[int, ...]:
    """Returns the arguments that describe the partial sums and the gradient of a matrix."""
    if sums is None:
        return (0,) * 6
    return (*sums.partials.shape, sums.partials.data_ptr(), *_parameter(sums.gradient))


def _parameters(tensors: Sequence[Maybe]) -> list[int]:
    """Returns the addresses and the dtypes of the parameters of a cell or of their gradients."""
    return [number for tensor in tensors for number in _parameter(tensor)]


def _parameter(tensor: Tensor | None) -> tuple[int, int]:
    """Returns the address and the dtype of a parameter or of its gradient."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), DTYPE_CODES[tensor.dtype])


if EMULATION:

    def _stream(tensor: Tensor) -> tuple[int, int]:
        return 0, 0

else:

    def _stream(tensor: Tensor) -> tuple[int, int]:
        """Returns the device and the address of its current stream, as torch.compile gets them."""
        device = tensor.get_device()
        return device, torch._C._cuda_getCurrentRawStream(device)
