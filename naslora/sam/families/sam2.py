"""SAM 2 and SAM 2.1 for images: timm's Hiera, and their feature pyramid.

The two have the same encoder and decoder and differ in their weights. Their memory, which carries a
mask from frame to frame of a video, is left out.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.hieradet_sam2 import HieraDet
from torch import Tensor, nn

from naslora.sam.decoder import EMBED_DIM, Sam2Decoder
from naslora.sam.family import Family
from naslora.sam.naming import PROMPTS_AND_DECODER, HuggingFace, Naming, Pairs, mlp


class Hiera(NamedTuple):
    """Size of a Hiera encoder."""

    width: int
    """Channels of a token in the first stage; each stage doubles them."""
    heads: int
    """Attention heads in the first stage; each stage doubles them."""
    stages: tuple[int, int, int, int]
    """Blocks of each stage."""
    global_blocks: tuple[int, ...]
    """Indices of the blocks with global attention."""
    windows: tuple[int, int, int, int] = (8, 4, 14, 7)
    """Side of each stage's attention windows, in tokens."""
    positions: int = 7
    """Side of the position embedding that is resized to an image's tokens."""

    @property
    def widths(self) -> list[int]:
        """Channels of each stage."""
        return [self.width * 2**stage for stage in range(4)]


SIZES: dict[str, Hiera] = {
    "t": Hiera(96, 1, (1, 2, 7, 2), (5, 7, 9)),
    "s": Hiera(96, 1, (1, 2, 11, 2), (7, 10, 13)),
    "b+": Hiera(112, 2, (2, 3, 16, 3), (12, 16, 20), positions=14),
    "l": Hiera(144, 2, (2, 6, 36, 4), (23, 33, 43), windows=(8, 4, 16, 8)),
}
HUB_SIZES = ("tiny", "small", "base-plus", "large")
"""The same sizes on the Hugging Face Hub."""
SAM2 = {f"sam2_{name}": size for name, size in SIZES.items()}
SAM21 = {f"sam2.1_{name}": size for name, size in SIZES.items()}
ONLY_IN_21 = ("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter")
"""Tensors of the memory that are in SAM 2.1 only: the official names, and Hugging Face's."""
# The names of the memory's tensors start like this: official, and of Hugging Face.
MEMORY = (
    r"memory_attention\.|memory_encoder\.|mask_downsample\.|maskmem_tpos_enc|no_mem_pos_enc|"
    r"no_obj_ptr|no_obj_embed_spatial|obj_ptr_proj\.|obj_ptr_tpos_proj\."
)
MEMORY_HF = (
    r"memory_|mask_downsample\.|object_pointer_proj\.|temporal_positional_encoding_projection|"
    r"no_memory_positional_encoding|no_object_pointer|occlusion_spatial_embedding_parameter"
)


