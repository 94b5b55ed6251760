"""Plans: an operator's launches with everything that shapes decide computed once.

``Launches`` reads shapes and strides, makes views and allocates a tensor for every intermediate
map and partial sum. On small maps this takes the host longer than the kernels take. A plan does it
once for each set of shapes, strides and dtypes: the operator runs on tensors of the meta device,
which have no memory, and what it does is recorded. Later calls repeat that on their own tensors.
Intermediate tensors become parts of one buffer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from naslora_kernels.tensors import signature

# Calls a function of an extension. Tensors among the arguments are passed as their addresses.
Launch: TypeAlias = Callable[..., None]
# Returns the first arguments of every launch on tensors like this one: its device and stream.
Stream: TypeAlias = Callable[[Tensor], tuple[int, ...]]

ALIGNMENT = 256  # bytes; of the parts of the buffer, about that of an allocation
MOST_PLANS = 1024  # of an operator, so that shapes that keep changing do not fill the memory


class Planned:
    """An operator that runs by plans."""

    def __init__(
        self,
        operator: Callable[..., Any],
        recorded: Callable[[Launch], Callable[..., Any]],
        stream: Stream,
        depthwise: int,
    ) -> None:
        """Stores what plans are made of.

        Args:
            operator: computes without a plan, or raises for tensors that it cannot compute.
            recorded: returns the operator with its launches sent to a function.
            stream: returns the first arguments of the launches.
            depthwise: the position of the list of depthwise kernels. pw, channels and numbers
                follow it. All arguments before it are tensors or None.
        """
        self._operator, self._recorded, self._stream = operator, recorded, stream
        self._depthwise = depthwise
        self._plans: dict[object, Plan] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Computes the operator. A gradient that is not needed is None."""
        at = self._depthwise
        tensors = (*arguments[:at], *arguments[at], *arguments[at + 1 : at + 3])
        numbers = arguments[at + 3 :]
        key = (signature(tensors), numbers)
        given = [tensor for tensor in tensors if tensor is not None]
        plan = self._plans.get(key)
        if plan is None:
            if key[0] is None or len({tensor.device for tensor in given}) > 1:
                return self._operator(*arguments)
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._plan(tensors, numbers)
        if plan.on_cpu and not _held(given, plan.bytes):
            return self._operator(*arguments)
        return plan.run(given)

    def _plan(self, tensors: Sequence[Tensor | None], numbers: tuple[Any, ...]) -> "Plan":
        at = self._depthwise
        stand_ins = [None if tensor is None else _without_memory(tensor) for tensor in tensors]
        arguments = (*stand_ins[:at], stand_ins[at : at + 4], *stand_ins[at + 4 :], *numbers)
        recorder = _Recorder()
        with recorder:
            results = self._recorded(recorder.launch)(*arguments)
        first = next(tensor for tensor in tensors if tensor is not None)
        recorder.given = [tensor for tensor in stand_ins if tensor is not None]
        return recorder.plan(results, first, self._stream)


class _Made(NamedTuple):
    """How a tensor is allocated: like a given one, or of a shape, strides and dtype."""

    like: int | None
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Plan:
    """What an operator does with tensors of given shapes, strides, dtypes and device.

    The values of a call are, in this order: the device and the stream, if launches take them; the
    given tensors and the allocated ones; the addresses of both and of the parts of the buffer; the
    constants.
    """

    steps: list[tuple[Callable[..., object], Callable[[Sequence[Any]], tuple[Any, ...]]]]
    """Functions, each with what picks its arguments from the values."""
    made: list[_Made]
    """The tensors to allocate."""
    results: list[int | None]
    """Which tensors are returned; None for a gradient that is not needed."""
    single: bool
    """Whether the operator returns a tensor, not several."""
    buffer: int
    """Bytes of the buffer."""
    offsets: list[int]
    """Where its parts start, in bytes."""
    constants: list[Any]
    stream: Stream
    on_cpu: bool
    bytes: list[int]
    """Of every given tensor, from its first to its last element."""

    def run(self, given: list[Tensor]) -> Any:
        """Computes the operator."""
        first = given[0]
        tensors = given + [
            first.new_empty_strided(shape, strides, dtype=dtype)
            if like is None
            else torch.empty_like(given[like])
            for like, shape, strides, dtype in self.made
        ]
        values = [*self.stream(first), *tensors, *[tensor.data_ptr() for tensor in tensors]]
        if self.offsets:
            buffer = first.new_empty(self.buffer, dtype=torch.uint8)
            start = buffer.data_ptr()
            values += [start + offset for offset in self.offsets]
        values += self.constants
        for function, pick in self.steps:
            function(*pick(values))
        if self.single:
            return tensors[self.results[0]]  # type: ignore[index]
        return [None if result is None else tensors[result] for result in self.results]


