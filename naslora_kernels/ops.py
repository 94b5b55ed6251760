"""The operators of the cell, ``torch.ops.naslora_<backend>.*``, and their autograd functions.

Every compiled backend has the same six operators in a namespace of its own, so that several
backends can serve one device. This module states their schemas and their shapes (for torch.compile
and FakeTensor) once. It is also the only place that turns the flat arguments of a schema into
``Cell`` and ``LoRALinear``: a backend implements ``Kernels`` over these tuples.

Backward operators take one flag per gradient. A gradient that is not needed is not computed: an
empty tensor takes its place.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable

from naslora_kernels.cell import Cell, LoRALinear
from naslora_kernels.plans import Function, Launch, Planned, Stream
from naslora_kernels.tensors import DTYPES, gradient_like

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
    # The same two after the search. They have no backward.
    "folded_cell": "(Tensor z, Tensor kernel, float average, float maximum) -> Tensor",
    "folded_linear": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor kernel, "
        "float average, float maximum) -> Tensor"
    ),
}


class Operators(NamedTuple):
    """One backend's operators, or the functions that they call."""

    mixed_cell: Callable[..., Any]
    mixed_cell_backward: Callable[..., Any]
    nas_lora_linear: Callable[..., Any]
    nas_lora_linear_backward: Callable[..., Any]
    folded_cell: Callable[..., Any]
    folded_linear: Callable[..., Any]


# The operators of every backend that has been loaded, by the backend's name.
OPERATORS: dict[str, Operators] = {}

Maybe: TypeAlias = Tensor | None

# The position of the list of depthwise kernels. pw, channels and numbers follow it.
_DEPTHWISE = {
    name: schema.split(", ").index("Tensor[] depthwise")
    for name, schema in _SCHEMAS.items()
    if "Tensor[] depthwise" in schema
}


# The four operators with gradients, as functions of flat tensors, by backend and name.
_FUNCTIONS: dict[str, dict[str, Function]] = {}


def _call(backend: str, name: str, tensors: tuple[Maybe, ...], numbers: tuple[float, ...]) -> Any:
    return getattr(OPERATORS[backend], name)(*_arguments(name, tensors, numbers))


def _arguments(
    name: str, tensors: tuple[Maybe, ...], numbers: tuple[float, ...]
) -> tuple[Any, ...]:
    """Returns the arguments of a schema."""
    at = _DEPTHWISE[name]
    return (*tensors[:at], list(tensors[at : at + 4]), *tensors[at + 4 :], *numbers)


def _operator(name: str, function: Function) -> Callable[..., Any]:
    """Returns a function of the arguments of a schema."""
    at = _DEPTHWISE[name]
    count = at + 3  # tensors and lists of tensors; numbers follow

    def call(*arguments: Any) -> Any:
        tensors = (*arguments[:at], *arguments[at], *arguments[at + 1 : count])
        results = function(tensors, arguments[count:])
        if isinstance(results, Tensor):
            return results
        likes = tensors[-len(results) - 1 : -1]  # of the dtypes of the gradients, channels behind
        return [
            like.new_empty((0,)) if result is None else result
            for result, like in zip(results, likes, strict=True)
        ]

    return call


class CellNeed(NamedTuple):
    """Which gradients of a cell are needed; ``weights`` are the depthwise kernels and pw."""

    z: bool
    alpha: bool
    weights: bool


class LayerNeed(NamedTuple):
    """Which gradients of a layer are needed; ``weights`` are the depthwise kernels and pw."""

    x: bool
    lora_A: bool
    lora_B: bool
    alpha: bool
    weights: bool


class SavedLayer(NamedTuple):
    """What the forward of a layer keeps for its backward."""

    x: Tensor | None
    """(B, H, W, C_in); None if the gradient of ``lora_A`` is not needed."""
    z: Tensor
    """(B, H, W, r)."""
    linear: LoRALinear
    """Without its bias."""
    cell: Cell
    scaling: float


