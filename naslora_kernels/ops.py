"""The operators of the cell and of the layer, ``torch.ops.naslora_<backend>.*``.

Every compiled backend has the same operators in a namespace of its own, so that several backends
can serve one device. This module states their schemas and their shapes (for torch.compile and
FakeTensor) once, and their autograd functions. ``attention.py`` does so for attention. Calls go
through PyTorch's dispatcher, which resolves negative bits, tensors without memory, subclasses,
modes and transforms before a kernel sees a tensor.

Backward operators take one flag per gradient. A gradient that is not needed is not computed: an
empty tensor takes its place.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable

from naslora_kernels.cell import Cell, LoRALinear
from naslora_kernels.tensors import DTYPES

_CELL = (
    "Tensor alpha, Tensor dw_sep3, Tensor dw_sep5, Tensor dw_dil3, Tensor dw_dil5, Tensor pw, "
    "Tensor? channels"
)
SCHEMAS = {
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
    # The same two after the search. They have no backward.
    "folded_cell": "(Tensor z, Tensor kernel, float avg_weight, float max_weight) -> Tensor",
    "folded_linear": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor kernel, "
        "float avg_weight, float max_weight) -> Tensor"
    ),
}


def operator(backend: str, name: str) -> OpOverload:
    """Returns an operator of a backend that has been loaded. torch.ops is the only registry."""
    return getattr(getattr(torch.ops, f"naslora_{backend}"), name).default


def gradient_like(tensor: Tensor, needed: bool) -> Tensor:
    """Returns an uninitialised contiguous gradient of ``tensor``, of size 0 if not needed."""
    if not needed:
        return tensor.new_empty((0,))
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def cell_gradients(
    parameters: Sequence[Tensor], need_alpha: bool, need_weights: bool
) -> list[Tensor]:
    """Returns uninitialised gradients of the six parameters, of size 0 where not needed."""
    return [gradient_like(t, need_weights if i else need_alpha) for i, t in enumerate(parameters)]


def layer_gradients(
    z: Tensor, linear: LoRALinear, need_x: bool, need_A: bool, need_B: bool
) -> tuple[Tensor, ...]:
    """Returns uninitialised gradients of x, lora_A and lora_B, of size 0 where not needed."""
    return (
        z.new_empty((*z.shape[:-1], linear.weight.shape[1]) if need_x else (0,)),
        gradient_like(linear.lora_A, need_A),
        gradient_like(linear.lora_B, need_B),
    )


def _map_like(z: Tensor, *rest: Any) -> Tensor:
    return gradient_like(z, True)


def _mixed_cell_backward(grad_y: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    need_z, *needed = rest[7:]
    return gradient_like(z, need_z), *cell_gradients(rest[:6], *needed)


def _nas_lora_linear(x: Tensor, weight: Tensor, bias: Any, A: Tensor, *rest: Any) -> Any:
    grid = x.shape[:-1]
    return x.new_empty((*grid, weight.shape[0])), x.new_empty((*grid, A.shape[0]))


def _nas_lora_linear_backward(
    grad_h: Tensor, x: Any, z: Tensor, weight: Tensor, A: Tensor, B: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    linear, needed = LoRALinear(weight, None, A, B), rest[8:]
    return *layer_gradients(z, linear, *needed[:3]), *cell_gradients(rest[:6], *needed[3:])


def _folded_linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# The results of the operators as uninitialised tensors.
SHAPES: dict[str, Callable[..., Any]] = {
    "mixed_cell": _map_like,
    "mixed_cell_backward": _mixed_cell_backward,
    "nas_lora_linear": _nas_lora_linear,
    "nas_lora_linear_backward": _nas_lora_linear_backward,
    "folded_cell": _map_like,
    "folded_linear": _folded_linear,
}


def define(
    backend: str,
    implementations: Mapping[str, Callable[..., Any]] | None = None,
    schemas: Mapping[str, str] = SCHEMAS,
    shapes: Mapping[str, Callable[..., Any]] = SHAPES,
) -> torch.library.Library:
    """Defines operators in the namespace of a backend.

    Args:
        backend: the end of the namespace.
        implementations: what the operators compute, by operator. If None, an extension registers
            that.
        schemas: the arguments and results, by operator.
        shapes: the results as uninitialised tensors, by operator.

    Returns:
        The library. The operators exist as long as it does.
    """
    namespace = f"naslora_{backend}"
    library = torch.library.Library(namespace, "FRAGMENT")
    for name, schema in schemas.items():
        library.define(name + schema)
        if implementations is not None:
            library.impl(name, implementations[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", shapes[name], lib=library)
    return library


def unsupported(served: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Returns why a backend for devices of type ``served`` cannot serve these tensors, or None."""
    if device_type != served:
        return f"it computes on {served!r}, the tensors are on {device_type!r}"
    return None if dtype in DTYPES else f"it has no kernels for {dtype}"


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As ``once_differentiable``, but every second derivative raises.

    PyTorch's raises only if the incoming gradient requires a gradient itself. The part of a second
    derivative that goes through the saved tensors would be missing without an error.
    """
    refuses_twice = once_differentiable(backward)

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        return refuses_twice(ctx, *(gradient.detach().requires_grad_() for gradient in gradients))

    return once


class MixedCell(torch.autograd.Function):
    """y = cell(z); arguments: the backend's name, z, and the fields of ``Cell``."""

    @staticmethod
    def forward(ctx: Any, backend: str, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*tensors)
        ctx.backend = backend
        return operator(backend, "mixed_cell")(*tensors)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:8]  # z, alpha, the depthwise kernels, pw
        need = (needed[0], needed[1], any(needed[2:]))
        compute = operator(ctx.backend, "mixed_cell_backward")
        return (None, *only(compute(grad_y, *ctx.saved_tensors, *need), needed), None)


