"""What the backends share about tensors: dtypes, the dtype of sums, rows, torch's C interface."""

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The dtypes that every backend computes.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# The dtype in which maps of a dtype are computed and summed.
ACCUMULATORS = {
    dtype: torch.float64 if dtype == torch.float64 else torch.float32 for dtype in DTYPES
}


def rows(grid: Tensor) -> Tensor:
    """Returns (..., channels) as a matrix (tokens, channels) whose rows are contiguous."""
    matrix = grid.flatten(0, -2)
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def address_of_function(name: str) -> int:
    """Returns the address of a function of torch's C interface; 0 if this torch exports none."""
    # Windows looks in the named library alone, other systems also in those that it is linked with.
    windows = Path(torch.__file__).parent / "lib" / "torch_cpu.dll"
    try:
        library = ctypes.CDLL(str(windows) if os.name == "nt" else torch._C.__file__)
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    except (AttributeError, OSError):
        return 0


def use_torch(extension: Any) -> None:
    """Gives an extension the functions of torch's C interface.

    Raises:
        ImportError: it is of another version of naslora, or torch does not export a function.
    """
    if not hasattr(extension, "register_operators"):
        raise ImportError("it was built from an older version of naslora")
    extension.use_torch(address_of_function)


def last_size(tensor: Tensor | None, other: Tensor | None) -> int:
    """Returns the size of the last dimension of a tensor, or of the other one if it is None."""
    given = other if tensor is None else tensor
    assert given is not None, "at least one tensor is expected"
    return given.shape[-1]


def signature(tensors: tuple[Tensor | None, ...]) -> object:
    """Returns what the checks of tensors look at, except for values: two calls with equal
    signatures pass or fail alike. None while torch.compile traces, and for what is no tensor."""
    if torch.compiler.is_compiling():
        return None
    try:
        return tuple(None if t is None else (t.shape, t.dtype, t.device, t.layout) for t in tensors)
    except AttributeError:
        return None
