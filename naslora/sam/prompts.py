"""SAM with prompts: masks from points and boxes, through segment_anything's own predictor."""

from pathlib import Path
from typing import Any

import torch
from segment_anything import SamPredictor
from segment_anything.modeling import MaskDecoder, Sam, TwoWayTransformer
from segment_anything.utils.transforms import ResizeLongestSide

from naslora.errors import UserError
from naslora.sam.attention import fuse_attention
from naslora.sam.checkpoint import load_sam_checkpoint
from naslora.sam.decoder import EMBED_DIM
from naslora.sam.encoders import build_image_encoder, build_prompt_encoder
from naslora.sam.shipped import SHIPPED_SIZE, find_checkpoint
from naslora.sam.vits import VITS

PROMPTED = (*VITS, "mobile_sam")
"""The models whose encoder and decoder segment_anything's predictor can drive."""


class Squash(ResizeLongestSide):
    """Resizes images to squares, as ``naslora train`` does, and prompts with them."""

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        """Height and width after resizing."""
        return long_side_length, long_side_length


def build_predictor(
    name: str = "vit_t",
    image_size: int = SHIPPED_SIZE,
    checkpoint: str | Path | None = None,
) -> SamPredictor:
    """Builds segment_anything's predictor on a model of ours.

    Its ``set_image`` takes an (H, W, 3) uint8 RGB image. Its ``predict`` takes points (N, 2) and a
    box (4,) in pixels of that image, and returns masks (C, H, W), their estimated IoU (C,) and
    their logits (C, S/4, S/4). S is the image size.

    Args:
        name: one of ``PROMPTED``.
        image_size: S, to which images are resized without keeping the aspect ratio, in pixels.
        checkpoint: as in ``build_model``. A model that was fine-tuned, merged with "center" or
            "calibrated" and exported to safetensors is such a checkpoint, too.

    Raises:
        UserError: another model; there are no pre-trained weights to load; as
            ``build_image_encoder``, ``find_checkpoint`` and ``load_sam_checkpoint``.
    """
    if name not in PROMPTED:
        raise UserError(f"prompts work with {', '.join(PROMPTED)}, got {name!r}")
    path = find_checkpoint(name, checkpoint)
    if path is None:
        raise UserError(f"a predictor for {name} needs pre-trained weights: give a checkpoint")
    sam = empty_sam(name, image_size)
    load_sam_checkpoint(sam, path, name)
    fuse_attention(sam.image_encoder)
    predictor = SamPredictor(sam.eval().requires_grad_(False))
    predictor.transform = Squash(image_size)
    return predictor


def empty_sam(name: str, image_size: int) -> Sam:
    """A whole SAM with random weights. The global random state is not changed.

    Args:
        name: one of ``naslora.sam.families.MODELS``.
        image_size: side of the images in pixels.

    Raises:
        UserError: as ``build_image_encoder``.
    """
    with torch.random.fork_rng(devices=[]):
        encoder: Any = build_image_encoder(name, image_size)
        encoder.img_size = image_size  # which the predictor reads; TinyViT does not have it
        transformer = TwoWayTransformer(depth=2, embedding_dim=EMBED_DIM, num_heads=8, mlp_dim=2048)
        decoder = MaskDecoder(
            transformer_dim=EMBED_DIM,
            transformer=transformer,
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        )
        return Sam(encoder, build_prompt_encoder(image_size), decoder)
