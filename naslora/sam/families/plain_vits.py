"""DINOv3, DINOv2 and the Perception Encoder (PE Spatial): plain ViTs of timm under SAM's decoder.

Their checkpoints hold an encoder alone. SAM's mask decoder, and the neck in front of it, start from
random weights and train.
"""

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import timm
import torch
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from naslora.sam.decoder import SegmentationDecoder
from naslora.sam.family import Family
from naslora.sam.naming import Naming, Tensors


class PlainViT(NamedTuple):
    """A plain ViT: its name in timm with the tag of its weights, and its size."""

    timm_name: str
    width: int
    depth: int
    heads: int


DINOV3 = {
    "dinov3_s": PlainViT("vit_small_patch16_dinov3.lvd1689m", 384, 12, 6),
    "dinov3_b": PlainViT("vit_base_patch16_dinov3.lvd1689m", 768, 12, 12),
    "dinov3_l": PlainViT("vit_large_patch16_dinov3.lvd1689m", 1024, 24, 16),
}
# With registers: without them DINOv2 has a few tokens of very large norm (Darcet et al., 2024),
# which the convolutions of a cell would spread to their neighbours.
DINOV2 = {
    "dinov2_s": PlainViT("vit_small_patch14_reg4_dinov2.lvd142m", 384, 12, 6),
    "dinov2_b": PlainViT("vit_base_patch14_reg4_dinov2.lvd142m", 768, 12, 12),
}
PE_SPATIAL = {
    "pe_spatial_t": PlainViT("vit_pe_spatial_tiny_patch16_512.fb", 192, 12, 3),
    "pe_spatial_s": PlainViT("vit_pe_spatial_small_patch16_512.fb", 384, 12, 6),
    "pe_spatial_b": PlainViT("vit_pe_spatial_base_patch16_512.fb", 768, 12, 12),
}
PE_SPATIAL_L = {"pe_spatial_l": PlainViT("vit_pe_spatial_large_patch14_448.fb", 1024, 24, 16)}


class PlainViTEncoder(nn.Module):
    """A ViT of timm that returns the map of the image's tokens.

    Class and register tokens have no place in the image. In adapted layers they pass by the cell,
    and get the frozen layer plus plain LoRA. ``image_size`` is the side S of the images in pixels,
    or height and width.
    """

    def __init__(self, size: PlainViT, image_size: int | tuple[int, int]) -> None:
        super().__init__()
        name, width, depth, heads = size
        own: Any = {"embed_dim": width, "depth": depth, "num_heads": heads, "num_classes": 0}
        # Of a fixed size, because adapted layers read their grid from `patch_embed.grid_size`.
        own |= {"img_size": image_size, "dynamic_img_size": False}
        self.trunk: Any = timm.create_model(name, **own)
        for key, parameter in self.trunk.named_parameters():
            if "gamma" in key:  # timm starts at 1e-5, with which random weights do not train
                nn.init.ones_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B, 3, S, S) normalised images to (B, width, g, g)."""
        tokens = self.trunk.forward_features(images)[:, self.trunk.num_prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, self.trunk.patch_embed.grid_size)


@dataclass(frozen=True)
class EncoderNaming(Naming):
    """The names of timm and of an encoder's authors; a checkpoint of ours keeps its names."""

    convert: Callable[..., dict[str, Tensor]] = eva.checkpoint_filter_fn
    """timm's function for a model's checkpoints."""
    patch: int = 16

    def to_ours(self, tensors: Tensors) -> dict[str, Tensor]:
        """Tensors under our names. Position embeddings keep their size."""
        if any(name.startswith("image_encoder.") for name in tensors):
            return dict(tensors)
        weight = torch.empty(1, 3, self.patch, self.patch, device="meta")
        patch_embed = SimpleNamespace(proj=SimpleNamespace(weight=weight))
        model = SimpleNamespace(patch_embed=patch_embed, pos_embed=None)
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints which biases it leaves out
            found = self.convert(dict(tensors), model)
        return {f"image_encoder.trunk.{name}": tensor for name, tensor in found.items()}


def _family(
    title: str, models: Mapping[str, PlainViT], naming: EncoderNaming, **fields: Any
) -> Family:
    return Family(
        title=title,
        models=models,
        build_encoder=lambda name, image_size: PlainViTEncoder(models[name], image_size),
        build_decoder=lambda name, classes, tokens: SegmentationDecoder(
            classes, tokens, models[name].width
        ),
        has_marks=lambda names: True,
        official=naming,
        patch=naming.patch,
        fuses=False,
        weights={name: f"hf:timm/{size.timm_name}" for name, size in models.items()},
        new_decoder=True,
        **fields,
    )


_PE: dict[str, Any] = {
    "mean": (127.5,) * 3,
    "std": (127.5,) * 3,
    "home": "github.com/facebookresearch/perception_models",
}
FAMILIES = (
    _family(
        "DINOv3",
        DINOV3,
        EncoderNaming(),
        image_size=512,
        home="github.com/facebookresearch/dinov3",
        licence="DINOv3 License, to be accepted at the authors' repositories",
    ),
    _family(
        "DINOv2",
        DINOV2,
        EncoderNaming(convert=vision_transformer.checkpoint_filter_fn, patch=14),
        image_size=518,
        home="github.com/facebookresearch/dinov2",
    ),
    _family("PE Spatial", PE_SPATIAL, EncoderNaming(), image_size=512, **_PE),
    _family("PE Spatial L", PE_SPATIAL_L, EncoderNaming(patch=14), image_size=448, **_PE),
)
