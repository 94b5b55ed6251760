"""Mona (arXiv 2311.15010): an adapter of multi-scale convolutions after attention and after MLP.

As the paper defines it, without the dropout in its authors' code.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from naslora.adapter.layer.applied import Method
from naslora.adapter.layer.config import MethodConfig
from naslora.methods.encoders import AdaptedBlock, beside, is_plain_vit, refuse, tiny_vit_stages
from naslora.settings import Count

KERNELS = (3, 5, 7)
SCALE_START = 1e-6  # initial weight of the normalised input


@dataclass(frozen=True)
class MonaConfig(MethodConfig):
    """The settings of Mona."""

    width: Count = 64
    """Number of channels of the convolutions."""


class Mona(nn.Module):
    """x + up(gelu(mix(down(s1 norm(x) + s2 x)))) on (B, H, W, C).

    mix: the mean of depthwise 3 x 3, 5 x 5 and 7 x 7 convolutions plus the identity, then a
    pointwise convolution plus the identity. These have ``width`` channels.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.norm_scale = nn.Parameter(SCALE_START * torch.ones(channels))
        self.scale = nn.Parameter(torch.ones(channels))
        self.down = nn.Linear(channels, width)
        self.depthwise = nn.ModuleList(
            nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width) for kernel in KERNELS
        )
        self.pointwise = nn.Conv2d(width, width, 1)
        self.up = nn.Linear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        z = self.down(self.norm(x) * self.norm_scale + x * self.scale)
        z = z.permute(0, 3, 1, 2)  # (B, width, H, W)
        z = z + sum(conv(z) for conv in self.depthwise) / len(self.depthwise)
        z = z + self.pointwise(z)
        return x + self.up(nn.functional.gelu(z.permute(0, 2, 3, 1)))


class MonaBlock(AdaptedBlock):
    """A block of SAM's plain ViT with a Mona after each half."""

    def __init__(self, block: Any, width: int) -> None:
        super().__init__(block)
        self.mona1, self.mona2 = _mona(block, width), _mona(block, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        x = self.mona1(self.attention(x))
        return self.mona2(x + self.mlp(self.norm2(x)))


class MonaThenConv(nn.Module):
    """TinyViT's convolution between attention and MLP, with a Mona before it."""

    def __init__(self, mona: Mona, conv: nn.Module) -> None:
        super().__init__()
        self.mona, self.conv = mona, conv

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return self.conv(self.mona(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def add(encoder: Any, config: MonaConfig, seed: int) -> None:
    """Puts two Monas into every block with attention.

    Raises:
        UserError: the encoder is neither a plain ViT nor TinyViT.
    """
    if is_plain_vit(encoder):
        for index, block in enumerate(encoder.blocks):
            encoder.blocks[index] = MonaBlock(block, config.width)
    elif stages := tiny_vit_stages(encoder):
        for stage in stages:
            for index, block in enumerate(stage.blocks):
                block.local_conv = MonaThenConv(_mona(block, config.width), block.local_conv)
                stage.blocks[index] = nn.Sequential(block, _mona(block, config.width))
    else:
        raise refuse("mona", encoder, "the blocks of SAM's plain ViTs or of MobileSAM's TinyViT")


def _mona(block: Any, width: int) -> Mona:
    weight = block.attn.proj.weight
    return beside(Mona(weight.shape[0], width), weight)


METHOD = Method(
    "mona",
    "Mona",
    MonaConfig,
    add,
    "its convolutions and GELU are not linear in a token, no weight stands for them",
)