class NASLoRALinear(torch.autograd.Function):
    """h = W0 x + b0 + s W_d cell(W_e x).

    Arguments: the backend's name, the scaling s, x, and the fields of ``LoRALinear`` and of
    ``Cell``. Keeps x (only if a weight's gradient needs it), z and the parameters. y is not kept:
    computing it again is cheaper.
    """

    @staticmethod
    def forward(ctx: Any, backend: str, scaling: float, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        h, z = operator(backend, "nas_lora_linear")(*tensors, scaling)
        x, weight, _, *adapter = tensors
        keep_x = ctx.needs_input_grad[3] or ctx.needs_input_grad[5]  # for weight or lora_A
        ctx.save_for_backward(x if keep_x else None, z, weight, *adapter)
        ctx.scaling, ctx.backend = scaling, backend
        return h

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        need_x, need_weight, need_bias, *needed = ctx.needs_input_grad[2:13]
        need_A, need_B, need_alpha, *need_weights = needed
        need = (need_x, need_A, need_B, need_alpha, any(need_weights))
        compute = operator(ctx.backend, "nas_lora_linear_backward")
        grad_x, *gradients = compute(grad_h, *saved, ctx.scaling, *need)
        return (
            *(None, None, grad_x if need_x else None),
            grad_h.flatten(0, -2).t() @ saved[0].flatten(0, -2) if need_weight else None,
            grad_h.flatten(0, -2).sum(0) if need_bias else None,
            *only(gradients, needed),
            None,
        )


def only(gradients: Iterable[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Replaces every gradient that is not needed with None."""
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]


# The functions of a backend, on checked arguments; ``reference.py`` has the same.


def mixed_cell(backend: str, z: Tensor, cell: Cell) -> Tensor:
    return MixedCell.apply(backend, z, *cell)


def nas_lora_linear(
    backend: str, x: Tensor, linear: LoRALinear, cell: Cell, scaling: float
) -> Tensor:
    return NASLoRALinear.apply(backend, scaling, x, *linear, *cell)


def folded_cell(
    backend: str, z: Tensor, kernel: Tensor, avg_weight: float, max_weight: float
) -> Tensor:
    return operator(backend, "folded_cell")(z, kernel, avg_weight, max_weight)


def folded_linear(
    backend: str,
    x: Tensor,
    linear: LoRALinear,
    kernel: Tensor,
    avg_weight: float,
    max_weight: float,
) -> Tensor:
    return operator(backend, "folded_linear")(x, *linear, kernel, avg_weight, max_weight)


def functions(backend: str) -> tuple[Callable[..., Tensor], ...]:
    """Returns the four functions above of a backend."""
    parts = (mixed_cell, nas_lora_linear, folded_cell, folded_linear)
    return tuple(functools.partial(part, backend) for part in parts)
