"""SAM-Adapter (arXiv 2304.09148): prompts from an image's high frequencies before each block.

A small patch embedding of the high frequencies and a projection of the encoder's own patch
embedding are summed. A small MLP for each block, then one projection that the blocks share, turn
the sum into the prompt, which is added to the block's tokens. The width of TinyViT changes from
stage to stage, so it gets these layers once for each stage.
"""

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
    """The layers that compute the prompts of the blocks of one stage.

    Args:
        width: C of the tokens.
        hidden: channels of the adapter.
        depth: number of blocks.
        stride: pixels a side for one token.
        channels: C of the images.
    """

    def __init__(self, width: int, hidden: int, depth: int, stride: int, channels: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(channels, hidden, stride, stride)
        self.embed = nn.Linear(width, hidden)
        self.block_mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, hidden), nn.GELU()) for _ in range(depth)
        )
        self.up = nn.Linear(hidden, width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=WEIGHT_START)
                nn.init.zeros_(module.bias)
        nn.init.kaiming_normal_(self.patch_embed.weight, mode="fan_out")
        assert self.patch_embed.bias is not None
        nn.init.zeros_(self.patch_embed.bias)


class SamAdapter(nn.Module):
    """The prompts of every stage, and the hooks that add them to an encoder's tokens.

    Args:
        stages: the layers of each stage.

    Attributes:
        features: (B, H, W, hidden) of each stage, during the encoder's forward; else empty.
    """

    def __init__(self, stages: list[Prompts]) -> None:
        super().__init__()
        self.stages: Any = nn.ModuleList(stages)
        self.features: list[Tensor] = []

    def see_image(self, encoder: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Before the encoder: embeds the high frequencies of its (B, C, S, S) images."""
        high = high_frequencies(inputs[0])
        embedded = [stage.patch_embed(high) for stage in self.stages]
        self.features = [features.permute(0, 2, 3, 1) for features in embedded]

    def see_embedding(
        self,
        stage: int,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        output: Tensor | None = None,
    ) -> None:
        """After a stage's embedding, or before its blocks: adds a projection of the tokens."""
        tokens = inputs[0] if output is None else output  # (B, H, W, C)
        self.features[stage] = self.features[stage] + self.stages[stage].embed(tokens)

    def prompt(
        self, stage: int, index: int, block: nn.Module, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor]:
        """Before a block: adds its prompt to its tokens."""
        prompts = self.stages[stage]
        return (inputs[0] + prompts.up(prompts.block_mlps[index](self.features[stage])),)

    def forget(self, encoder: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """After the encoder: drops the features, and with them their autograd graph."""
        self.features = []


@torch.no_grad()
def high_frequencies(images: Tensor) -> Tensor:
    """|images without their low frequencies|: the central quarter of the spectrum is set to zero.

    (B, C, H, W) to the same. The transform is computed in float32.
    """
    height, width = images.shape[-2:]
    half = int((MASKED * height * width) ** 0.5 / 2)
    rows, columns = (
        slice(height // 2 - half, height // 2 + half),
        slice(width // 2 - half, width // 2 + half),
    )
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
        stages = [list(encoder.blocks)]
        strides = [encoder.patch_embed.proj.stride[0]]
        watch = [encoder.patch_embed.register_forward_hook]
    elif own := tiny_vit_stages(encoder):
        stages = [list(stage.blocks) for stage in own]
        steps = [stage.downsample.conv2.conv.stride[0] for stage in own]
        # Pixels a side for a token of each stage: 8, 16 and 16 in MobileSAM.
        strides = [encoder.patch_embed.stride * step for step in accumulate(steps, mul)]
        watch = [stage.blocks.register_forward_pre_hook for stage in own]
    else:
        raise refuse("sam-adapter", encoder, "SAM's plain ViTs or MobileSAM's TinyViT")
    channels = next(part.in_channels for part in encoder.modules() if isinstance(part, nn.Conv2d))
    adapter = SamAdapter(
        [
            _prompts(blocks, stride, config.scale_factor, channels)
            for blocks, stride in zip(stages, strides, strict=True)
        ]
    )
    encoder.sam_adapter = adapter
    encoder.register_forward_pre_hook(adapter.see_image)
    encoder.register_forward_hook(adapter.forget)
    for i, blocks in enumerate(stages):
        watch[i](partial(adapter.see_embedding, i))
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(adapter.prompt, i, index))


def _prompts(blocks: list[Any], stride: int, scale_factor: int, channels: int) -> Prompts:
    weight = blocks[0].attn.proj.weight
    width = weight.shape[0]
    if scale_factor > width:
        raise UserError(
            f"scale_factor must be at most the encoder's width {width}, got {scale_factor}"
        )
    return beside(Prompts(width, width // scale_factor, len(blocks), stride, channels), weight)


METHOD = Method(
    "sam-adapter",
    "SAM-Adapter",
    SAMAdapterConfig,
    add,
    "its prompts depend on the image, no weight stands for them",
)
