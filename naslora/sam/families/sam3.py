"""SAM 3 for images: the vision encoder of the transformers library, and the neck of the tracker.

SAM 3 finds objects by words with its detector. Its tracker has the same encoder, a neck of its own
and the mask decoder of SAM 2. naslora takes these three. The detector, the text encoder and the
memory are left out.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from naslora.errors import UserError
from naslora.sam.decoder import EMBED_DIM, Sam2Decoder
from naslora.sam.families import sam2
from naslora.sam.family import Family
from naslora.sam.naming import HuggingFace, Naming, Tensors

PATCH = 14
"""Side in pixels of the image patch of a token."""


SIZES: dict[str, dict[str, Any]] = {
    "sam3": {
        "hidden_size": 1024,
        "intermediate_size": 4736,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "window_size": 24,
        "global_attn_indexes": [7, 15, 23, 31],
        "pretrain_image_size": 24 * PATCH,
    }
}
"""Sizes of encoders as fields of ``Sam3ViTConfig`` in transformers. The position embedding of an
image of ``pretrain_image_size`` pixels is repeated over an image's tokens."""


class Sam3Encoder(nn.Module):
    """SAM 3's image encoder as its tracker uses it, for a model of ``SIZES``.

    The rotary positions of the global blocks depend on the side of the images, in pixels; no weight
    does.
    """

    def __init__(self, name: str, image_size: int) -> None:
        super().__init__()
        try:  # here, because it takes seconds
            from transformers import Sam3VisionConfig, Sam3VisionModel
        except ImportError as error:
            raise UserError(
                "--model sam3 needs transformers 5 or later; run pip install 'transformers>=5'"
            ) from error

        config = Sam3VisionConfig(**_config(name, image_size)["vision_config"])
        vision: Any = Sam3VisionModel(config)
        self.backbone, self.neck = vision.backbone, vision.neck
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, EMBED_DIM))
        nn.init.trunc_normal_(self.no_mem_embed, std=0.02)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (B, 3, S, S) to (B, 256, g, g), g = S/14, to (B, 256, 2g, 2g) and to 4g."""
        tokens = self.backbone(images).last_hidden_state  # (B, g * g, width)
        grid = (images.shape[2] // PATCH, images.shape[3] // PATCH)
        x = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
        # Without the neck's forward, which also computes positions for the memory.
        fine, middle, embedding = (layer(x) for layer in self.neck.fpn_layers)
        # An image is a frame without a memory.
        return embedding + self.no_mem_embed.reshape(1, -1, 1, 1), middle, fine


def _config(name: str, image_size: int) -> dict[str, Any]:
    """Hugging Face's configuration of the tracker.

    Its neck has three levels, as the decoder takes. With the four of the detector, Sam3TrackerModel
    of transformers 5.24 adds the no-memory embedding to a level that it then drops.
    """
    grid = image_size // PATCH
    backbone = {"model_type": "sam3_vit_model", "image_size": image_size, **SIZES[name]}
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": backbone,
        "scale_factors": [4.0, 2.0, 1.0],
        "backbone_feature_sizes": [[scale * grid] * 2 for scale in (4, 2, 1)],
    }
    return {"vision_config": vision, "prompt_encoder_config": {"image_size": image_size}}


_LAYER, _POSITIONS = "image_encoder.backbone.layers.{}.", "embeddings.position_embeddings"
_LEVEL, _BACKBONE = "image_encoder.neck.fpn_layers.{}.", "detector.backbone.vision_backbone."
_BLOCK, _CONVS = f"{_BACKBONE}trunk.blocks.{{}}.", f"{_BACKBONE}sam2_convs.{{}}."


class OfficialNaming(Naming):
    """Meta's names."""

    def to_ours(self, tensors: Tensors) -> dict[str, Tensor]:
        """Tensors under our names: q, k and v apart, positions without that of a class token."""
        found = {}
        for name, tensor in super().to_ours(tensors).items():
            if ".attn.qkv." in name:
                for letter, part in zip("qkv", tensor.chunk(3), strict=False):
                    found[name.replace(".attn.qkv.", f".attention.{letter}_proj.")] = part
            elif name.endswith(_POSITIONS):
                found[name] = tensor[:, -(math.isqrt(tensor.shape[1]) ** 2) :]
            else:
                found[name] = tensor
        return found


OFFICIAL = OfficialNaming(
    (
        ("image_encoder.no_mem_embed", "tracker.no_mem_embed"),
        (f"{_LAYER}layer_norm{{}}.", f"{_BLOCK}norm{{}}."),
        (f"{_LAYER}attention.o_proj.", f"{_BLOCK}attn.proj."),
        (_LAYER, _BLOCK),
        (
            "image_encoder.backbone.embeddings.patch_embeddings.projection.",
            f"{_BACKBONE}trunk.patch_embed.proj.",
        ),
        (f"image_encoder.backbone.{_POSITIONS}", f"{_BACKBONE}trunk.pos_embed"),
        ("image_encoder.backbone.layer_norm.", f"{_BACKBONE}trunk.ln_pre."),
        (f"{_LEVEL}scale_layers.0.", f"{_CONVS}dconv_2x2."),
        (f"{_LEVEL}scale_layers.0.", f"{_CONVS}dconv_2x2_0."),
        (f"{_LEVEL}scale_layers.2.", f"{_CONVS}dconv_2x2_1."),
        (f"{_LEVEL}proj1.", f"{_CONVS}conv_1x1."),
        (f"{_LEVEL}proj2.", f"{_CONVS}conv_3x3."),
        *((ours, f"tracker.{theirs}") for ours, theirs in sam2.DECODER),
    ),
    # The detector, the text encoder and the memory.
    foreign=(
        r"detector\.(?!backbone\.vision_backbone\.(trunk|sam2_convs\.[012])\.)|"
        r"tracker\.(?!sam_|no_mem_embed)"
    ),
)
HUGGINGFACE = HuggingFace(
    architecture="Sam3TrackerModel",
    kind="sam3_tracker",
    starts=(
        ("image_encoder.no_mem_embed", "no_memory_embedding"),
        ("image_encoder.neck.", "vision_encoder.neck."),
        ("image_encoder.", "vision_encoder."),
        # Sam3VideoModel, as facebook/sam3 is stored.
        ("image_encoder.neck.", "tracker_neck."),
        ("image_encoder.", "detector_model.vision_encoder."),
        *sam2.DECODER_HF,
    ),
    config=_config,
    stacked=sam2.HUGGINGFACE.stacked,
    foreign=(
        r"detector_model\.(?!vision_encoder\.backbone\.)|"
        rf"(vision_encoder\.|tracker_)neck\.fpn_layers\.3\.|{sam2.MEMORY_HF}"
    ),
)
MARKS = ("vision_backbone.trunk.ln_pre.weight", "vision_encoder.backbone.layer_norm.weight")
"""The norm in front of the blocks: ends of its official name, and of Hugging Face's."""
FAMILY = Family(
    title="SAM 3",
    models=SIZES,
    build_encoder=Sam3Encoder,
    build_decoder=lambda name, classes, tokens: Sam2Decoder(classes, tokens),
    has_marks=lambda names: any(name.endswith(MARKS) for name in names),
    official=OFFICIAL,
    huggingface=HUGGINGFACE,
    patch=PATCH,
    image_size=1008,
    mean=(127.5, 127.5, 127.5),
    std=(127.5, 127.5, 127.5),
    fuses=False,
    weights={"sam3": "hf:facebook/sam3"},
    home="github.com/facebookresearch/sam3",
    licence="SAM License, to be accepted on the Hub",
    elsewhere=r"detector\.",
)
