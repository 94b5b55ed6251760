"""Chooses the backend that computes. Backends plug in here and nowhere else.

A backend is a module of this package that implements ``Backend``. It is imported when it is first
needed. To add a backend, write the module and add its name to ``BACKENDS``.
"""

import functools
import importlib
import importlib.metadata
import logging
import operator
import os
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from naslora_kernels.cell import AttentionOperands, Cell, LoRALinear

# Best first: the automatic choice takes the first backend that serves the tensors.
BACKENDS = ("cuda", "triton", "cpp", "reference")
# On a CPU these are simulated. That is slow, so the automatic choice skips them: tests name them.
GPU_BACKENDS = ("cuda", "triton")
# These have a ``build_info()``, which is empty if the extension was not built.
COMPILED_BACKENDS = ("cpp", "cuda")
ENVIRONMENT_VARIABLE = "NASLORA_BACKEND"
# These multiply. In 16 bits ``triton`` does so on tensor cores and ``cuda`` does not, so the
# automatic choice then prefers ``triton`` (docs/gpu_kernels.md).
PRODUCTS = ("nas_lora_linear", "folded_linear")
# What the first launch of a backend may lack.
NEEDS = {
    "cuda": "a driver as new as the nvcc that built the extension",
    "triton": "gcc, Python.h, libcuda and a driver as new as Triton's ptxas",
}

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """The functions of a backend's module.

    The last five compute what the functions of the same names in ``functional.py`` document, on
    arguments that have been checked. A backend may lack some of them: it then does not serve them.
    """

    def unavailable_reason(self) -> str | None:
        """Returns why the backend cannot be used in this process, or None."""

    def unsupported_reason(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Returns why the backend cannot serve tensors of a device and dtype, or None."""

    def mixed_cell(self, z: Tensor, cell: Cell) -> Tensor: ...

    def nas_lora_linear(
        self, x: Tensor, linear: LoRALinear, cell: Cell, scaling: float
    ) -> Tensor: ...

    def folded_cell(self, z: Tensor, kernel: Tensor, average: float, maximum: float) -> Tensor: ...

    def folded_linear(
        self, x: Tensor, linear: LoRALinear, kernel: Tensor, average: float, maximum: float
    ) -> Tensor: ...

    def rel_pos_attention(self, operands: AttentionOperands, scale: float) -> Tensor: ...


# The modules that ``_load`` has imported, by the backend's name.
_loaded: dict[str, Backend] = {}


def available_backends() -> dict[str, str | None]:
    """Returns for each backend None, or the reason why this process cannot use it.

    On a GPU, the current one, each backend of GPUs launches one block.
    """
    current = torch.device("cuda", torch.cuda.current_device()) if _has_gpu() else None
    return {name: _unavailable_reason(name) or probe(name, current) for name in reversed(BACKENDS)}


def build_info() -> dict[str, object]:
    """Describes this installation, for bug reports and benchmark records.

    Returns:
        ``version``: of the package; None in a folder where it was built but not installed.
        ``torch``: the version that runs. The extensions are built without torch and serve any.
        ``compiled``: the backends whose extensions were built.
        ``compiler``: of the C++ extension; None without it.
        ``architectures``: the CPU instruction sets in the C++ extension; empty without it.
        ``instruction_set``: the one that this process uses. Only with the C++ extension.
        ``shares_torch_threads``: whether the kernels run on torch's threads. Only with the C++
        extension.
        ``cuda_compiler``, ``cuda_architectures``: only with the CUDA extension.
    """
    parts = {n: cast(Any, _load(n)).build_info() for n in COMPILED_BACKENDS}
    installed = importlib.metadata.distributions(name="naslora")
    compiled = [name for name, part in parts.items() if part]
    info: dict[str, object] = {
        "version": next((d.version for d in installed), None),
        "torch": torch.__version__,
        "compiled": compiled,
        "compiler": None,
        "architectures": [],
    }
    return functools.reduce(operator.or_, parts.values(), info)


def select_backend(x: Tensor, requested: str | None, function: str) -> Backend:
    """Returns the backend that computes a function on tensors like ``x``.

    Args:
        x: a tensor with the device and dtype of the call.
        requested: a backend's name. None takes NASLORA_BACKEND if it is set, else the best backend
            that serves the tensors.
        function: the name of the function.

    Raises:
        TypeError: the name is no string.
        ValueError: no backend has the name.
        RuntimeError: the named backend cannot serve the call. The message says why.
    """
    return _loaded[_select(x.device, x.dtype, requested, function)]


def _select(device: torch.device, dtype: torch.dtype, requested: str | None, function: str) -> str:
    if requested is not None and not isinstance(requested, str):
        raise TypeError(f"backend: expected a name or None, got {type(requested).__name__}")
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        requested = "reference"  # the kernels have one derivative, in reverse mode
    named = requested or os.environ.get(ENVIRONMENT_VARIABLE)
    return _choose(device, dtype, named, function)


# torch.compiler.assume_constant_result sets the same attribute, but calling it would import the
# compiler, and with it Triton.
_select._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _choose(device: torch.device, dtype: torch.dtype, named: str | None, function: str) -> str:
    if not named:
        candidates = [n for n in BACKENDS if device.type != "cpu" or n not in GPU_BACKENDS]
        if function in PRODUCTS and dtype.itemsize == 2 and _has_16_bit_products(device):
            candidates.sort(key=lambda name: name != "triton")
        name = next(n for n in candidates if _refusal(n, device, dtype, function) is None)
        logger.info(
            "NAS-LoRA computes %s, %s on %s, with backend %r", function, dtype, device, name
        )
        for better in candidates[: candidates.index(name)]:
            if _unavailable_reason(better) is None and (failure := probe(better, device)):
                logger.warning("backend %r is not used: %s", better, failure)
        return name
    if named not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {named!r}")
    reason = _refusal(named, device, dtype, function)
    if reason is not None:
        raise RuntimeError(f"backend {named!r} cannot serve this call: {reason}")
    return named


def _has_16_bit_products(device: torch.device) -> bool:
    """Returns whether the tensor cores of the GPU multiply 16-bit numbers of either dtype."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _has_gpu() -> bool:
    return torch.version.cuda is not None and torch.cuda.is_available()


def _refusal(name: str, device: torch.device, dtype: torch.dtype, function: str) -> str | None:
    reason = _unavailable_reason(name) or _load(name).unsupported_reason(device.type, dtype)
    if reason is None and not hasattr(_load(name), function):
        return f"it does not compute {function}"
    return reason or probe(name, device)


@functools.cache
def probe(name: str, device: torch.device | None) -> str | None:
    """Launches one block of a backend's kernels on a GPU.

    Returns:
        Why that fails, or None. None for other backends and devices, and while a CUDA graph is
        captured, when nothing can be waited for.
    """
    on_gpu = name in GPU_BACKENDS and device is not None and device.type == "cuda"
    if not on_gpu or torch.cuda.is_current_stream_capturing():
        return None
    try:
        with _disable_current_modes(), torch.no_grad():  # it is also asked while a graph is traced
            number = torch.zeros(1, 1, 1, 1, device=device)
            _load(name).folded_cell(number, number, 0.0, 0.0)
            torch.cuda.synchronize(device)
    except Exception as error:  # Triton's and the driver's have no common class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"its first launch on {device} fails: {lines[0]} (it needs {NEEDS[name]})"
    return None


@functools.cache
def _unavailable_reason(name: str) -> str | None:
    return _load(name).unavailable_reason()


def _load(name: str) -> Backend:
    _loaded[name] = cast(Backend, importlib.import_module(f"naslora_kernels.{name}"))
    return _loaded[name]
