"""The operators ``torch.ops.naslora.*`` and the autograd functions around them.

An operator's schema and its shapes (for torch.compile and FakeTensor) stand here once; a backend
registers its kernels for a device, as ``cpp.py`` does for the CPU. Backward operators take flags
for the gradients that are due, compute no other, and return an empty tensor in its place.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LIBRARY = torch.library.Library("naslora", "DEF")

_CELL = "Tensor alpha, Tensor[] depthwise, Tensor pw, Tensor? channels"
LIBRARY.define(f"mixed_cell(Tensor z, {_CELL}) -> Tensor")
LIBRARY.define(
    f"mixed_cell_backward(Tensor grad_y, Tensor z, {_CELL}, bool need_z, bool need_alpha, "
    "bool need_weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"nas_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, {_CELL},"
    " float scaling) -> (Tensor h, Tensor z)"
)
LIBRARY.define(
    "nas_lora_linear_backward(Tensor grad_h, Tensor? x, Tensor z, Tensor weight, Tensor lora_A, "
    f"Tensor lora_B, {_CELL}, float scaling, bool need_x, bool need_lora_A, bool need_lora_B, "
    "bool need_alpha, bool need_weights) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

# What is left of both after the search: inference only.
LIBRARY.define("folded_cell(Tensor z, Tensor kernel, float average, float maximum) -> Tensor")
LIBRARY.define(
    "folded_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, "
    "Tensor kernel, float average, float maximum) -> Tensor"
)


def gradient_like(tensor: Tensor, needed: bool, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous gradient of ``tensor``, or an empty tensor if not needed."""
    if not needed:
        return tensor.new_empty((0,), dtype=dtype)
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


@torch.library.register_fake("naslora::mixed_cell", lib=LIBRARY)
def _(z, alpha, depthwise, pw, channels):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@torch.library.register_fake("naslora::mixed_cell_backward", lib=LIBRARY)
def _(grad_y, z, alpha, depthwise, pw, channels, need_z, need_alpha, need_weights):
    return (
        gradient_like(z, need_z),
        gradient_like(alpha, need_alpha),
        *(gradient_like(weight, need_weights) for weight in (*depthwise, pw)),
    )


@torch.library.register_fake("naslora::nas_lora_linear", lib=LIBRARY)
def _(x, weight, bias, lora_A, lora_B, alpha, depthwise, pw, channels, scaling):
    grid = x.shape[:-1]
    return x.new_empty((*grid, weight.shape[0])), x.new_empty((*grid, lora_A.shape[0]))


@torch.library.register_fake("naslora::nas_lora_linear_backward", lib=LIBRARY)
def _(
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


@torch.library.register_fake("naslora::folded_cell", lib=LIBRARY)
def _(z, kernel, average, maximum):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@torch.library.register_fake("naslora::folded_linear", lib=LIBRARY)
def _(x, weight, bias, lora_A, lora_B, kernel, average, maximum):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_mixed_cell = torch.ops.naslora.mixed_cell.default
_mixed_cell_backward = torch.ops.naslora.mixed_cell_backward.default
_nas_lora_linear = torch.ops.naslora.nas_lora_linear.default
_nas_lora_linear_backward = torch.ops.naslora.nas_lora_linear_backward.default
folded_cell = torch.ops.naslora.folded_cell.default
folded_linear = torch.ops.naslora.folded_linear.default


class MixedCell(torch.autograd.Function):
    """y = cell(z); arguments (z, alpha, dw_sep3, dw_sep5, dw_dil3, dw_dil5, pw, channels)."""

    @staticmethod
    def forward(ctx, z, alpha, dw_sep3, dw_sep5, dw_dil3, dw_dil5, pw, channels):
        ctx.save_for_backward(z, alpha, dw_sep3, dw_sep5, dw_dil3, dw_dil5, pw, channels)
        return _mixed_cell(z, alpha, [dw_sep3, dw_sep5, dw_dil3, dw_dil5], pw, channels)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        z, alpha, *depthwise, pw, channels = ctx.saved_tensors
        need = ctx.needs_input_grad
        gradients = _mixed_cell_backward(
            grad_y, z, alpha, depthwise, pw, channels, need[0], need[1], any(need[2:7])
        )
        return *_due(gradients, need[:7]), None


class NASLoRALinear(torch.autograd.Function):
    """h = W0 x + b0 + s W_d cell(W_e x); arguments (x, weight, bias, lora_A, lora_B, alpha,
    dw_sep3, dw_sep5, dw_dil3, dw_dil5, pw, channels, scaling).

    Keeps x (where a weight's gradient needs it), z and the parameters: y is cheaper to compute
    again than to keep.
    """

    @staticmethod
    def forward(
        ctx, x, weight, bias, lora_A, lora_B, alpha, dw_sep3, dw_sep5, dw_dil3, dw_dil5, pw,
        channels, scaling,
    ):  # fmt: skip
        depthwise = [dw_sep3, dw_sep5, dw_dil3, dw_dil5]
        h, z = _nas_lora_linear(
            x, weight, bias, lora_A, lora_B, alpha, depthwise, pw, channels, scaling
        )
        need_weight, need_lora_A = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        ctx.save_for_backward(
            x if need_weight or need_lora_A else None,
            z, weight, lora_A, lora_B, alpha, *depthwise, pw, channels,
        )  # fmt: skip
        ctx.scaling = scaling
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h):
        x, z, weight, lora_A, lora_B, alpha, *depthwise, pw, channels = ctx.saved_tensors
        need = ctx.needs_input_grad
        grad_x, *gradients = _nas_lora_linear_backward(
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
        )


def _due(gradients, need):
    """None in place of each gradient that was not asked for."""
    return [gradient if due else None for gradient, due in zip(gradients, need, strict=True)]
