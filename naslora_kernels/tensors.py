"""What the backends share about tensors: dtypes, the dtype of sums, rows, addresses."""

import ctypes
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The dtypes that every backend computes. Their order is that of the enum Dtype in csrc.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}

# The dtype in which maps of a dtype are computed and summed.
ACCUMULATORS = {
    dtype: torch.float64 if dtype == torch.float64 else torch.float32 for dtype in DTYPES
}


def rows(grid: Tensor) -> Tensor:
    """Returns (..., channels) as a matrix (tokens, channels) whose rows are contiguous."""
    matrix = grid.flatten(0, -2)
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def addresses(arguments: Iterable[Any]) -> list[Any]:
    """Replaces tensors with the addresses of their first elements, and None with 0."""
    return [
        argument.data_ptr() if isinstance(argument, Tensor) else 0 if argument is None else argument
        for argument in arguments
    ]


def torch_function(name: str) -> Any:
    """Returns a function of torch's C interface, to be called by ctypes.

    Raises:
        AttributeError: this torch does not export it.
        OSError: torch's library cannot be opened.
    """
    # Windows looks in the named library alone, other systems also in those that it is linked with.
    windows = Path(torch.__file__).parent / "lib" / "torch_cpu.dll"
    return getattr(ctypes.CDLL(str(windows) if os.name == "nt" else torch._C.__file__), name)


def address_of_function(name: str) -> int:
    """Returns the address of a function of torch's C interface. Raises what it raises."""
    return ctypes.cast(torch_function(name), ctypes.c_void_p).value or 0


def last_size(tensor: Tensor | None, other: Tensor | None) -> int:
    """Returns the size of the last dimension of a tensor, or of the other one if it is None."""
    given = other if tensor is None else tensor
    assert given is not None, "at least one tensor is expected"
    return given.shape[-1]


def gradient_like(tensor: Tensor, needed: bool) -> Tensor:
    """Returns an uninitialised contiguous gradient of ``tensor``, of size 0 if not needed."""
    if not needed:
        return tensor.new_empty((0,))
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def signature(tensors: tuple[Tensor | None, ...]) -> object:
    """Returns what the checks of tensors look at, except for values: two calls with equal
    signatures pass or fail alike. None while torch.compile traces, and for what is no dense
    tensor."""
    if torch.compiler.is_compiling():
        return None
    # Subclasses of Tensor may have sizes that are no numbers.
    describe = _describe if type(tensors[0]) is Tensor else _describe_slowly
    try:
        return describe(tensors)
    except (AttributeError, TypeError):
        return None


def describe_by(describe: Callable[[tuple[Tensor | None, ...]], object]) -> None:
    """Lets an extension compute signatures, which takes it less time."""
    global _describe
    _describe = describe


def _describe_slowly(tensors: tuple[Tensor | None, ...]) -> object:
    return tuple(None if t is None else (t.shape, t.dtype, t.device, t.layout) for t in tensors)


_describe: Callable[[tuple[Tensor | None, ...]], object] = _describe_slowly


class Passed:
    """The signatures of calls that have passed a check, so that it runs once for each."""

    def __init__(self) -> None:
        self._signatures: set[object] = set()

    def __contains__(self, signature: object) -> bool:
        return signature is not None and signature in self._signatures

    def add(self, signature: object) -> None:
        if len(self._signatures) >= 1024:  # shapes that keep changing do not fill the memory
            self._signatures.clear()
        self._signatures.add(signature)
