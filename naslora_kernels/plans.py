"""Plans: an operator's launches with everything that shapes decide computed once.

``Launches`` reads shapes and strides, makes views and allocates a tensor for every intermediate
map and partial sum. On small maps this takes the host longer than the kernels take. A plan does it
once for each set of shapes, strides and dtypes: the operator runs on tensors of the meta device,
which have no memory, and what it does is recorded. Later calls repeat that on their own tensors.
``csrc/shared/plans.h`` runs plans: an operator is then one call of the extension.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from naslora_kernels.tensors import address_of_function, describe_by, torch_function

# Calls a function of an extension. Tensors among the arguments are passed as their addresses.
Launch: TypeAlias = Callable[..., None]
# Returns the first arguments of every launch on tensors like this one: its device and stream.
Stream: TypeAlias = Callable[[Tensor], tuple[int, ...]]
# An operator as a function of all of its tensors and of its numbers.
Function: TypeAlias = Callable[[tuple[Tensor | None, ...], tuple[float, ...]], Any]

ALIGNMENT = 256  # bytes; of the parts of the buffer, about that of an allocation
MOST_PLANS = 1024  # of an operator, so that shapes that keep changing do not fill the memory

# Of torch's C interface, in the order of the struct Torch in csrc/shared/plans.h.
TORCH_FUNCTIONS = (
    "get_data_ptr",
    "get_layout",
    "get_dim",
    "get_sizes",
    "get_strides",
    "get_dtype",
    "get_device_type",
    "get_device_index",
    "get_storage_offset",
    "get_storage_size",
    "empty_strided",
    "_reinterpret_tensor",
    "delete_tensor_object",
    "dtype_element_size",
    "device_type_cpu",
    "dtype_uint8",
    "layout_strided",
)


def plan_runner(extension: Any) -> Any:
    """Gives an extension the functions of torch by which it runs plans.

    Returns:
        The extension; None if it is older than plans, or if torch does not export the functions.
    """
    try:
        extension.use_torch(
            torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors,
            torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs,
            *[address_of_function(f"aoti_torch_{name}") for name in TORCH_FUNCTIONS],
        )
    except (AttributeError, OSError):
        return None
    describe_by(extension.describe)
    return extension


class Made(NamedTuple):
    """A tensor to allocate."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: int
    """Its number in torch's C interface."""


class Kernel(NamedTuple):
    """A launch."""

    launch: Callable[..., None]
    arguments: tuple[Any, ...]
    """Behind the device and the stream; 0 for an address."""
    addresses: tuple[int, ...]
    """For every address, its position in ``arguments`` and its number."""


class Method(NamedTuple):
    """A method of tensors, on views."""

    method: Callable[..., Tensor]
    arguments: None
    views: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]
    """Each is the number of a tensor, sizes and strides."""


class Plan(NamedTuple):
    """What an operator does with tensors of given shapes, strides, dtypes and devices.

    Tensors are numbered: the given ones, then the allocated ones. So are addresses: those of all
    tensors, then those of the parts of one buffer, which holds intermediate tensors.
    """

    made: tuple[Made, ...]
    offsets: tuple[int, ...]
    """Where the parts of the buffer start, and its size, in bytes."""
    steps: tuple[Kernel | Method, ...]
    results: tuple[int | None, ...]
    """The numbers of the tensors to return; None for a gradient that is not needed."""
    single: bool
    """Whether the operator returns a tensor, not several."""


class Planned:
    """An operator that runs by plans."""

    def __init__(
        self,
        function: Function,
        recorded: Callable[[Launch], Function],
        runner: Any,
        stream: Stream,
    ) -> None:
        """Stores what plans are made of.

        Args:
            function: computes without a plan, or raises for tensors that it cannot compute.
            recorded: returns the function with its launches sent to another one.
            runner: the extension that runs plans.
            stream: returns the first arguments of the launches.
        """
        self._function, self._recorded = function, recorded
        self._run, self._stream = runner.run_plan, stream
        self._plans: dict[object, Plan] = {}

    def __call__(self, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...]) -> Any:
        """Computes the operator. A gradient that is not needed is None."""
        first = tensors[0]
        assert first is not None, "the first tensor of an operator is always given"
        stream = self._stream(first)
        results = self._run(self._plans, tensors, numbers, stream)
        if type(results) is tuple:  # the key of a plan that is missing
            if len({tensor.device for tensor in tensors if tensor is not None}) > 1:
                return self._function(tensors, numbers)
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[results] = self._plan(tensors, numbers)
            results = self._run(self._plans, tensors, numbers, stream)
        if results is None:
            return self._function(tensors, numbers)
        return results

    def _plan(self, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...]) -> Plan:
        recorder = _Recorder()
        with torch.inference_mode(False), torch.no_grad():  # else some operators come whole
            stand_ins = tuple(None if t is None else _without_memory(t) for t in tensors)
            with recorder:
                results = self._recorded(recorder.launch)(stand_ins, numbers)
        return recorder.plan([tensor for tensor in stand_ins if tensor is not None], results)


