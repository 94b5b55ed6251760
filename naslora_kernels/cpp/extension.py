"""Loads the C++ extension ``naslora_kernels._C`` and says how it was built and how it runs.

The extension gets functions of torch's stable C interface as addresses, so it depends on no version
of torch. It runs on torch's threads, so on as many as ``torch.set_num_threads`` says. It computes
with the best instruction set of this processor, or the one that NASLORA_CPU_CAPABILITY names.
"""

import os

from naslora_kernels.tensors import address_of_function, use_torch

try:
    from naslora_kernels import _C  # type: ignore[attr-defined]

    use_torch(_C)
except ImportError as error:
    _C = None
    _import_error = error

CAPABILITY_VARIABLE = "NASLORA_CPU_CAPABILITY"


def unavailable_reason() -> str | None:
    """Returns why the extension cannot be used, or None."""
    if _C is None:
        return (
            f"the C++ extension is not there ({_import_error}); reinstall naslora with a C++17 "
            "compiler (GCC or Clang) present and NASLORA_SKIP_EXT unset"
        )
    if instruction_set() is None:
        return (
            f"{CAPABILITY_VARIABLE}={os.environ[CAPABILITY_VARIABLE]!r} is not one of "
            f"{', '.join(_C.capabilities())}"
        )
    return None


def instruction_set() -> str | None:
    """Returns the instruction set to compute with; None if the environment names none of them."""
    best = _C.capabilities()[-1]
    wanted = os.environ.get(CAPABILITY_VARIABLE) or best
    return wanted if wanted in _C.capabilities() else None


def build_info() -> dict[str, object]:
    """Returns how the extension was compiled and what it uses; empty without the extension."""
    if _C is None:
        return {}
    compiler, compiled = _C.build_info()
    return {
        "compiler": compiler,
        "architectures": compiled,
        "instruction_set": instruction_set(),
        "shares_torch_threads": bool(address_of_function("torch_parallel_for")),
    }


if _C is not None:
    _C.set_parallel_for(address_of_function("torch_parallel_for"))
    if instruction_set():
        _C.use_capability(instruction_set())
