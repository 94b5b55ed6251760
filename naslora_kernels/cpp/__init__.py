"""The ``cpp`` backend: the C++ kernels of ``csrc`` on CPU tensors."""

import functools

from naslora_kernels.attention import attention_entry_point, define_attention
from naslora_kernels.cpp.attention import CPUAttention
from naslora_kernels.cpp.extension import (
    _C,
    CAPABILITY_VARIABLE,
    build_info,
    instruction_set,
    unavailable_reason,
)
from naslora_kernels.cpp.primitives import CPULaunches
from naslora_kernels.ops import define_operators, entry_points, unsupported
from naslora_kernels.plans import plan_runner

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

mixed_cell, nas_lora_linear, folded_cell, folded_linear = entry_points("cpp")
rel_pos_attention = attention_entry_point("cpp")
unsupported_reason = functools.partial(unsupported, "cpu")

if _C is not None:
    _libraries = (
        define_operators("cpp", CPULaunches(), "CPU", plan_runner(_C), CPULaunches),
        define_attention("cpp", CPUAttention(), "CPU"),
    )
