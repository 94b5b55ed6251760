"""The ``cpp`` backend: the C++ kernels of ``csrc`` on CPU tensors."""

import functools

from naslora_kernels.attention import attend, define_attention
from naslora_kernels.cpp.extension import (
    _C,
    CAPABILITY_VARIABLE,
    build_info,
    instruction_set,
    unavailable_reason,
)
from naslora_kernels.ops import define, functions, unsupported

__all__ = [
    "CAPABILITY_VARIABLE",
    "_C",
    "build_info",
    "folded_cell",
    "folded_linear",
    "instruction_set",
    "mixed_cell",
    "nas_lora_linear",
    "rel_pos_attention",
    "unavailable_reason",
    "unsupported_reason",
]

mixed_cell, nas_lora_linear, folded_cell, folded_linear = functions("cpp")
rel_pos_attention = functools.partial(attend, "cpp")
unsupported_reason = functools.partial(unsupported, "cpu")

if _C is not None:
    _libraries = define("cpp"), define_attention("cpp")
    _C.register_operators("naslora_cpp", "CPU")
