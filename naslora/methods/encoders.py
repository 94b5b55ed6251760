"""The encoders that methods support: SAM's plain ViTs, and MobileSAM's TinyViT.

``segment_anything`` is imported inside functions, because it loads torchvision, and so Triton.
Attributes of encoders are untyped here: they belong to ``segment_anything`` and to timm.
"""

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from naslora.errors import UserError

New = TypeVar("New", bound=Tensor | nn.Module)


def is_plain_vit(encoder: nn.Module) -> bool:
    """Whether it is a ViT of ``segment_anything``, or of code with the same names of parts."""
    parts = ("norm1", "attn", "norm2", "mlp", "window_size")
    blocks: Any = getattr(encoder, "blocks", ())
    return len(blocks) > 0 and all(hasattr(block, part) for block in blocks for part in parts)


def tiny_vit_stages(encoder: nn.Module) -> list[Any]:
    """The stages of a TinyViT, MobileSAM's encoder, that have attention; none of others. A stage
    sees (B, C, H, W), its blocks see (B, H, W, C)."""
    stages: Any = getattr(encoder, "stages", ())
    return [stage for stage in stages if hasattr(stage.blocks[0], "attn")]


def refuse(method: str, encoder: nn.Module, needs: str) -> UserError:
    """The error for an encoder that a method does not support."""
    return UserError(f"method {method} needs {needs}; this encoder is a {type(encoder).__name__}")


def beside(new: New, weight: Tensor) -> New:
    """Moves new tensors to a frozen weight's device and dtype. Beside 16-bit weights they are
    float32."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return cast(New, new.to(weight.device, dtype))


class AdaptedBlock(nn.Module):
    """A block of a plain ViT with its halves as methods, for subclasses to change.

    Its parts keep their names, and it computes what the block computes.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn = block.norm1, block.attn
        self.norm2, self.mlp = block.norm2, block.mlp
        self.window_size = block.window_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        x = self.attention(x)
        return x + self.mlp(self.norm2(x))

    def attention(self, x: Tensor) -> Tensor:
        """The block's first half: x + attention, in windows where the block has windows."""
        from segment_anything.modeling.image_encoder import window_partition, window_unpartition

        size = self.window_size
        if size == 0:
            return x + self.attend(self.norm1(x))
        windows, padded = window_partition(self.norm1(x), size)
        return x + window_unpartition(self.attend(windows), size, padded, x.shape[1:3])

    def attend(self, windows: Tensor) -> Tensor:
        """Attention within (B * windows, H, W, C)."""
        return self.attn(windows)
