"""Deep visual prompt tuning (VPT, arXiv 2203.12119): every block attends to prompts of its own.

The prompts pass through the block's first norm, like tokens beside the image, and serve as keys and
values. Deep VPT discards a block's output at the prompts before the next block. So the prompts have
no queries and no MLP here, and the image tokens come out the same.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from naslora.adapter.layer.applied import Method
from naslora.adapter.layer.config import MethodConfig
from naslora.methods.encoders import AdaptedBlock, beside, is_plain_vit, refuse
from naslora.settings import Count


@dataclass(frozen=True)
class VPTConfig(MethodConfig):
    """The settings of VPT."""

    prompts: Count = 12
    """Number of prompts a block."""


class PromptedBlock(AdaptedBlock):
    """A block whose windows all attend to the same prompts beside the image.

    Attributes:
        prompts: (count, C); uniform like a patch embedding of 16 x 16 x 3 pixels.
    """

    def __init__(self, block: Any, count: int) -> None:
        super().__init__(block)
        weight = self.attn.qkv.weight
        bound = (6 / (3 * 16 * 16 + weight.shape[1])) ** 0.5
        prompts = torch.empty(count, weight.shape[1]).uniform_(-bound, bound)
        self.prompts = nn.Parameter(beside(prompts, weight))

    def attend(self, windows: Tensor) -> Tensor:
        """Attention within (B * windows, H, W, C), with the prompts as further keys and values."""
        from segment_anything.modeling.image_encoder import add_decomposed_rel_pos

        attn, count = self.attn, len(self.prompts)
        batch, height, width, channels = windows.shape
        heads, tokens = attn.num_heads, height * width
        qkv = attn.qkv(windows).reshape(batch, tokens, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, H * W, d)
        prompts = attn.qkv(self.norm1(self.prompts)).reshape(count, 3, heads, -1)
        _, prompt_k, prompt_v = prompts.permute(1, 2, 0, 3)  # each (heads, count, d)

        scaled = q * attn.scale
        logits = scaled @ k.transpose(-2, -1)  # (B, heads, H * W, H * W)
        if attn.use_rel_pos:  # between image tokens only: a prompt has no position
            size = (height, width)
            logits = add_decomposed_rel_pos(
                logits.flatten(0, 1), q.flatten(0, 1), attn.rel_pos_h, attn.rel_pos_w, size, size
            ).view_as(logits)
        logits = torch.cat([logits, scaled @ prompt_k.transpose(-2, -1)], dim=-1)
        image, prompt = logits.softmax(-1).split([tokens, count], dim=-1)
        x = image @ v + prompt @ prompt_v  # (B, heads, H * W, d)
        return attn.proj(x.transpose(1, 2).reshape(batch, height, width, channels))


def add(encoder: Any, config: VPTConfig, seed: int) -> None:
    """Gives every block its prompts.

    Raises:
        UserError: the encoder is no plain ViT.
    """
    if not is_plain_vit(encoder):
        raise refuse("vpt", encoder, "the attention of SAM's plain ViTs")
    for index, block in enumerate(encoder.blocks):
        encoder.blocks[index] = PromptedBlock(block, config.prompts)


METHOD = Method(
    "vpt",
    "VPT",
    VPTConfig,
    add,
    "each image weighs its prompts by a softmax, no weight stands for them",
)
