"""SAM's image encoders and its prompt encoder, built for any image size.

- ``vit_b``, ``vit_l``, ``vit_h``: the plain ViTs of SAM.
- ``vit_t``: a small ViT of the same kind, which trains on a CPU.
- ``mobile_sam``: MobileSAM's TinyViT, built from timm.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from segment_anything.modeling import ImageEncoderViT, PromptEncoder
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import tiny_vit_5m_224
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from naslora.errors import UserError

EMBED_DIM = 256
"""Channels of SAM's image embedding."""
PATCH_SIZE = 16
"""Side in pixels of the image patch of one token of the image embedding, for every encoder."""

LARGEST_IMAGE = 4096
"""Largest side of an image in pixels: 65,536 tokens."""


class ViT(NamedTuple):
    """Size of a plain ViT encoder."""

    width: int
    """Channels of a token."""
    depth: int
    """Number of transformer blocks."""
    heads: int
    """Number of attention heads in a block."""
    global_blocks: tuple[int, ...]
    """Indices of the blocks with global attention. The others use windows of 14 x 14 tokens."""


VITS: dict[str, ViT] = {
    "vit_t": ViT(192, 12, 3, (2, 5, 8, 11)),
    "vit_b": ViT(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": ViT(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": ViT(1280, 32, 16, (7, 15, 23, 31)),
}
MODELS = (*VITS, "mobile_sam")


def build_image_encoder(name: str, image_size: int) -> nn.Module:
    """Builds an image encoder with random weights.

    The encoder maps (B, 3, S, S) normalised images to (B, 256, S/16, S/16).

    Args:
        name: one of ``MODELS``.
        image_size: S in pixels, a positive multiple of 16.

    Raises:
        UserError: the name is unknown, or the size is not a positive multiple of 16.
    """
    if name not in MODELS:
        raise UserError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    if image_size < PATCH_SIZE or image_size % PATCH_SIZE:
        raise UserError(f"image_size must be a positive multiple of {PATCH_SIZE}, got {image_size}")
    if image_size > LARGEST_IMAGE:
        raise UserError(f"image_size must be at most {LARGEST_IMAGE} pixels, got {image_size}")
    if name == "mobile_sam":
        return TinyViTEncoder()
    size = VITS[name]
    encoder = ImageEncoderViT(
        img_size=image_size,
        patch_size=PATCH_SIZE,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        mlp_ratio=4,
        out_chans=EMBED_DIM,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=size.global_blocks,
    )
    # SAM starts with zeros, because a checkpoint replaces them. Random weights must train, too.
    nn.init.trunc_normal_(encoder.pos_embed, std=0.02)
    return encoder


class TinyViTEncoder(nn.Module):
    """MobileSAM's image encoder: TinyViT-5M with SAM's neck.

    The last stage does not reduce the resolution, so that a token covers 16 x 16 pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        # Called directly, because importing MobileSAM's own package replaces the entry of this
        # name in timm's registry.
        tiny_vit = tiny_vit_5m_224(num_classes=0, drop_path_rate=0.0)
        tiny_vit.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.patch_embed = tiny_vit.patch_embed
        self.stages = tiny_vit.stages
        width = tiny_vit.num_features
        self.neck = nn.Sequential(
            nn.Conv2d(width, EMBED_DIM, 1, bias=False),
            LayerNorm2d(EMBED_DIM),
            nn.Conv2d(EMBED_DIM, EMBED_DIM, 3, padding=1, bias=False),
            LayerNorm2d(EMBED_DIM),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B, 3, S, S) normalised images to (B, 256, S/16, S/16)."""
        return self.neck(self.stages(self.patch_embed(images)))


def build_prompt_encoder(image_size: int) -> PromptEncoder:
    """Builds SAM's prompt encoder, which provides the no-mask embedding and the positions.

    Args:
        image_size: side of the images in pixels, a multiple of 16.
    """
    grid = image_size // PATCH_SIZE
    return PromptEncoder(EMBED_DIM, (grid, grid), (image_size, image_size), mask_in_chans=16)


def checkpoint_blocks(encoder: nn.Module) -> None:
    """Makes the backward recompute each transformer block instead of keeping its activations.

    Args:
        encoder: an encoder of ``build_image_encoder``; it is changed in place.
    """
    for block in _blocks(encoder):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _blocks(encoder: nn.Module) -> Iterator[nn.Module]:
    stages = encoder.stages.children() if isinstance(encoder, TinyViTEncoder) else [encoder]
    for stage in stages:
        yield from stage.get_submodule("blocks").children()
