"""The order of kernel launches of the cell and the adapter layer, once for both GPU backends.

A backend gives the primitives below, each one launch. Beside the frozen product a layer takes
three in the forward and six in the backward:

    forward   z = W_e x;  y = cell(z);  h = b0 + s W_d y;                   then h += W0 x
    backward  y = cell(z);  dy and partial dW_d in one pass over G = dL/dh;  dz and partial
              gradients of the cell;  partial dW_e;  dx = W_e^T dz;  every sum of partials;
                                                                            then dx += W0^T G

Partial sums are one a group of rows or of tiles; groups depend on shapes alone, and one launch adds
them up in order. So the bits are the same on every card and in every run.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.utils._pytree import tree_leaves

from naslora_kernels.ops import define_operators, gradient_like


class Primitives(Protocol):
    """What a GPU backend provides. S is the dtype of the maps, A float32 or, for float64, float64.

    Parameters are in S or float32. No primitive is called with nothing to do.
    """

    def low_rank_pass(
        self,
        rows: Tensor,
        matrix: Tensor | None,
        u: Tensor | None,
        scale: float,
        product: Tensor | None,
        partials: Tensor | None,
    ) -> None:
        """One pass over rows (T, C), of contiguous rows: product (T, r) = scale rows matrix^T,
        with matrix (r, C) of any strides, and partials (groups, r, C) of A, whose sum is
        scale u^T rows, with u (T, r); either may be None."""

    def low_rank_expand(
        self, u: Tensor, matrix: Tensor, bias: Tensor | None, scale: float, out: Tensor
    ) -> None:
        """out (T, C) = bias + scale u matrix, with u (T, r), matrix (r, C) of any strides."""

    def cell_forward(
        self,
        z: Tensor,
        alpha: Tensor,
        depthwise: list[Tensor],
        pw: Tensor,
        channels: Tensor | None,
        y: Tensor,
    ) -> None:
        """y (B, H, W, r), contiguous, = the mixed cell of z, of any strides (Eq. 3)."""

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
        """grad_z, contiguous, and partials (groups, size) of A of the parameters' gradients."""

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
        """Adds up all partials and writes the gradients that are not None, in their dtypes.
        grad_A (r, C_in) is the sum of A_partials, grad_B (C_out, r) the transposed one of B's."""

    def folded_cell_forward(
        self, z: Tensor, kernel: Tensor, average: float, maximum: float, y: Tensor
    ) -> None:
        """y (B, H, W, c), contiguous, = the folded cell of z, of any strides."""

    def row_groups(self, tokens: int) -> int:
        """Into how many groups ``low_rank_pass`` cuts its rows."""

    def cell_groups(self, batch: int, height: int, width: int, c: int) -> int:
        """Into how many groups ``cell_backward`` cuts its maps."""

    def cell_partial_size(self, c: int) -> int:
        """How many numbers a group of ``cell_backward`` leaves."""


def register(
    backend: str, primitives: Primitives, traced: Primitives | None = None
) -> torch.library.Library:
    """Defines a backend's operators and registers this module's functions for them.

    Args:
        backend: the end of the operators' namespace.
        primitives: launch the kernels.
        traced: put the launches into a graph that torch.compile traces, so that it plans memory
            across them and fuses what stands between them; None leaves operators opaque to it.
    """
    library = define_operators(backend)
    for function in (
        mixed_cell,
        mixed_cell_backward,
        nas_lora_linear,
        nas_lora_linear_backward,
        folded_cell,
        folded_linear,
    ):
        name, kernel = function.__name__, functools.partial(function, primitives)
        library.impl(name, kernel, "CompositeExplicitAutograd")
        if traced is not None:
            inlined = functools.partial(_inline, functools.partial(function, traced))
            name = f"naslora_{backend}::{name}"
            torch.library.register_torch_dispatch(name, FunctionalTensorMode, inlined, lib=library)
    return library


def _inline(function: Callable, mode: FunctionalTensorMode, operator, types, args, kwargs):
    """Traces ``function`` in place of an operator whose shapes are known: tiles depend on them."""
    sizes = (size for leaf in tree_leaves(args) if isinstance(leaf, Tensor) for size in leaf.shape)
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return mode.__torch_dispatch__(operator, types, args, kwargs)
    with mode:
        return function(*args, **(kwargs or {}))


