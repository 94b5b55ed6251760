"""The ``triton`` backend: Triton kernels on tensors of NVIDIA GPUs.

Inside this package ``import triton`` is the Triton library: imports are absolute. Tests without a
GPU set TRITON_INTERPRET=1, and Triton's interpreter computes on CPU tensors, slowly.
"""

import functools
import importlib.util

import torch

from naslora_kernels.attention import attend, define_attention
from naslora_kernels.launches import register
from naslora_kernels.ops import functions, unsupported
from naslora_kernels.triton.attention import TritonAttention
from naslora_kernels.triton.primitives import TritonPrimitives, capability, launch, trace
from naslora_kernels.triton.tiles import INTERPRETED
from naslora_kernels.triton.tiles import most_features as most_features


def unavailable_reason() -> str | None:
    """Returns why Triton cannot be used, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU, and TRITON_INTERPRET=1 is not set"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (7, 5):
        return f"it needs a GPU of compute capability 7.5, this one has {major}.{minor}"
    return None


unsupported_reason = functools.partial(unsupported, "cpu" if INTERPRETED else "cuda")
mixed_cell, nas_lora_linear, folded_cell, folded_linear = functions("triton")
rel_pos_attention = functools.partial(attend, "triton")

_attention = TritonAttention(launch, capability)
_libraries = (
    register(
        "triton",
        TritonPrimitives(launch, capability),
        # Only compiled kernels can be traced.
        traced=None if INTERPRETED else TritonPrimitives(trace, capability),
    ),
    define_attention(
        "triton",
        {
            "rel_pos_attention": _attention.rel_pos_attention,
            "rel_pos_attention_backward": _attention.rel_pos_attention_backward,
        },
    ),
)
