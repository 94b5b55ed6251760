"""NAS-LoRA's eight-operation mixed cell and adapter layer, and SAM's attention, on tensors.

``mixed_cell`` and ``nas_lora_linear`` are differentiable (paper, Eq. 2-3). ``folded_convolution``
folds the convolutions of a cell into one. ``folded_cell`` and ``folded_linear`` compute the cell
and the layer after the search, for inference.

Several backends compute the same results. ``available_backends`` says which of them can be used.
Importing this package compiles nothing, touches no GPU and imports no backend.
"""

from naslora_kernels.backends import available_backends, build_info
from naslora_kernels.functional import (
    folded_cell,
    folded_linear,
    mixed_cell,
    nas_lora_linear,
    rel_pos_attention,
)
from naslora_kernels.operations import OPERATIONS, folded_convolution

__all__ = [
    "OPERATIONS",
    "available_backends",
    "build_info",
    "folded_cell",
    "folded_convolution",
    "folded_linear",
    "mixed_cell",
    "nas_lora_linear",
    "rel_pos_attention",
]
