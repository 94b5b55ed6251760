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
from naslora_kernels.ops import define, functions, unsupported

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

mixed_cell, nas_lora_linear, folded_cell, folded_linear = functions("cuda")
unsupported_reason = functools.partial(unsupported, SERVED_DEVICE)

if _CUDA is not None:
    _library = define("cuda")
    _CUDA.register_operators("naslora_cuda", SERVED_DEVICE.upper())
