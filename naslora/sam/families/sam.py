"""SAM: the plain ViTs of segment_anything, and ``vit_t``, a small one that trains on a CPU."""

from functools import partial
from typing import Any

from segment_anything.modeling import ImageEncoderViT
from torch import nn

from naslora.sam.decoder import EMBED_DIM
from naslora.sam.family import Family
from naslora.sam.naming import PLAIN_VIT, PROMPTS_AND_DECODER, HuggingFace
from naslora.sam.vits import VITS, ViT

HQ_TOKENS = frozenset({"mask_decoder.hf_token.weight", "mask_decoder.hq_token.weight"})
"""What SAM-HQ has beside SAM: the official name, and Hugging Face's."""


def build_vit(
    size: ViT, image_size: int, kind: type[ImageEncoderViT] = ImageEncoderViT
) -> ImageEncoderViT:
    """Builds a plain ViT with random weights, for images whose side is a multiple of 16 pixels."""
    encoder = kind(
        img_size=image_size,
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


def vit_config(kind: str, size: ViT, image_size: int) -> dict[str, Any]:
    """Hugging Face's configuration of a SAM with a plain ViT, for images of ``image_size`` pixels.

    ``kind`` is the start of its parts' ``model_type``.
    """
    vision = {
        "model_type": f"{kind}_vision_model",
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "mlp_dim": 4 * size.width,
        "global_attn_indexes": list(size.global_blocks),
        "image_size": image_size,
    }
    return {"vision_config": vision, "prompt_encoder_config": {"image_size": image_size}}


HUB_SIZES = {"b": "base", "l": "large", "h": "huge"}
FAMILY = Family(
    title="SAM",
    models=VITS,
    build_encoder=lambda name, image_size: build_vit(VITS[name], image_size),
    has_marks=HQ_TOKENS.isdisjoint,
    weights={f"vit_{size}": f"hf:facebook/sam-vit-{name}" for size, name in HUB_SIZES.items()},
    home="github.com/facebookresearch/segment-anything#model-checkpoints",
    huggingface=HuggingFace(
        architecture="SamModel",
        kind="sam",
        starts=(*PROMPTS_AND_DECODER, *PLAIN_VIT),
        config=lambda name, image_size: vit_config("sam", VITS[name], image_size),
    ),
)
