"""The operators ``torch.ops.naslora_<backend>.*`` and the autograd functions around them.

Every compiled backend has the same four operators under a namespace of its own, so that several
can serve one device. Their schemas and their shapes (for torch.compile and FakeTensor) stand here
once; a backend calls ``define_operators`` and registers its kernels. Backward operators take flags
for the gradients that are due, compute no other, and return an empty tensor in its place.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable

_CELL = "Tensor alpha, Tensor[] depthwise, Tensor pw, Tensor? channels"
_SCHEMAS = {
    "mixed_cell": f"(Tensor z, {_CELL}) -> Tensor",
    "mixed_cell_backward": (
        f"(Tensor grad_y, Tensor z, {_CELL}, bool need_z, bool need_alpha, bool need_weights) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "nas_lora_linear": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
        f"{_CELL}, float scaling) -> (Tensor h, Tensor z)"
    ),
    "nas_lora_linear_backward": (
        "(Tensor grad_h, Tensor? x, Tensor z, Tensor weight, Tensor lora_A, Tensor lora_B, "
        f"{_CELL}, float scaling, bool need_x, bool need_lora_A, bool need_lora_B, "
        "bool need_alpha, bool need_weights) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    # What is left of the two after the search: inference only.
    "folded_cell": "(Tensor z, Tensor kernel, float average, float maximum) -> Tensor",
    "folded_linear": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor kernel, "
        "float average, float maximum) -> Tensor"
    ),
}


class Operators(NamedTuple):
    """One backend's operators."""

    mixed_cell: OpOverload
    mixed_cell_backward: OpOverload
    nas_lora_linear: OpOverload
    nas_lora_linear_backward: OpOverload
    folded_cell: OpOverload
    folded_linear: OpOverload


OPERATORS: dict[str, Operators] = {}


def define_operators(backend: str) -> torch.library.Library:
    """Defines the operators of a backend; it registers its kernels with the library returned."""
    library = torch.library.Library(f"naslora_{backend}", "DEF")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
        torch.library.register_fake(f"naslora_{backend}::{name}", _FAKES[name], lib=library)
    namespace = getattr(torch.ops, f"naslora_{backend}")
    OPERATORS[backend] = Operators(*(getattr(namespace, name).default for name in _SCHEMAS))
    return library