class _Recorder(TorchDispatchMode):
    """Records what is done to tensors of the meta device.

    Each storage stands for the memory of one tensor of a later call. Views start where it starts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []
        self._allocated: list[Tensor] = []
        # Functions and their arguments. ``_on_views`` gets tensors, launches get their addresses.
        self._steps: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def launch(self, function: Callable[..., object], *arguments: Any) -> None:
        """Records the launch of a kernel."""
        self._steps.append((function, arguments))

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if function._schema.is_mutable:
            self._compute(getattr(Tensor, name), *args)
        elif name in ("empty_like", "new_empty"):
            self._allocated.append(result)
        elif name in ("clone", "_to_copy"):
            self._allocated.append(result)
            self._compute(Tensor.copy_, result, args[0])
        elif not function.is_view and name not in ("_unsafe_view", "detach"):
            raise NotImplementedError(f"a plan cannot repeat {function}")
        return result

    def _compute(self, method: Callable[..., Tensor], *tensors: Tensor) -> None:
        """Records a method of tensors. Each tensor is followed by the layout of its view."""
        views = [x for tensor in tensors for x in (tensor, (tensor.shape, tensor.stride()))]
        self._steps.append((_on_views, (method, *views)))

    def plan(self, results: Tensor | Sequence[Tensor], first: Tensor, stream: Stream) -> Plan:
        """Returns the plan of what was recorded.

        Args:
            results: what the operator returned. A gradient of shape (0,) is not needed.
            first: the first tensor of a call; the first of ``given`` stands for it.
            stream: returns the first arguments of the launches.
        """
        returned = [results] if isinstance(results, Tensor) else results
        whole = {_storage(tensor) for tensor in returned if tensor.shape != (0,)}
        launched = set()
        for function, arguments in self._steps:
            used = whole if function is _on_views else launched
            used |= {_storage(argument) for argument in arguments if isinstance(argument, Tensor)}
        made = [tensor for tensor in self._allocated if _storage(tensor) in whole]
        parts = [tensor for tensor in self._allocated if _storage(tensor) in launched - whole]
        tensors = {_storage(tensor): i for i, tensor in enumerate((*self.given, *made))}
        *offsets, buffer = _offsets(parts)
        values = _Values(len(stream(first)), [*self.given, *made], parts)
        return Plan(
            steps=[values.step(function, arguments) for function, arguments in self._steps],
            made=[_made(tensor, self.given) for tensor in made],
            results=[tensors.get(_storage(tensor)) for tensor in returned],
            single=isinstance(results, Tensor),
            buffer=buffer,
            offsets=offsets,
            constants=values.constants,
            stream=stream,
            on_cpu=first.device.type == "cpu",
            bytes=[_bytes(tensor) for tensor in self.given],
        )


class _Values:
    """Where the arguments of steps are among the values of a call, in the order of ``Plan``."""

    def __init__(self, streams: int, tensors: list[Tensor], parts: list[Tensor]) -> None:
        self.constants: list[Any] = []
        self._streams = range(streams)
        self._layouts = {_storage(t): (t.shape, t.stride()) for t in tensors}
        self._tensors = {_storage(t): i for i, t in enumerate(tensors, streams)}
        start = streams + len(tensors)
        self._addresses = {_storage(t): i for i, t in enumerate((*tensors, *parts), start)}
        self._constants_start = start + len(self._addresses)

    def step(
        self, function: Callable[..., object], arguments: tuple[Any, ...]
    ) -> tuple[Callable[..., object], Callable[[Sequence[Any]], tuple[Any, ...]]]:
        """Returns the function and what picks its arguments."""
        if function is _on_views:
            method, *views = arguments
            places = [self._constant(method)]
            for tensor, layout in zip(views[::2], views[1::2], strict=True):
                whole = self._layouts[_storage(tensor)] == layout
                places.append(self._tensors[_storage(tensor)])
                places.append(self._constant(None if whole else layout))
        else:
            places = [*self._streams, *map(self._number, arguments)]
        return function, itemgetter(*places)

    def _number(self, argument: Any) -> int:
        if isinstance(argument, Tensor):
            return self._addresses[_storage(argument)]
        return self._constant(0 if argument is None else argument)

    def _constant(self, value: Any) -> int:
        self.constants.append(value)
        return self._constants_start + len(self.constants) - 1


def _on_views(method: Callable[..., object], *views: Any) -> None:
    """Calls a method of tensors. Each one is followed by None or a view's shape and strides."""
    method(*map(_view, views[::2], views[1::2]))


def _view(tensor: Tensor, layout: tuple[torch.Size, tuple[int, ...]] | None) -> Tensor:
    return tensor if layout is None else tensor.as_strided(*layout)


def _without_memory(tensor: Tensor) -> Tensor:
    layout = (tensor.shape, tensor.stride())
    return torch.empty_strided(*layout, dtype=tensor.dtype, device="meta")


def _made(tensor: Tensor, given: list[Tensor]) -> _Made:
    how = (tensor.shape, tensor.stride(), tensor.dtype)
    for i, other in enumerate(given):  # a tensor like another is allocated a little faster
        if (other.shape, other.stride(), other.dtype) == how:
            return _Made(i, *how)
    return _Made(None, *how)


def _offsets(parts: Sequence[Tensor]) -> list[int]:
    """Returns where each part of a buffer starts, and the buffer's size, in bytes."""
    offsets = [0]
    for part in parts:
        offsets.append(-(-(offsets[-1] + _bytes(part)) // ALIGNMENT) * ALIGNMENT)
    return offsets


def _bytes(tensor: Tensor) -> int:
    """Returns the bytes from the first to the last element of a tensor."""
    if not tensor.numel():
        return 0
    last = sum(step * (n - 1) for step, n in zip(tensor.stride(), tensor.shape, strict=True))
    return (last + 1) * tensor.element_size()


def _held(tensors: Sequence[Tensor], bytes: Sequence[int]) -> bool:
    """Returns whether the storages of tensors on a CPU still have that many bytes for them."""
    return all(
        tensor.untyped_storage().nbytes() >= tensor.storage_offset() * tensor.element_size() + size
        for tensor, size in zip(tensors, bytes, strict=True)
    )


def _storage(tensor: Tensor) -> int:
    """Returns what tells a storage from others."""
    return tensor.untyped_storage()._cdata
