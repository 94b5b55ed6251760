"""The order of kernel launches of the cell and of the adapter layer, for backends in Python.

csrc/shared/operators.h has the same order for ``cpp`` and ``cuda``. A backend provides the
primitives below. On a GPU each primitive is one launch. Besides the frozen
product, a layer takes three launches forward and at most six backward:

    forward   z = W_e x
              y = cell(z)
              h = b0 + s W_d y, then h += W0 x (the frozen product)

    backward  y = cell(z)
              dy = s G W_d and partial sums of dW_d, in one pass over G = dL/dh
              dz and partial sums of the cell's gradients
              partial sums of dW_e
              dx = W_e^T dz, then dx += W0^T G (the frozen product)
              the sums of all partial sums

On a GPU a group of rows or of pixels leaves one partial sum. The groups depend on shapes alone, and
the last launch adds them in a fixed order, so every card and every run gives the same bits.
"""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.utils._pytree import tree_leaves

from naslora_kernels.cell import Cell, LoRALinear
from naslora_kernels.ops import SCHEMAS, cell_gradients, define, gradient_like, layer_gradients
from naslora_kernels.saved import check_saved_cell, check_saved_layer
from naslora_kernels.tensors import ACCUMULATORS, rows

Maybe: TypeAlias = Tensor | None  # None: the tensor does not exist or is not needed


class CellSums(NamedTuple):
    """Partial sums of a cell's gradients, and the gradients to write."""

    partials: Tensor
    gradients: Sequence[Maybe]
    """Six, in the order of ``Cell.parameters``, contiguous; None where not needed."""


class FactorSums(NamedTuple):
    """Partial sums of the gradient of lora_A or lora_B, and the gradient to write."""

    partials: Tensor
    gradient: Tensor


class Primitives(abc.ABC):
    """What a backend provides.

    S is the dtype of the maps. A is the dtype of sums: float64 for float64 maps, else float32.
    Parameters are in S or float32. Maps have any strides unless stated otherwise. u and product are
    contiguous, (T, r) or (B, H, W, r) with T = B H W. No primitive is called with nothing to do.
    """

    @abc.abstractmethod
    def low_rank_pass(
        self, rows: Tensor, factor: Maybe, u: Maybe, scale: float, product: Maybe, partials: Maybe
    ) -> None:
        """Computes one or two products in one pass over rows (T, J), whose rows are contiguous.

        product = scale rows factor^T, with factor (r, J) of any strides. partials, from
        ``factor_partials``, sum to scale u^T rows. Either product or partials may be None.
        """

    @abc.abstractmethod
    def low_rank_expand(
        self, u: Tensor, factor: Tensor, bias: Maybe, scale: float, out: Tensor
    ) -> None:
        """out (T, J) = bias + scale u factor; factor (r, J) has any strides."""

    @abc.abstractmethod
    def cell_forward(self, z: Tensor, cell: Cell, y: Tensor) -> None:
        """y (B, H, W, r), contiguous, = the mixed cell of z (Eq. 3)."""

    @abc.abstractmethod
    def cell_backward(
        self, grad_y: Tensor, z: Tensor, cell: Cell, grad_z: Maybe, partials: Maybe
    ) -> None:
        """Writes grad_z, contiguous, and partials, from ``cell_partials``. Either may be None."""

    @abc.abstractmethod
    def folded_cell_forward(
        self, z: Tensor, kernel: Tensor, avg_weight: float, max_weight: float, y: Tensor
    ) -> None:
        """y (B, H, W, c), contiguous, = the folded cell of z, with a contiguous kernel."""

    @abc.abstractmethod
    def reduce_gradients(
        self, cell: Cell, sums: CellSums | None, A: FactorSums | None, B: FactorSums | None
    ) -> None:
        """Adds up all partial sums and writes the gradients, each in its dtype.

        ``A.gradient`` is (r, C_in) and ``B.gradient`` (C_out, r).
        """

    @abc.abstractmethod
    def row_groups(self, tokens: int) -> int:
        """Returns into how many groups ``low_rank_pass`` divides its rows."""

    @abc.abstractmethod
    def cell_groups(self, batch: int, height: int, width: int, c: int) -> int:
        """Returns into how many groups ``cell_backward`` divides its pixels."""

    @abc.abstractmethod
    def cell_partial_size(self, c: int) -> int:
        """Returns how many partial sums a group of ``cell_backward`` has."""

    def factor_partials(self, gradient: Tensor, tokens: int, transposed: bool) -> Tensor:
        """Returns uninitialised partials (groups, r, J) of ``low_rank_pass`` over so many rows.

        ``gradient`` is (r, J), or, if ``transposed``, (J, r).
        """
        rank, columns = reversed(gradient.shape) if transposed else gradient.shape
        shape = (self.row_groups(tokens), rank, columns)
        return gradient.new_empty(shape, dtype=ACCUMULATORS[gradient.dtype])

    def cell_partials(self, z: Tensor, cell: Cell) -> Tensor:
        """Returns uninitialised partials (groups, size) of ``cell_backward``."""
        batch, height, width, _ = z.shape
        c = cell.pw.shape[-1]
        shape = (self.cell_groups(batch, height, width, c), self.cell_partial_size(c))
        return z.new_empty(shape, dtype=ACCUMULATORS[z.dtype])


