"""Deep visual prompt tuning (VPT, arXiv 2203.12119): every block attends to tokens of its own.

The prompts pass through the block's first norm, as tokens beside the image would, and serve as keys
and values. What a block would make of them is thrown away before the next block in deep VPT, so
they ask no queries and get no MLP here: the image tokens come out the same.
"""

import torch
from torch import Tensor, nn

from naslora.adapter.config import NASLoRAConfig
from naslora.methods.encoders import AdaptedBlock, beside, is_plain_vit, refuse

PROMPTS = 12  # tokens a block
UNMERGED = "its prompts are tokens that the softmax of each image weighs, no weight stands for them"


class PromptedBlock(AdaptedBlock):
    """A block whose windows all see the same prompts besides the image.

    Attributes:
        prompts: (12, C); uniform like a patch embedding of 16 x 16 x 3 pixels.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        weight = self.attn.qkv.weight
        bound = (6 / (3 * 16 * 16 + weight.shape[1])) ** 0.5
        prompts = torch.empty(PROMPTS, weight.shape[1]).uniform_(-bound, bound)
        self.prompts = nn.Parameter(beside(prompts, weight))

    def attend(self, windows: Tensor) -> Tensor:
        from segment_anything.modeling.image_encoder import add_decomposed_rel_pos

        attn = self.attn
        batch, height, width, channels = windows.shape
        heads, tokens = attn.num_heads, height * width
        qkv = attn.qkv(windows).reshape(batch, tokens, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, H * W, d)
        prompts = attn.qkv(self.norm1(self.prompts)).reshape(PROMPTS, 3, heads, -1)
        _, prompt_k, prompt_v = prompts.permute(1, 2, 0, 3)  # each (heads, 12, d)

        scaled = q * attn.scale
        logits = scaled @ k.transpose(-2, -1)  # (B, heads, H * W, H * W)
        if attn.use_rel_pos:  # of image tokens among each other: a prompt has no position
            size = (height, width)
            logits = add_decomposed_rel_pos(
                logits.flatten(0, 1), q.flatten(0, 1), attn.rel_pos_h, attn.rel_pos_w, size, size
            ).view_as(logits)
        logits = torch.cat([logits, scaled @ prompt_k.transpose(-2, -1)], dim=-1)
        image, prompt = logits.softmax(-1).split([tokens, PROMPTS], dim=-1)
        x = image @ v + prompt @ prompt_v  # (B, heads, H * W, d)
        return attn.proj(x.transpose(1, 2).reshape(batch, height, width, channels))


def add(encoder: nn.Module, config: NASLoRAConfig) -> None:
    """Gives every block its prompts.

    Raises:
        UserError: the encoder is no plain ViT.
    """
    if not is_plain_vit(encoder):
        raise refuse("vpt", encoder, "the attention of SAM's plain ViTs")
    for index, block in enumerate(encoder.blocks):
        encoder.blocks[index] = PromptedBlock(block)
