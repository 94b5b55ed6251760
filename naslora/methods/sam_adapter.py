"""SAM-Adapter (arXiv 2304.09148): prompts from an image's high frequencies before each block.

A small patch embedding of the high frequencies and a projection of the encoder's own patch
embedding are summed. A small MLP for each block, then one projection that the blocks share, turn
the sum into the prompt, which is added to the block's tokens. The width of TinyViT changes from
stage to stage, so it gets these layers once for each stage.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn

from naslora.adapter.layer.applied import Method
from naslora.adapter.layer.config import MethodConfig
from naslora.errors import UserError
from naslora.methods.encoders import beside, is_plain_vit, refuse, tiny_vit_stages
from naslora.settings import Count

MASKED = 0.25  # share of the spectrum, its lowest frequencies, that is set to zero
WEIGHT_START = 0.02  # standard deviation


@dataclass(frozen=True)
class SAMAdapterConfig(MethodConfig):
    """The settings of SAM-Adapter."""

    scale_factor: Count = 16
    """The encoder's width divided by the adapter's."""


class Prompts(nn.Module):
    """Computes the prompts of the blocks of one stage, as hooks.

    Args:
        blocks: the stage's blocks, whose tokens are (B, H, W, C).
        scale_factor: C divided by the channels of the prompts.
        stride: pixels a side for one token.
        channels: of the images.

    Raises:
        UserError: ``scale_factor`` is greater than C.
    """

    features: Tensor | None = None
    """(B, H, W, hidden), during the encoder's forward."""

    def __init__(self, blocks: Sequence[Any], scale_factor: int, stride: int, channels: int):
        super().__init__()
        weight = blocks[0].attn.proj.weight
        width = weight.shape[0]
        if scale_factor > width:
            raise UserError(
                f"scale_factor must be at most the encoder's width {width}, got {scale_factor}"
            )
        hidden = width // scale_factor
        self.patch_embed = nn.Conv2d(channels, hidden, stride, stride)
        self.embed = nn.Linear(width, hidden)
        self.block_mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, hidden), nn.GELU()) for _ in blocks
        )
        self.up = nn.Linear(hidden, width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=WEIGHT_START)
                nn.init.zeros_(module.bias)
        nn.init.kaiming_normal_(self.patch_embed.weight, mode="fan_out")
        assert self.patch_embed.bias is not None
        nn.init.zeros_(self.patch_embed.bias)
        beside(self, weight)
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self.prompt, index))

    def see_tokens(self, module: nn.Module, inputs: Any, output: Tensor | None = None) -> None:
        """After the embedding of a plain ViT, or before the blocks of TinyViT."""
        tokens = inputs[0] if output is None else output  # (B, H, W, C)
        self.features = self.features + self.embed(tokens)

    def prompt(self, index: int, block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Before a block: adds its prompt to its tokens."""
        return (inputs[0] + self.up(self.block_mlps[index](self.features)),)


class SamAdapter(nn.Module):
    """The prompts of every stage, which see the image first."""

    def __init__(self, stages: Iterable[Prompts]) -> None:
        super().__init__()
        self.stages: Any = nn.ModuleList(stages)

    def see_image(self, encoder: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Before the encoder: embeds the high frequencies of its (B, C, S, S) images."""
        high = high_frequencies(inputs[0])
        for stage in self.stages:
            stage.features = stage.patch_embed(high).permute(0, 2, 3, 1)

    def forget(self, encoder: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """After the encoder: drops the features, and with them their autograd graph."""
        for stage in self.stages:
            stage.features = None


@torch.no_grad()
def high_frequencies(images: Tensor) -> Tensor:
    """|images without their low frequencies|: the central quarter of the spectrum is set to zero.

    (B, C, H, W) to the same. The transform is computed in float32.
    """
    height, width = images.shape[-2:]
    half = int((MASKED * height * width) ** 0.5 / 2)
    rows, columns = (slice(side // 2 - half, side // 2 + half) for side in (height, width))
    spectrum = torch.fft.fftshift(torch.fft.fft2(images.float()), dim=(-2, -1))
    spectrum[..., rows, columns] = 0
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real.abs().to(images.dtype)


def add(encoder: Any, config: SAMAdapterConfig, seed: int) -> None:
    """Adds the prompts to every block with attention, by hooks.

    Raises:
        UserError: the encoder is neither a plain ViT nor TinyViT, or it is narrower than
            ``config.scale_factor``.
    """
    if is_plain_vit(encoder):
        stages = [encoder.blocks]
        strides = [encoder.patch_embed.proj.stride[0]]
        watch = [encoder.patch_embed.register_forward_hook]
    elif own := tiny_vit_stages(encoder):
        stages = [stage.blocks for stage in own]
        steps = [stage.downsample.conv2.conv.stride[0] for stage in own]
        # Pixels a side for a token of each stage: 8, 16 and 16 in MobileSAM.
        strides = [encoder.patch_embed.stride * step for step in accumulate(steps, mul)]
        watch = [blocks.register_forward_pre_hook for blocks in stages]
    else:
        raise refuse("sam-adapter", encoder, "SAM's plain ViTs or MobileSAM's TinyViT")
    channels = next(part.in_channels for part in encoder.modules() if isinstance(part, nn.Conv2d))
    prompts = [
        Prompts(blocks, config.scale_factor, stride, channels)
        for blocks, stride in zip(stages, strides, strict=True)
    ]
    for stage, register in zip(prompts, watch, strict=True):
        register(stage.see_tokens)
    encoder.sam_adapter = adapter = SamAdapter(prompts)
    encoder.register_forward_pre_hook(adapter.see_image)
    encoder.register_forward_hook(adapter.forget)


METHOD = Method(
    "sam-adapter",
    "SAM-Adapter",
    SAMAdapterConfig,
    add,
    "its prompts depend on the image, no weight stands for them",
)