class Kernels(Protocol):
    """What a backend computes, one method per operator. Arguments are checked."""

    def mixed_cell(self, z: Tensor, cell: Cell) -> Tensor:
        """Returns y (B, H, W, r)."""

    def mixed_cell_backward(
        self, grad_y: Tensor, z: Tensor, cell: Cell, need: CellNeed
    ) -> tuple[Tensor, ...]:
        """Returns the gradients of z and of the cell's six parameters."""

    def nas_lora_linear(
        self, x: Tensor, linear: LoRALinear, cell: Cell, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Returns h (B, H, W, C_out) and z = W_e x (B, H, W, r)."""

    def nas_lora_linear_backward(
        self, grad_h: Tensor, saved: SavedLayer, need: LayerNeed
    ) -> tuple[Tensor, ...]:
        """Returns the gradients of x, lora_A, lora_B and of the cell's six parameters."""

    def folded_cell(self, z: Tensor, kernel: Tensor, average: float, maximum: float) -> Tensor:
        """Returns y (B, H, W, c)."""

    def folded_linear(
        self, x: Tensor, linear: LoRALinear, kernel: Tensor, average: float, maximum: float
    ) -> Tensor:
        """Returns h (B, H, W, C_out)."""


def flat_kernels(kernels: Kernels) -> dict[str, Callable[..., Any]]:
    """Returns the kernels as functions of the flat arguments of the schemas, by operator."""

    def mixed_cell(z: Tensor, *cell: Any) -> Tensor:
        return kernels.mixed_cell(z, Cell(*cell))

    def mixed_cell_backward(grad_y: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return kernels.mixed_cell_backward(grad_y, z, Cell(*rest[:4]), CellNeed(*rest[4:]))

    def nas_lora_linear(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return kernels.nas_lora_linear(x, LoRALinear(*rest[:4]), Cell(*rest[4:8]), rest[8])

    def nas_lora_linear_backward(
        grad_h: Tensor, x: Tensor | None, z: Tensor, weight: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        linear, cell = LoRALinear(weight, None, *rest[:2]), Cell(*rest[2:6])
        saved = SavedLayer(x, z, linear, cell, rest[6])
        return kernels.nas_lora_linear_backward(grad_h, saved, LayerNeed(*rest[7:]))

    def folded_linear(x: Tensor, *rest: Any) -> Tensor:
        return kernels.folded_linear(x, LoRALinear(*rest[:4]), *rest[4:])

    return {
        "mixed_cell": mixed_cell,
        "mixed_cell_backward": mixed_cell_backward,
        "nas_lora_linear": nas_lora_linear,
        "nas_lora_linear_backward": nas_lora_linear_backward,
        "folded_cell": kernels.folded_cell,
        "folded_linear": folded_linear,
    }


class _Shapes:
    """The results of every operator as uninitialised tensors; implements ``Kernels``."""

    def mixed_cell(self, z: Tensor, cell: Cell) -> Tensor:
        return torch.empty_like(z, memory_format=torch.contiguous_format)

    def mixed_cell_backward(
        self, grad_y: Tensor, z: Tensor, cell: Cell, need: CellNeed
    ) -> tuple[Tensor, ...]:
        return gradient_like(z, need.z), *cell_gradients(cell, need)

    def nas_lora_linear(
        self, x: Tensor, linear: LoRALinear, cell: Cell, scaling: float
    ) -> tuple[Tensor, Tensor]:
        grid = x.shape[:-1]
        c_out, rank = linear.lora_B.shape
        return x.new_empty((*grid, c_out)), x.new_empty((*grid, rank))

    def nas_lora_linear_backward(
        self, grad_h: Tensor, saved: SavedLayer, need: LayerNeed
    ) -> tuple[Tensor, ...]:
        return (*layer_gradients(saved, need), *cell_gradients(saved.cell, need))

    def folded_cell(self, z: Tensor, kernel: Tensor, average: float, maximum: float) -> Tensor:
        return torch.empty_like(z, memory_format=torch.contiguous_format)

    def folded_linear(
        self, x: Tensor, linear: LoRALinear, kernel: Tensor, average: float, maximum: float
    ) -> Tensor:
        return x.new_empty((*x.shape[:-1], linear.weight.shape[0]))


def cell_gradients(cell: Cell, need: CellNeed | LayerNeed) -> list[Tensor]:
    """Returns uninitialised gradients of the six parameters, of size 0 where not needed."""
    weights = [gradient_like(weight, need.weights) for weight in (*cell.depthwise, cell.pw)]
    return [gradient_like(cell.alpha, need.alpha), *weights]


def layer_gradients(saved: SavedLayer, need: LayerNeed) -> tuple[Tensor, ...]:
    """Returns uninitialised gradients of x, lora_A and lora_B, of size 0 where not needed."""
    z, linear = saved.z, saved.linear
    return (
        z.new_empty((*z.shape[:-1], linear.weight.shape[1]) if need.x else (0,)),
        gradient_like(linear.lora_A, need.lora_A),
        gradient_like(linear.lora_B, need.lora_B),
    )


def define_operators(
    backend: str,
    kernels: Kernels,
    dispatch_key: str,
    runner: Any = None,
    recorded: Callable[[Launch], Kernels] | None = None,
    stream: Stream = lambda tensor: (),
) -> torch.library.Library:
    """Defines the operators of a backend and registers its kernels.

    Args:
        backend: the end of the operators' namespace.
        kernels: what the operators compute.
        dispatch_key: the key of PyTorch's dispatcher that the kernels serve.
        runner: the extension that runs plans of the operators in eager mode. If None, they run as
            they are.
        recorded: returns the kernels with their launches sent to a function, to make plans.
        stream: returns the first arguments of launches on tensors like the given one.

    Returns:
        The library. The operators exist as long as it does.
    """
    shapes = flat_kernels(_Shapes())
    _FUNCTIONS[backend] = {
        name: _function(name, kernels)
        if runner is None or recorded is None
        else Planned(
            _function(name, kernels),
            functools.partial(_recorded, name, recorded),
            runner,
            stream,
        )
        for name in _DEPTHWISE
    }
    implementations = {
        **flat_kernels(kernels),
        **{name: _operator(name, function) for name, function in _FUNCTIONS[backend].items()},
    }
    library, operators = define(backend, _SCHEMAS, implementations, shapes, dispatch_key)
    OPERATORS[backend] = Operators(*operators)
    return library


def _function(name: str, kernels: Kernels) -> Function:
    flat = flat_kernels(kernels)[name]
    return lambda tensors, numbers: flat(*_arguments(name, tensors, numbers))


def _recorded(name: str, recorded: Callable[[Launch], Kernels], launch: Launch) -> Function:
    return _function(name, recorded(launch))


def define(
    backend: str,
    schemas: Mapping[str, str],
    implementations: Mapping[str, Callable[..., Any]],
    shapes: Mapping[str, Callable[..., Any]],
    dispatch_key: str,
) -> tuple[torch.library.Library, list[OpOverload]]:
    """Defines operators in the namespace of a backend.

    Args:
        backend: the end of the namespace.
        schemas: the arguments and results, by operator.
        implementations: what the operators compute, by operator.
        shapes: the results as uninitialised tensors, by operator.
        dispatch_key: the key of PyTorch's dispatcher that the implementations serve.

    Returns:
        The library, and the operators in the order of ``schemas``. They exist as long as it does.
    """
    namespace = f"naslora_{backend}"
    library = torch.library.Library(namespace, "FRAGMENT")
    for name, schema in schemas.items():
        library.define(name + schema)
        library.impl(name, implementations[name], dispatch_key)
        torch.library.register_fake(f"{namespace}::{name}", shapes[name], lib=library)
    defined = getattr(torch.ops, namespace)
    return library, [getattr(defined, name).default for name in schemas]


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
    """y = cell(z); arguments: the backend's name, z, and the seven values of ``Cell.flatten``."""

    @staticmethod
    def forward(ctx: Any, backend: str, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*tensors)
        ctx.backend = backend
        return _call(backend, "mixed_cell", tensors, ())

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:8]  # z, alpha, the depthwise kernels, pw
        need = CellNeed(needed[0], needed[1], any(needed[2:]))
        tensors = (grad_y, *ctx.saved_tensors)
        gradients = _call(ctx.backend, "mixed_cell_backward", tensors, need)
        return (None, *only(gradients, needed), None)


class NASLoRALinear(torch.autograd.Function):
    """h = W0 x + b0 + s W_d cell(W_e x).

    Arguments: the backend's name, the scaling s, x, weight, bias, lora_A, lora_B, and the seven
    values of ``Cell.flatten``. Keeps x (only if a weight's gradient needs it), z and the
    parameters. y is not kept: computing it again is cheaper.
    """

    @staticmethod
    def forward(ctx: Any, backend: str, scaling: float, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        h, z = _call(backend, "nas_lora_linear", tensors, (scaling,))
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
        need = LayerNeed(need_x, need_A, need_B, need_alpha, any(need_weights))
        grad_x, *gradients = _call(
            ctx.backend, "nas_lora_linear_backward", (grad_h, *saved), (ctx.scaling, *need)
        )
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


class EntryPoints(NamedTuple):
    """The four functions of a backend, on checked arguments; ``reference.py`` has the same."""

    mixed_cell: Callable[[Tensor, Cell], Tensor]
    nas_lora_linear: Callable[[Tensor, LoRALinear, Cell, float], Tensor]
    folded_cell: Callable[[Tensor, Tensor, float, float], Tensor]
    folded_linear: Callable[[Tensor, LoRALinear, Tensor, float, float], Tensor]


def entry_points(backend: str) -> EntryPoints:
    """Returns the four functions of a compiled backend, which call its operators."""

    def mixed_cell(z: Tensor, cell: Cell) -> Tensor:
        return MixedCell.apply(backend, z, *cell.flatten())

    def nas_lora_linear(x: Tensor, linear: LoRALinear, cell: Cell, scaling: float) -> Tensor:
        return NASLoRALinear.apply(backend, scaling, x, *linear, *cell.flatten())

    def folded_cell(z: Tensor, kernel: Tensor, average: float, maximum: float) -> Tensor:
        return OPERATORS[backend].folded_cell(z, kernel, average, maximum)

    def folded_linear(
        x: Tensor, linear: LoRALinear, kernel: Tensor, average: float, maximum: float
    ) -> Tensor:
        return OPERATORS[backend].folded_linear(x, *linear, kernel, average, maximum)

    return EntryPoints(mixed_cell, nas_lora_linear, folded_cell, folded_linear)