class Launches:
    """The six operators over some primitives. Methods take the arguments of ``ops.SCHEMAS``."""

    def __init__(self, primitives: Primitives) -> None:
        self._primitives = primitives

    def mixed_cell(self, z: Tensor, *cell_tensors: Any) -> Tensor:
        """One launch."""
        cell = _contiguous(cell_tensors)
        if cell.pw.shape[-1] == 0:
            return gradient_like(z, True).copy_(z)
        return self._mix(z, cell)

    def mixed_cell_backward(self, grad_y: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """Two launches."""
        cell, (need_z, need_alpha, need_weights) = _contiguous(rest[:7]), rest[7:]
        check_saved_cell(grad_y, z, cell)
        gradients = cell_gradients(cell.parameters, need_alpha, need_weights)
        grad_z = gradient_like(z, need_z)
        if not z.numel() or cell.pw.shape[-1] == 0:
            if need_z:
                grad_z.copy_(grad_y)
            return grad_z, *_zeros(gradients)
        sums = self._cell_sums(z, cell, gradients) if need_alpha or need_weights else None
        partials = None if sums is None else sums.partials
        self._primitives.cell_backward(grad_y, z, cell, grad_z if need_z else None, partials)
        if sums is not None:
            self._primitives.reduce_gradients(cell, sums, None, None)
        return grad_z, *gradients

    def nas_lora_linear(self, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """Three launches and the frozen product."""
        linear, cell, scaling = LoRALinear(*rest[:4]), _contiguous(rest[4:11]), rest[11]
        x_rows = rows(x)
        z = self._encode(x, x_rows, linear)
        y = self._mix(z, cell) if cell.pw.shape[-1] else z
        return self._decode(x, x_rows, linear, y, scaling), z

    def nas_lora_linear_backward(
        self, grad_h: Tensor, x: Maybe, z: Tensor, weight: Tensor, A: Tensor, B: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        """Six launches and the frozen product."""
        linear, cell, scaling = LoRALinear(weight, None, A, B), _contiguous(rest[:7]), rest[7]
        need_x, need_A, need_B, need_alpha, need_weights = rest[8:]
        check_saved_layer(grad_h, x, z, linear, cell)
        primitives = self._primitives
        grad_rows = rows(grad_h)  # (T, C_out)
        tokens = grad_rows.shape[0]
        grad_x, grad_A, grad_B = layer_gradients(z, linear, need_x, need_A, need_B)
        gradients = cell_gradients(cell.parameters, need_alpha, need_weights)
        if not grad_rows.numel():  # without tokens, or without outputs
            return grad_x.zero_(), grad_A.zero_(), grad_B.zero_(), *_zeros(gradients)
        has_cell = cell.pw.shape[-1] > 0
        need_z = need_x or need_A
        need_cell = has_cell and (need_alpha or need_weights)

        A_sums = B_sums = cell_sums = y = grad_y = None
        if need_B:
            B_sums = FactorSums(primitives.factor_partials(grad_B, tokens, True), grad_B)
            y = self._mix(z, cell) if has_cell else z
        if need_z or need_cell:
            grad_y = torch.empty_like(z)
        if grad_y is not None or B_sums is not None:
            decoder = None if grad_y is None else linear.lora_B.t()
            partials = None if B_sums is None else B_sums.partials
            primitives.low_rank_pass(grad_rows, decoder, y, scaling, grad_y, partials)

        grad_z = grad_y
        if has_cell and grad_y is not None:
            grad_z = torch.empty_like(z) if need_z else None
            cell_sums = self._cell_sums(z, cell, gradients) if need_cell else None
            cell_partials = None if cell_sums is None else cell_sums.partials
            primitives.cell_backward(grad_y, z, cell, grad_z, cell_partials)
        if x is not None and need_A:
            A_sums = FactorSums(primitives.factor_partials(grad_A, tokens, False), grad_A)
            primitives.low_rank_pass(rows(x), None, grad_z, 1.0, None, A_sums.partials)
        if grad_z is not None and need_x:
            grad_x_rows = grad_x.view(tokens, -1)
            primitives.low_rank_expand(grad_z, linear.lora_A, None, 1.0, grad_x_rows)
            grad_x_rows.addmm_(grad_rows, linear.weight)

        if need_cell or need_A or need_B:
            primitives.reduce_gradients(cell, cell_sums, A_sums, B_sums)
        return grad_x, grad_A, grad_B, *(gradients if need_cell else _zeros(gradients))

    def folded_cell(
        self, z: Tensor, kernel: Tensor, avg_weight: float, max_weight: float
    ) -> Tensor:
        """One launch."""
        y = gradient_like(z, True)
        if z.numel():
            kernel = kernel.contiguous()
            self._primitives.folded_cell_forward(z, kernel, avg_weight, max_weight, y)
        return y

    def folded_linear(self, x: Tensor, *rest: Any) -> Tensor:
        """Three launches and the product."""
        linear, folded = LoRALinear(*rest[:4]), rest[4:]
        x_rows = rows(x)
        y = self.folded_cell(self._encode(x, x_rows, linear), *folded)
        return self._decode(x, x_rows, linear, y, 1.0)

    def _encode(self, x: Tensor, x_rows: Tensor, linear: LoRALinear) -> Tensor:
        """Returns z = W_e x, (B, H, W, r)."""
        z = x.new_empty((*x.shape[:-1], linear.lora_A.shape[0]))
        if z.numel():
            self._primitives.low_rank_pass(x_rows, linear.lora_A, None, 1.0, z, None)
        return z

    def _mix(self, z: Tensor, cell: Cell) -> Tensor:
        """Returns y = cell(z), (B, H, W, r), of a cell with channels."""
        y = gradient_like(z, True)
        if z.numel():
            self._primitives.cell_forward(z, cell, y)
        return y

    def _decode(
        self, x: Tensor, x_rows: Tensor, linear: LoRALinear, y: Tensor, scaling: float
    ) -> Tensor:
        """Returns h = W x + b + s W_d y, (B, H, W, C_out)."""
        weight, bias, _, lora_B = linear
        h = x.new_empty((*x.shape[:-1], weight.shape[0]))
        if h.numel():
            # h starts as the bias and the adapter's part, and the frozen product is added to it.
            # Adding the adapter's part afterwards would read and write all of h once more.
            h_rows = h.flatten(0, -2)
            bias = None if bias is None else bias.contiguous()
            self._primitives.low_rank_expand(y, lora_B.t(), bias, scaling, h_rows)
            h_rows.addmm_(x_rows, weight.t())
        return h

    def _cell_sums(self, z: Tensor, cell: Cell, gradients: Sequence[Tensor]) -> CellSums:
        """Returns uninitialised partial sums; a gradient of size 0 is not needed."""
        needed = [gradient if gradient.numel() else None for gradient in gradients]
        return CellSums(self._primitives.cell_partials(z, cell), needed)


def _contiguous(cell: Sequence[Maybe]) -> Cell:
    return Cell(*(None if tensor is None else tensor.contiguous() for tensor in cell))  # type: ignore[arg-type]


def _zeros(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Fills the gradients that are needed with zeros."""
    for gradient in gradients:
        if gradient.numel():
            gradient.zero_()
    return gradients


def register(
    backend: str, primitives: Primitives, traced: Primitives | None = None
) -> torch.library.Library:
    """Defines the operators of a backend over its primitives.

    Args:
        backend: the end of the operators' namespace.
        primitives: launch the kernels.
        traced: put the launches into a graph that torch.compile traces. The compiler then plans
            memory across the launches and fuses the operators between them. If None, the compiler
            does not see the launches.
    """
    launches = Launches(primitives)
    library = define(backend, {name: getattr(launches, name) for name in SCHEMAS})
    if traced is not None:
        inlined = Launches(traced)
        for name in SCHEMAS:
            operator = f"naslora_{backend}::{name}"
            function = functools.partial(_inline, getattr(inlined, name))
            torch.library.register_torch_dispatch(
                operator, FunctionalTensorMode, function, lib=library
            )
    return library


def _inline(
    function: Callable[..., Any],
    mode: FunctionalTensorMode,
    operator: Any,
    types: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
) -> Any:
    """Traces ``function`` in place of an operator if all shapes are known: tiles need them."""
    sizes = (size for leaf in tree_leaves(args) if isinstance(leaf, Tensor) for size in leaf.shape)
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return mode.__torch_dispatch__(operator, types, args, kwargs)
    with mode:
        return function(*args, **(kwargs or {}))
