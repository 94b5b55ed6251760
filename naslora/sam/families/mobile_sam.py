"""MobileSAM: TinyViT-5M, built from timm, with SAM's neck."""

import torch
from timm.models.tiny_vit import TinyVitBlock, tiny_vit_5m_224
from torch import Tensor, nn

from naslora.adapter.layer.windows import Windows
from naslora.sam.attention import traced
from naslora.sam.decoder import build_neck
from naslora.sam.families.sam import HQ_TOKENS
from naslora.sam.family import Family
from naslora.sam.naming import Naming


class GridBlock(TinyVitBlock):
    """timm's block of TinyViT, except that its MLP gets (B, H, W, C) instead of (B, H * W, C).

    An adapter on the MLP then knows which tokens are neighbours, whatever the image's shape.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        if traced():
            return super().forward(x)
        size = self.window_size
        windows = Windows(size, (x.shape[1], x.shape[2]))
        attended = self.attn(windows.partition(x).flatten(1, 2))
        x = x + windows.unpartition(attended.unflatten(1, (size, size)))
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(x)


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
        for block in tiny_vit.modules():
            if isinstance(block, TinyVitBlock):
                block.__class__ = GridBlock
        self.patch_embed = tiny_vit.patch_embed
        self.stages = tiny_vit.stages
        self.neck = build_neck(tiny_vit.num_features)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B, 3, S, S) normalised images to (B, 256, S/16, S/16)."""
        # Convolutions keep this layout, and are faster in it on CPUs.
        images = images.contiguous(memory_format=torch.channels_last)
        return self.neck(self.stages(self.patch_embed(images)))


# MobileSAM reduces the resolution at the end of a stage, timm at the start of the next one.
_NEXT = ("image_encoder.stages.{}.downsample.", "image_encoder.layers.{}.downsample.")
NAMING = Naming(
    starts=(
        ("image_encoder.patch_embed.conv1.", "image_encoder.patch_embed.seq.0."),
        ("image_encoder.patch_embed.conv2.", "image_encoder.patch_embed.seq.2."),
        *((_NEXT[0].format(stage), _NEXT[1].format(stage - 1)) for stage in (1, 2, 3)),
        ("image_encoder.stages.", "image_encoder.layers."),
    ),
    ends=((".conv.weight", ".c.weight"),),
)
"""MobileSAM's names of the encoder; the other parts have SAM's."""
FAMILY = Family(
    title="MobileSAM",
    models={"mobile_sam": None},
    build_encoder=lambda name, image_size: TinyViTEncoder(),
    official=NAMING,
    has_marks=HQ_TOKENS.isdisjoint,
    weights={"mobile_sam": "hf:dhkim2810/MobileSAM/mobile_sam.pt"},
    home="github.com/ChaoningZhang/MobileSAM, weights/mobile_sam.pt",
)
