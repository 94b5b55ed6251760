"""SAM's parts - image encoder, prompt encoder - at any image size, and its checkpoints.

Encoders: Meta's plain ViTs (``vit_b``, ``vit_l``, ``vit_h``) with the official checkpoint files, a
small one of the same kind (``vit_t``) that trains on a CPU, and MobileSAM's TinyViT
(``mobile_sam``), built from timm under MobileSAM's checkpoint names.
"""

from functools import partial
from typing import NamedTuple

from segment_anything.modeling import ImageEncoderViT, PromptEncoder
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import tiny_vit_5m_224
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from naslora.errors import UserError

EMBED_DIM = 256  # channels of SAM's image embedding
PATCH_SIZE = 16  # pixels a side for one token of the image embedding, for every encoder


class ViT(NamedTuple):
    """Size of a plain SAM encoder; windows of 14 x 14 but in the global blocks."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]


VITS = {
    "vit_t": ViT(192, 12, 3, (2, 5, 8, 11)),
    "vit_b": ViT(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": ViT(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": ViT(1280, 32, 16, (7, 15, 23, 31)),
}
MODELS = (*VITS, "mobile_sam")


def build_image_encoder(name: str, image_size: int) -> nn.Module:
    """Builds an encoder with random weights; (B, 3, S, S) to (B, 256, S/16, S/16).

    Args:
        name: one of ``MODELS``.
        image_size: S in pixels, a multiple of 16.

    Raises:
        UserError: an unknown name or a size that is no multiple of the patch.
    """
    if name not in MODELS:
        raise UserError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    if image_size < PATCH_SIZE or image_size % PATCH_SIZE:
        raise UserError(f"image size must be a multiple of {PATCH_SIZE}, got {image_size}")
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
    nn.init.trunc_normal_(encoder.pos_embed, std=0.02)  # zero in SAM until a checkpoint fills it
    return encoder


class TinyViTEncoder(nn.Module):
    """MobileSAM's encoder: TinyViT-5M whose last stage keeps its resolution, and SAM's neck."""

    def __init__(self) -> None:
        super().__init__()
        # Not by name from timm's registry, where MobileSAM's own package, once imported, puts its.
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
        """(B, 3, S, S) normalised images to (B, 256, S/16, S/16)."""
        return self.neck(self.stages(self.patch_embed(images)))


def build_prompt_encoder(image_size: int) -> PromptEncoder:
    """SAM's prompt encoder; without prompts it gives the no-mask embedding and the positions."""
    grid = image_size // PATCH_SIZE
    return PromptEncoder(EMBED_DIM, (grid, grid), (image_size, image_size), mask_in_chans=16)


def checkpoint_blocks(encoder: nn.Module) -> None:
    """Recomputes each transformer block in the backward instead of keeping its activations."""
    blocks = encoder.blocks if hasattr(encoder, "blocks") else _tiny_vit_blocks(encoder)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _tiny_vit_blocks(encoder: nn.Module) -> list[nn.Module]:
    return [block for stage in encoder.stages for block in stage.blocks]
