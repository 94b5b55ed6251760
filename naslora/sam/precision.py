"""Frozen weights in 16 bits: half the memory, and no casts in the steps."""

import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

NORMS = (nn.LayerNorm, nn.GroupNorm, LayerNorm2d, _NormBase)
"""They divide by small numbers and have few weights, so theirs stay in float32."""
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def cast_frozen(encoder: nn.Module, dtype: torch.dtype) -> None:
    """Casts an encoder's frozen float32 weights, in place. Those of norms stay in float32.

    Under autocast the linear layers and convolutions compute the same as before: autocast would
    cast their weights in every step. The sum of the residual connections of a plain ViT is in
    ``dtype`` (bfloat16 or float16) afterwards, because its position embeddings are.
    """
    for module in encoder.modules():
        if isinstance(module, NORMS):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dtype == torch.float32 and not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
