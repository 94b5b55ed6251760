"""What the methods know of the encoders: SAM's plain ViTs, and MobileSAM's TinyViT.

``segment_anything`` is imported where it is used: importing it loads torchvision, and so Triton.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from naslora.errors import UserError

New = TypeVar("New", Tensor, nn.Module)


def is_plain_vit(encoder: nn.Module) -> bool:
    """Whether it is a ViT of ``segment_anything``, or of code that kept its parts' names."""
    parts = ("norm1", "attn", "norm2", "mlp", "window_size")
    blocks = getattr(encoder, "blocks", ())
    return len(blocks) > 0 and all(hasattr(block, part) for block in blocks for part in parts)


def is_tiny_vit(encoder: nn.Module) -> bool:
    """Whether it is MobileSAM's encoder, a ``naslora.sam.encoders.TinyViTEncoder``."""
    return len(tiny_vit_stages(encoder)) > 0


def tiny_vit_stages(encoder: nn.Module) -> list[nn.Module]:
    """The stages of a TinyViT that have attention; they see (B, C, H, W), their blocks
    (B, H, W, C)."""
    stages = getattr(encoder, "stages", ())
    return [stage for stage in stages if hasattr(stage.blocks[0], "attn")]


def refuse(method: str, encoder: nn.Module, needs: str) -> UserError:
    """The error for an encoder that a method does not fit."""
    return UserError(f"method {method} needs {needs}; this encoder is a {type(encoder).__name__}")


def beside(new: New, weight: Tensor) -> New:
    """Moves something new to a frozen weight's device and dtype; beside 16 bits it is float32."""
    return new.to(weight.device, torch.promote_types(weight.dtype, torch.float32))


class AdaptedBlock(nn.Module):
    """A transformer block of SAM taken apart, its parts under their names; computes the same."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn = block.norm1, block.attn
        self.norm2, self.mlp = block.norm2, block.mlp
        self.window_size = block.window_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        x = self.attention(x)
        return x + self.mlp(self.norm2(x))

    def attention(self, x: Tensor) -> Tensor:
        """The block's first half: x + attention, in windows where the block has them."""
        from segment_anything.modeling.image_encoder import window_partition, window_unpartition

        windows = self.norm1(x)
        if self.window_size > 0:
            windows, padded = window_partition(windows, self.window_size)
        windows = self.attend(windows)
        if self.window_size > 0:
            windows = window_unpartition(windows, self.window_size, padded, x.shape[1:3])
        return x + windows

    def attend(self, windows: Tensor) -> Tensor:
        """Attention within (B * windows, H, W, C)."""
        return self.attn(windows)
