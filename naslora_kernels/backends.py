"""Which code computes the cell: the one place where backends plug in.

A backend is a module of this package with ``unavailable_reason()``,
``unsupported_reason(device_type, dtype)`` and, on checked arguments, the four functions of
``functional.py``. It is imported when it is first asked for. To add one, write the module and name
it in ``BACKENDS``.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import operator
import os
from types import ModuleType

import torch
from torch import Tensor

# Best first: the automatic choice takes the first that serves the tensors at hand.
BACKENDS = ("cuda", "triton", "cpp", "reference")
GPU_BACKENDS = ("cuda", "triton")  # on CPUs only simulated, for tests, which name them
COMPILED_BACKENDS = ("cpp", "cuda")  # these have a ``build_info()``, empty if there is no extension
ENVIRONMENT_VARIABLE = "NASLORA_BACKEND"

logger = logging.getLogger(__name__)
_loaded: dict[str, ModuleType] = {}


def available_backends() -> dict[str, str | None]:
    """Tells which backends can be used in this process.

    Returns:
        For each backend None, or the reason why it cannot be used.
    """
    return {name: _unavailable_reason(name) for name in reversed(BACKENDS)}


def build_info() -> dict[str, object]:
    """What this installation consists of: for bug reports and benchmark records.

    Returns:
        ``version`` of the package; ``torch``, the version that runs (the extensions are built
        without torch and serve any); the ``compiled`` parts, the host ``compiler`` and the
        ``architectures`` (CPU instruction sets) in the C++ extension, empty or None without it;
        with it also the ``instruction_set`` that this process uses, and whether it
        ``shares_torch_threads``; with the CUDA extension ``cuda_compiler`` and
        ``cuda_architectures``.
    """
    parts = {n: _load(n).build_info() for n in COMPILED_BACKENDS if _exists(n)}
    compiled = [name for name, part in parts.items() if part]
    info = {
        "version": importlib.metadata.version("naslora"),
        "torch": torch.__version__,
        "compiled": compiled,
        "compiler": None,
        "architectures": [],
    }
    return functools.reduce(operator.or_, parts.values(), info)


def select_backend(x: Tensor, requested: str | None) -> ModuleType:
    """Returns the backend that will compute on tensors like ``x``.

    Args:
        x: a tensor of the device and dtype that the call works on.
        requested: a backend's name; None obeys NASLORA_BACKEND, else takes the best that serves.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend cannot serve; the message says why.
    """
    return _loaded[_select(x.device.type, x.dtype, requested)]


def _select(device_type: str, dtype: torch.dtype, requested: str | None) -> str:
    return _choose(device_type, dtype, requested or os.environ.get(ENVIRONMENT_VARIABLE))


# What torch.compiler.assume_constant_result does; calling it would import the compiler, and Triton.
_select._dynamo_marked_constant = True


@functools.cache
def _choose(device_type: str, dtype: torch.dtype, named: str | None) -> str:
    if not named:
        candidates = [n for n in BACKENDS if device_type != "cpu" or n not in GPU_BACKENDS]
        name = next(n for n in candidates if _refusal(n, device_type, dtype) is None)
        logger.info("NAS-LoRA computes %s on %s with backend %r", dtype, device_type, name)
        return name
    if named not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {named!r}")
    reason = _refusal(named, device_type, dtype)
    if reason is not None:
        raise RuntimeError(f"backend {named!r} cannot serve this call: {reason}")
    return named


def _refusal(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    return _unavailable_reason(name) or _load(name).unsupported_reason(device_type, dtype)


@functools.cache
def _unavailable_reason(name: str) -> str | None:
    if not _exists(name):
        return "this version of naslora does not contain it"
    return _load(name).unavailable_reason()


def _exists(name: str) -> bool:
    return importlib.util.find_spec(f"naslora_kernels.{name}") is not None


def _load(name: str) -> ModuleType:
    _loaded[name] = importlib.import_module(f"naslora_kernels.{name}")
    return _loaded[name]
