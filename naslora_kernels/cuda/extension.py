"""Loads the CUDA extension ``naslora_kernels._CUDA`` and says which cards it serves.

The extension gets functions of torch's stable C interface as addresses, so it depends on no version
of torch.

Tests run without a GPU: NASLORA_CUDA_EMULATION names an extension that is built from the same
sources for the CPU (``python tests/cuda_emulation.py``). It computes on CPU tensors, slowly.
"""

import importlib.machinery
import importlib.util
import os
import re
from types import ModuleType
from typing import Any

import torch

from naslora_kernels.tensors import use_torch

EMULATION_VARIABLE = "NASLORA_CUDA_EMULATION"
EMULATION = os.environ.get(EMULATION_VARIABLE)  # the file of the emulation, if there is one
SERVED_DEVICE = "cpu" if EMULATION else "cuda"


def _load_emulation(path: str) -> ModuleType:
    name = "naslora_kernels._CUDA"
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    module = importlib.util.module_from_spec(
        importlib.machinery.ModuleSpec(name, loader, origin=path)
    )
    loader.exec_module(module)
    return module


try:
    if EMULATION:
        _CUDA: Any = _load_emulation(EMULATION)
    else:
        from naslora_kernels import _CUDA  # type: ignore[attr-defined,no-redef]
    use_torch(_CUDA)
except ImportError as error:
    _CUDA = None
    _import_error = error


def unavailable_reason() -> str | None:
    """Returns why the extension cannot be used, or None."""
    if _CUDA is None:
        return (
            f"the CUDA extension is not there ({_import_error}); reinstall naslora with nvcc on "
            "the PATH or below CUDA_HOME, on a machine with a GPU or with TORCH_CUDA_ARCH_LIST "
            "set, and with NASLORA_SKIP_CUDA unset"
        )
    if EMULATION:
        return None
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not _serves(architectures(), capability):
            return (
                f"cuda:{index} has compute capability {capability[0]}.{capability[1]}, but the "
                f"extension was built for {', '.join(architectures())}; reinstall naslora with "
                "this capability in TORCH_CUDA_ARCH_LIST"
            )
    return None


def build_info() -> dict[str, object]:
    """Returns how the extension was compiled; empty without the extension."""
    if _CUDA is None:
        return {}
    return {"cuda_compiler": _CUDA.build_info()[0], "cuda_architectures": architectures()}


def architectures() -> list[str]:
    """Returns what the extension contains: ``sm_80`` is machine code, ``compute_90`` is PTX."""
    return _CUDA.build_info()[1].split()


def _serves(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Returns whether code for these architectures runs on a card.

    Machine code runs on cards of its own version and of later minor versions. PTX runs on cards of
    any later version. Code for a name with a suffix runs only on cards of that version.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        assert match is not None, architecture  # setup.py has checked the names
        kind, major, minor, suffix = match.groups()
        built = (int(major), int(minor))
        if built == capability:
            return True
        if not suffix and built < capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False
