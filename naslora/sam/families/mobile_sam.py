"""MobileSAM: TinyViT-5M, built from timm, with SAM's neck."""

import re
from collections.abc import Callable, Iterator

from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import tiny_vit_5m_224
from torch import Tensor, nn

from naslora.sam.decoder import EMBED_DIM, SegmentationDecoder
from naslora.sam.families.sam import HQ_TOKENS
from naslora.sam.family import Family
from naslora.sam.naming import Naming


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

    def transformer_blocks(self) -> Iterator[nn.Module]:
        """Its blocks in their order; those of the first stage are convolutions."""
        for stage in self.stages.children():
            yield from stage.get_submodule("blocks").children()


# ---- MobileSAM's names ---------------------------------------------------------------------------

_Renaming = list[tuple[str, str | Callable[[re.Match[str]], str]]]

_TO_TIMM: _Renaming = [
    (r"patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"patch_embed\.seq\.2\.", "patch_embed.conv2."),
    # MobileSAM reduces the resolution at the end of a stage, timm at the start of the next one.
    (
        r"layers\.(\d)\.downsample\.",
        lambda match: f"stages.{int(match.group(1)) + 1}.downsample.",
    ),
    (r"layers\.(\d)\.", r"stages.\1."),
    (r"\.c\.weight$", ".conv.weight"),
]

_TO_MOBILE_SAM: _Renaming = [
    (r"^patch_embed\.conv1\.", "patch_embed.seq.0."),
    (r"^patch_embed\.conv2\.", "patch_embed.seq.2."),
    (
        r"^stages\.(\d)\.downsample\.",
        lambda match: f"layers.{int(match.group(1)) - 1}.downsample.",
    ),
    (r"^stages\.(\d)\.", r"layers.\1."),
    (r"\.conv\.weight$", ".c.weight"),
]


def timm_name(key: str) -> str:
    """Converts a parameter name of MobileSAM to the name that timm's TinyViT uses."""
    return _renamed(key, _TO_TIMM)


def mobile_sam_name(key: str) -> str:
    """Inverts ``timm_name``."""
    return _renamed(key, _TO_MOBILE_SAM)


def _renamed(key: str, renaming: _Renaming) -> str:
    prefix, dot, rest = key.partition(".")
    if prefix != "image_encoder":
        return key
    for pattern, replacement in renaming:
        rest = re.sub(pattern, replacement, rest)
    return prefix + dot + rest


NAMING = Naming(timm_name, mobile_sam_name)
"""MobileSAM's names of the encoder; the other parts have SAM's."""
IN_ENCODER = "image_encoder.stages.1.blocks.0.attn.qkv.weight"
"""A tensor that every TinyViT has, under our names."""

FAMILY = Family(
    title="MobileSAM",
    models={"mobile_sam": None},
    build_encoder=lambda name, image_size: TinyViTEncoder(),
    build_decoder=lambda name, classes, tokens: SegmentationDecoder(classes, tokens),
    official=NAMING,
    matches=lambda name, tensors: (
        IN_ENCODER in tensors and not any(token in tensors for token in HQ_TOKENS)
    ),
)