class _Recorder(TorchDispatchMode):
    """Records what is done to tensors of the meta device.

    Each storage stands for the memory of one tensor of a later call. Views start where it starts.
    """

    def __init__(self) -> None:
        super().__init__()
        self._allocated: list[Tensor] = []
        # Whether it is a launch, the function or the method of tensors, the arguments.
        self._steps: list[tuple[bool, Callable[..., Any], tuple[Any, ...]]] = []

    def launch(self, function: Callable[..., None], *arguments: Any) -> None:
        """Records the launch of a kernel."""
        self._steps.append((True, function, arguments))

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if function._schema.is_mutable:
            self._steps.append((False, getattr(Tensor, name), args))
        elif name in ("empty_like", "new_empty"):
            self._allocated.append(result)
        elif name in ("clone", "_to_copy"):
            self._allocated.append(result)
            self._steps.append((False, Tensor.copy_, (result, args[0])))
        elif _storage(result) not in map(_storage, args[:1]):  # no view
            raise NotImplementedError(f"a plan cannot repeat {function}")
        return result

    def plan(self, given: list[Tensor], results: Tensor | Sequence[Tensor]) -> Plan:
        """Returns the plan of what was recorded.

        Args:
            given: the tensors that the operator was called with.
            results: what it returned. A gradient of shape (0,) is not needed.
        """
        returned = [results] if isinstance(results, Tensor) else results
        whole = {_storage(result) for result in returned if result.shape != (0,)}
        launched: set[int] = set()
        for is_launch, _, arguments in self._steps:
            used = launched if is_launch else whole
            used |= {_storage(argument) for argument in arguments if isinstance(argument, Tensor)}
        made = [tensor for tensor in self._allocated if _storage(tensor) in whole]
        parts = [tensor for tensor in self._allocated if _storage(tensor) in launched - whole]
        tensors = {_storage(tensor): i for i, tensor in enumerate((*given, *made))}
        addresses = {_storage(tensor): i for i, tensor in enumerate((*given, *made, *parts))}
        return Plan(
            tuple(_made(tensor) for tensor in made),
            _offsets(parts),
            tuple(
                _kernel(function, arguments, addresses)
                if is_launch
                else Method(function, None, tuple(_view(t, tensors) for t in arguments))
                for is_launch, function, arguments in self._steps
            ),
            tuple(tensors.get(_storage(result)) for result in returned),
            isinstance(results, Tensor),
        )


def _kernel(
    launch: Callable[..., None], arguments: tuple[Any, ...], addresses: dict[int, int]
) -> Kernel:
    numbers = [0 if x is None or isinstance(x, Tensor) else x for x in arguments]
    positions = [
        number
        for position, argument in enumerate(arguments)
        if isinstance(argument, Tensor)
        for number in (position, addresses[_storage(argument)])
    ]
    return Kernel(launch, tuple(numbers), tuple(positions))


def _view(tensor: Tensor, tensors: dict[int, int]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return tensors[_storage(tensor)], tuple(tensor.shape), tensor.stride()


def _made(tensor: Tensor) -> Made:
    dtype = torch_function(f"aoti_torch_dtype_{str(tensor.dtype).removeprefix('torch.')}")()
    return Made(tuple(tensor.shape), tensor.stride(), dtype)


def _without_memory(tensor: Tensor) -> Tensor:
    layout = (tensor.shape, tensor.stride())
    return torch.empty_strided(*layout, dtype=tensor.dtype, device="meta")


def _offsets(parts: Sequence[Tensor]) -> tuple[int, ...]:
    """Returns where each part of a buffer starts, and the buffer's size, in bytes."""
    offsets = [0]
    for part in parts:
        end = offsets[-1] + part.numel() * part.element_size()
        offsets.append(-(-end // ALIGNMENT) * ALIGNMENT)
    return tuple(offsets)


def _storage(tensor: Tensor) -> int:
    """Returns what tells a storage from others."""
    return tensor.untyped_storage()._cdata