class HieraEncoder(nn.Module):
    """SAM 2's image encoder."""

    def __init__(self, size: Hiera) -> None:
        super().__init__()
        trunk: Any = HieraDet(
            num_classes=0,
            embed_dim=size.width,
            num_heads=size.heads,
            stages=size.stages,
            global_att_blocks=size.global_blocks,
            window_spec=size.windows,
            global_pos_size=(size.positions, size.positions),
        )
        trunk.head = nn.Identity()  # of a classifier
        self.trunk = trunk
        self.neck = FeaturePyramid(size.widths)
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, EMBED_DIM))
        nn.init.trunc_normal_(self.no_mem_embed, std=0.02)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (B, 3, S, S) to (B, 256, S/16, S/16), the same of S/8, and of S/4."""
        maps = self.trunk.forward_intermediates(images, intermediates_only=True)
        fine, middle, embedding = self.neck(maps)
        # An image is a frame without a memory.
        return embedding + self.no_mem_embed.reshape(1, -1, 1, 1), middle, fine


class FeaturePyramid(nn.Module):
    """SAM 2's neck: brings three maps to 256 channels, and adds the coarsest map to the third.

    SAM 2's own neck also computes position encodings, which only its memory uses. ``widths`` are
    the channels of the four maps, finest first.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(width, EMBED_DIM, 1) for width in reversed(widths)])

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (B, width, s, s) of S/4, S/8, S/16 and S/32 to (B, 256, s, s) of the first three."""
        coarse, third, second, first = (
            conv(features) for conv, features in zip(self.convs, reversed(maps), strict=True)
        )
        return first, second, third + F.interpolate(coarse, scale_factor=2.0, mode="nearest")


def _config(name: str, image_size: int) -> dict[str, Any]:
    """Hugging Face's configuration of a model."""
    size = ({**SAM2, **SAM21})[name]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "image_size": [image_size, image_size],
        "hidden_size": size.width,
        "num_attention_heads": size.heads,
        "blocks_per_stage": list(size.stages),
        "embed_dim_per_stage": size.widths,
        "num_attention_heads_per_stage": [size.heads * 2**stage for stage in range(4)],
        "window_size_per_stage": list(size.windows),
        "window_positional_embedding_background_size": [size.positions] * 2,
        "global_attention_blocks": list(size.global_blocks),
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": size.widths[::-1],
        "backbone_feature_sizes": [[image_size // step] * 2 for step in (4, 8, 16)],
    }
    return {"vision_config": vision, "prompt_encoder_config": {"image_size": image_size}}


_BLOCK, _BLOCK_HF = "image_encoder.trunk.blocks.{}.", "vision_encoder.backbone.blocks.{}."
_LAYER, _FINAL = "transformer.layers.{}.", "mask_decoder.transformer.final_attn_token_to_image."
DECODER: Pairs = (
    ("prompt_encoder.", "sam_prompt_encoder."),
    (f"mask_decoder.{_LAYER}mlp.lin1.", f"sam_mask_decoder.{_LAYER}mlp.layers.0."),
    (f"mask_decoder.{_LAYER}mlp.lin2.", f"sam_mask_decoder.{_LAYER}mlp.layers.1."),
    ("mask_decoder.", "sam_mask_decoder."),
)
"""The official names of the prompt encoder and the mask decoder."""
DECODER_HF: Pairs = (
    (f"mask_decoder.{_LAYER}mlp.lin1.", f"mask_decoder.{_LAYER}mlp.proj_in."),
    (f"mask_decoder.{_LAYER}mlp.lin2.", f"mask_decoder.{_LAYER}mlp.proj_out."),
    (f"mask_decoder.{_LAYER}{{}}.out_proj.", f"mask_decoder.{_LAYER}{{}}.o_proj."),
    (f"{_FINAL}out_proj.", f"{_FINAL}o_proj."),
    *mlp("mask_decoder.pred_obj_score_head.", "mask_decoder.pred_obj_score_head."),
    *PROMPTS_AND_DECODER,
)
"""Hugging Face's names of the same."""
OFFICIAL = Naming(
    (
        *DECODER,
        ("image_encoder.no_mem_embed", "no_mem_embed"),
        (f"{_BLOCK}mlp.fc1.", f"{_BLOCK}mlp.layers.0."),
        (f"{_BLOCK}mlp.fc2.", f"{_BLOCK}mlp.layers.1."),
        ("image_encoder.neck.convs.{}.", "image_encoder.neck.convs.{}.conv."),
    )
)
HUGGINGFACE = HuggingFace(
    architecture="Sam2Model",
    kind="sam2",
    starts=(
        ("image_encoder.no_mem_embed", "no_memory_embedding"),
        (
            "image_encoder.trunk.patch_embed.proj.",
            "vision_encoder.backbone.patch_embed.projection.",
        ),
        (f"{_BLOCK}norm{{}}.", f"{_BLOCK_HF}layer_norm{{}}."),
        (f"{_BLOCK}mlp.fc1.", f"{_BLOCK_HF}mlp.proj_in."),
        (f"{_BLOCK}mlp.fc2.", f"{_BLOCK_HF}mlp.proj_out."),
        ("image_encoder.trunk.", "vision_encoder.backbone."),
        ("image_encoder.", "vision_encoder."),
        *DECODER_HF,
    ),
    config=_config,
    stacked={"prompt_encoder.point_embed.weight": "prompt_encoder.point_embeddings.{}.weight"},
    foreign=f"{MEMORY_HF}|{MEMORY}",
)


def _family(title: str, models: dict[str, Hiera], newer: bool) -> Family:
    def has_marks(names: Collection[str]) -> bool:
        if "obj_ptr_proj.layers.0.weight" not in names and "no_object_pointer" not in names:
            return True  # nothing is left of the memory, by which the two differ
        return newer == any(name in names for name in ONLY_IN_21)

    kind = title.lower().replace(" ", "")
    return Family(
        title=title,
        models=models,
        build_encoder=lambda name, image_size: HieraEncoder(models[name]),
        build_decoder=lambda name, classes, tokens: Sam2Decoder(classes, tokens),
        has_marks=has_marks,
        official=OFFICIAL,
        huggingface=HUGGINGFACE,
        grid_multiple=2,  # the last stage has one token for 2 x 2, the first windows of 8 x 8
        weights={
            model: f"hf:facebook/{kind}-hiera-{long}/{kind}_hiera_{long.replace('-', '_')}.pt"
            for model, long in zip(models, HUB_SIZES, strict=True)
        },
        home="github.com/facebookresearch/sam2#download-checkpoints",
        elsewhere=MEMORY,
    )


FAMILY = _family("SAM 2", SAM2, newer=False)
FAMILY_21 = _family("SAM 2.1", SAM21, newer=True)