def mixed_cell(
    primitives: Primitives,
    z: Tensor,
    alpha: Tensor,
    depthwise: list[Tensor],
    pw: Tensor,
    channels: Tensor | None,
) -> Tensor:
    """The operator ``mixed_cell``: one launch."""
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    if pw.shape[-1] == 0:
        return y.copy_(z)
    if z.numel():
        cell = _cell_arguments(alpha, depthwise, pw, channels)
        primitives.cell_forward(z, *cell, y)
    return y


def mixed_cell_backward(
    primitives: Primitives,
    grad_y: Tensor,
    z: Tensor,
    alpha: Tensor,
    depthwise: list[Tensor],
    pw: Tensor,
    channels: Tensor | None,
    need_z: bool,
    need_alpha: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    """The operator ``mixed_cell_backward``: two launches."""
    cell = _cell_arguments(alpha, depthwise, pw, channels)
    gradients = _Gradients(cell, need_alpha, need_weights)
    grad_z = gradient_like(z, need_z)
    if not z.numel() or pw.shape[-1] == 0:
        if need_z:
            grad_z.copy_(grad_y)
        return grad_z, *gradients.zero()
    partials = None
    if need_alpha or need_weights:
        partials = _cell_partials(primitives, z, pw.shape[-1])
    primitives.cell_backward(grad_y, z, *cell, grad_z if need_z else None, partials)
    if partials is not None:
        primitives.reduce_gradients(partials, *cell[:3], *gradients.due, None, None, None, None)
    return grad_z, *gradients.all


def nas_lora_linear(
    primitives: Primitives,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    alpha: Tensor,
    depthwise: list[Tensor],
    pw: Tensor,
    channels: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """The operator ``nas_lora_linear``: three launches and the frozen product."""
    z = _encode(primitives, x, lora_A)
    y = mixed_cell(primitives, z, alpha, depthwise, pw, channels) if pw.shape[-1] else z
    return _decode(primitives, x, weight, bias, lora_B, y, scaling), z


def nas_lora_linear_backward(
    primitives: Primitives,
    grad_h: Tensor,
    x: Tensor | None,
    z: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    alpha: Tensor,
    depthwise: list[Tensor],
    pw: Tensor,
    channels: Tensor | None,
    scaling: float,
    need_x: bool,
    need_lora_A: bool,
    need_lora_B: bool,
    need_alpha: bool,
    need_weights: bool,
) -> tuple[Tensor, ...]:
    """The operator ``nas_lora_linear_backward``: six launches and the frozen product."""
    rows = _rows(grad_h)  # (T, C_out)
    tokens, c_out = rows.shape
    rank, c_in = lora_A.shape
    has_cell = pw.shape[-1] > 0
    cell = _cell_arguments(alpha, depthwise, pw, channels)
    gradients = _Gradients(cell, need_alpha, need_weights)
    grad_x = z.new_empty((*z.shape[:-1], c_in) if need_x else (0,))
    grad_A, grad_B = gradient_like(lora_A, need_lora_A), gradient_like(lora_B, need_lora_B)
    if not tokens:
        return grad_x, grad_A.zero_(), grad_B.zero_(), *gradients.zero()
    need_z = need_x or need_lora_A
    need_cell = has_cell and (need_alpha or need_weights)

    def partials_of_rows(needed: bool, columns: int) -> Tensor | None:
        groups = primitives.row_groups(tokens)
        return z.new_empty((groups, rank, columns), dtype=_accumulator(z)) if needed else None

    y = grad_y = None
    if need_lora_B:
        y = mixed_cell(primitives, z, alpha, depthwise, pw, channels) if has_cell else z
        y = y.view(-1, rank)
    if need_z or need_cell:
        grad_y = torch.empty_like(z)
    B_partials = partials_of_rows(need_lora_B, c_out)
    if grad_y is not None or y is not None:
        product = None if grad_y is None else grad_y.view(-1, rank)
        decoder = None if grad_y is None else lora_B.t()
        primitives.low_rank_pass(rows, decoder, y, scaling, product, B_partials)

    grad_z, cell_partials = grad_y, None
    if has_cell and (need_z or need_cell):
        grad_z = torch.empty_like(z) if need_z else None
        cell_partials = _cell_partials(primitives, z, pw.shape[-1]) if need_cell else None
        primitives.cell_backward(grad_y, z, *cell, grad_z, cell_partials)
    A_partials = partials_of_rows(need_lora_A, c_in)
    if need_lora_A:
        primitives.low_rank_pass(_rows(x), None, grad_z.view(-1, rank), 1.0, None, A_partials)
    if need_x:
        grad_x_rows = grad_x.view(-1, c_in)
        primitives.low_rank_expand(grad_z.view(-1, rank), lora_A, None, 1.0, grad_x_rows)
        grad_x_rows.addmm_(rows, weight)

    if not need_cell:
        gradients.zero()
    if need_cell or need_lora_A or need_lora_B:
        primitives.reduce_gradients(
            cell_partials, *cell[:3], *(gradients.due if need_cell else (None, None, None)),
            A_partials, grad_A if need_lora_A else None,
            B_partials, grad_B if need_lora_B else None,
        )  # fmt: skip
    return grad_x, grad_A, grad_B, *gradients.all


def folded_cell(
    primitives: Primitives, z: Tensor, kernel: Tensor, average: float, maximum: float
) -> Tensor:
    """The operator ``folded_cell``: one launch."""
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    if z.numel():
        primitives.folded_cell_forward(z, kernel.contiguous(), average, maximum, y)
    return y


def folded_linear(
    primitives: Primitives,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    kernel: Tensor,
    average: float,
    maximum: float,
) -> Tensor:
    """The operator ``folded_linear``: three launches and the product."""
    z = _encode(primitives, x, lora_A)
    y = folded_cell(primitives, z, kernel, average, maximum)
    return _decode(primitives, x, weight, bias, lora_B, y, 1.0)


def _encode(primitives: Primitives, x: Tensor, lora_A: Tensor) -> Tensor:
    """z = W_e x, (B, H, W, r)."""
    z = x.new_empty((*x.shape[:-1], lora_A.shape[0]))
    if z.numel():
        primitives.low_rank_pass(_rows(x), lora_A, None, 1.0, z.flatten(0, -2), None)
    return z


def _decode(
    primitives: Primitives,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_B: Tensor,
    y: Tensor,
    scaling: float,
) -> Tensor:
    """h = W x + b + s W_d y, (B, H, W, C_out)."""
    h = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if h.numel():
        # h starts as the bias and the adapter's part, to which the product is added: updating h
        # after the product would read and write all of it once more.
        rows = h.flatten(0, -2)
        bias = None if bias is None else bias.contiguous()
        primitives.low_rank_expand(y.flatten(0, -2), lora_B.t(), bias, scaling, rows)
        rows.addmm_(_rows(x), weight.t())
    return h


class _Gradients:
    """Uninitialised gradients of a cell's parameters; empty where they are not due."""

    def __init__(self, cell: tuple, need_alpha: bool, need_weights: bool) -> None:
        alpha, depthwise, pw, _ = cell
        grad_alpha = gradient_like(alpha, need_alpha)
        grad_depthwise = [gradient_like(dw, need_weights) for dw in depthwise]
        grad_pw = gradient_like(pw, need_weights)
        self.all = (grad_alpha, *grad_depthwise, grad_pw)
        self.due = (
            grad_alpha if need_alpha else None,
            grad_depthwise if need_weights else None,
            grad_pw if need_weights else None,
        )

    def zero(self) -> tuple[Tensor, ...]:
        """The same, as zeros."""
        return tuple(gradient.zero_() if gradient.numel() else gradient for gradient in self.all)


def _cell_arguments(alpha, depthwise, pw, channels):
    """A cell's parameters and channels, contiguous."""
    channels = None if channels is None else channels.contiguous()
    depthwise = [dw.contiguous() for dw in depthwise]
    return alpha.contiguous(), depthwise, pw.contiguous(), channels


def _cell_partials(primitives: Primitives, z: Tensor, c: int) -> Tensor:
    groups = primitives.cell_groups(*z.shape[:-1], c)
    return z.new_empty((groups, primitives.cell_partial_size(c)), dtype=_accumulator(z))


def _accumulator(maps: Tensor) -> torch.dtype:
    return torch.float64 if maps.dtype == torch.float64 else torch.float32


def _rows(grid: Tensor) -> Tensor:
    """(..., channels) as a matrix (tokens, channels) whose rows are contiguous."""
    rows = grid.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()
