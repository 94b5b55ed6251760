"""The ``cuda`` backend: the CUDA kernels of ``csrc/cuda`` on tensors of NVIDIA GPUs."""

import functools

from naslora_kernels.cuda.extension import (
    _CUDA,
    EMULATION_VARIABLE,
    SERVED_DEVICE,
    _serves,
    architectures,
    build_info,
    unavailable_reason,
)
from naslora_kernels.cuda.primitives import CUDAPrimitives, stream
from naslora_kernels.launches import register
from naslora_kernels.ops import entry_points, unsupported
from naslora_kernels.plans import plan_runner

__all__ = [
    "EMULATION_VARIABLE",
    "_CUDA",
    "_serves",
    "architectures",
    "build_info",
    "folded_cell",
    "folded_linear",
    "mixed_cell",
    "nas_lora_linear",
    "unavailable_reason",
    "unsupported_reason",
]

mixed_cell, nas_lora_linear, folded_cell, folded_linear = entry_points("cuda")
unsupported_reason = functools.partial(unsupported, SERVED_DEVICE)

if _CUDA is not None:
    _library = register("cuda", CUDAPrimitives(), None, plan_runner(_CUDA), CUDAPrimitives, stream)