def gradient_like(tensor: Tensor, needed: bool, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous gradient of ``tensor``, or an empty tensor if not needed."""
    if not needed:
        return tensor.new_empty((0,), dtype=dtype)
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def _fake_mixed_cell(z, alpha, depthwise, pw, channels):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _fake_mixed_cell_backward(
    grad_y, z, alpha, depthwise, pw, channels, need_z, need_alpha, need_weights
):
    return (
        gradient_like(z, need_z),
        gradient_like(alpha, need_alpha),
        *(gradient_like(weight, need_weights) for weight in (*depthwise, pw)),
    )


def _fake_nas_lora_linear(x, weight, bias, lora_A, lora_B, alpha, depthwise, pw, channels, scaling):
    grid = x.shape[:-1]
    return x.new_empty((*grid, weight.shape[0])), x.new_empty((*grid, lora_A.shape[0]))


def _fake_nas_lora_linear_backward(
    grad_h, x, z, weight, lora_A, lora_B, alpha, depthwise, pw, channels, scaling,
    need_x, need_lora_A, need_lora_B, need_alpha, need_weights,
):  # fmt: skip
    grad_x_shape = (*z.shape[:-1], weight.shape[1]) if need_x else (0,)
    return (
        z.new_empty(grad_x_shape),
        gradient_like(lora_A, need_lora_A),
        gradient_like(lora_B, need_lora_B),
        gradient_like(alpha, need_alpha),
        *(gradient_like(weight, need_weights) for weight in (*depthwise, pw)),
    )


def _fake_folded_cell(z, kernel, average, maximum):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _fake_folded_linear(x, weight, bias, lora_A, lora_B, kernel, average, maximum):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_FAKES = {
    "mixed_cell": _fake_mixed_cell,
    "mixed_cell_backward": _fake_mixed_cell_backward,
    "nas_lora_linear": _fake_nas_lora_linear,
    "nas_lora_linear_backward": _fake_nas_lora_linear_backward,
    "folded_cell": _fake_folded_cell,
    "folded_linear": _fake_folded_linear,
}


class MixedCell(torch.autograd.Function):
    """y = cell(z); arguments (z, alpha, dw_sep3, dw_sep5, dw_dil3, dw_dil5, pw, channels, name of
    the backend)."""

    @staticmethod
    def forward(ctx, z, alpha, dw_sep3, dw_sep5, dw_dil3, dw_dil5, pw, channels, backend):
        ctx.save_for_backward(z, alpha, dw_sep3, dw_sep5, dw_dil3, dw_dil5, pw, channels)
        ctx.backend = backend
        depthwise = [dw_sep3, dw_sep5, dw_dil3, dw_dil5]
        return OPERATORS[backend].mixed_cell(z, alpha, depthwise, pw, channels)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        z, alpha, *depthwise, pw, channels = ctx.saved_tensors
        need = ctx.needs_input_grad
        gradients = OPERATORS[ctx.backend].mixed_cell_backward(
            grad_y, z, alpha, depthwise, pw, channels, need[0], need[1], any(need[2:7])
        )
        return *_due(gradients, need[:7]), None, None


class NASLoRALinear(torch.autograd.Function):
    """h = W0 x + b0 + s W_d cell(W_e x); arguments (x, weight, bias, lora_A, lora_B, alpha,
    dw_sep3, dw_sep5, dw_dil3, dw_dil5, pw, channels, scaling, name of the backend).

    Keeps x (where a weight's gradient needs it), z and the parameters: y is cheaper to compute
    again than to keep.
    """

    @staticmethod
    def forward(
        ctx, x, weight, bias, lora_A, lora_B, alpha, dw_sep3, dw_sep5, dw_dil3, dw_dil5, pw,
        channels, scaling, backend,
    ):  # fmt: skip
        depthwise = [dw_sep3, dw_sep5, dw_dil3, dw_dil5]
        h, z = OPERATORS[backend].nas_lora_linear(
            x, weight, bias, lora_A, lora_B, alpha, depthwise, pw, channels, scaling
        )
        need_weight, need_lora_A = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        ctx.save_for_backward(
            x if need_weight or need_lora_A else None,
            z, weight, lora_A, lora_B, alpha, *depthwise, pw, channels,
        )  # fmt: skip
        ctx.scaling, ctx.backend = scaling, backend
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h):
        x, z, weight, lora_A, lora_B, alpha, *depthwise, pw, channels = ctx.saved_tensors
        need = ctx.needs_input_grad
        grad_x, *gradients = OPERATORS[ctx.backend].nas_lora_linear_backward(
            grad_h, x, z, weight, lora_A, lora_B, alpha, depthwise, pw, channels, ctx.scaling,
            need[0], need[3], need[4], need[5], any(need[6:11]),
        )  # fmt: skip
        rows = grad_h.flatten(0, -2)  # (tokens, C_out)
        return (
            grad_x if need[0] else None,
            rows.t() @ x.flatten(0, -2) if need[1] else None,
            rows.sum(0) if need[2] else None,
            *_due(gradients, need[3:11]),
            None,
            None,
            None,
        )


def _due(gradients, need):
    """None in place of each gradient that was not asked for."""
    return [gradient if due else None for gradient, due in zip(gradients, need, strict=True)]


def entry_points(backend: str) -> tuple[Callable[..., Tensor], ...]:
    """What a compiled backend computes on checked arguments, over its operators: ``mixed_cell``,
    ``nas_lora_linear``, ``folded_cell``, ``folded_linear``, as the reference has them."""

    def mixed_cell(z, alpha, depthwise, pw, channels):
        return MixedCell.apply(z, alpha, *depthwise, pw, channels, backend)

    def nas_lora_linear(x, weight, bias, lora_A, lora_B, alpha, depthwise, pw, channels, scaling):
        return NASLoRALinear.apply(
            x, weight, bias, lora_A, lora_B, alpha, *depthwise, pw, channels, scaling, backend
        )

    def folded_cell(z, kernel, average, maximum):
        return OPERATORS[backend].folded_cell(z, kernel, average, maximum)

    def folded_linear(x, weight, bias, lora_A, lora_B, kernel, average, maximum):
        return OPERATORS[backend].folded_linear(
            x, weight, bias, lora_A, lora_B, kernel, average, maximum
        )

    return mixed_cell, nas_lora_linear, folded_cell, folded_linear
