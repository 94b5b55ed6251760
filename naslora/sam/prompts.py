"""SAM with prompts: masks of objects from points, boxes and earlier masks."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from segment_anything import SamPredictor
from segment_anything.modeling import MaskDecoder, Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from naslora.adapter.layer.modules import keep_frozen
from naslora.errors import UserError
from naslora.sam.attention import Attention
from naslora.sam.decoder import EMBED_DIM, build_transformer
from naslora.sam.encoders import build_image_encoder, build_prompt_encoder
from naslora.sam.families import find_family
from naslora.sam.family import Family
from naslora.sam.objects import decode
from naslora.sam.segmentation import SamForSegmentation, made
from naslora.sam.shipped import SHIPPED_SIZE, find_checkpoint
from naslora.sam.vits import VITS

PROMPTED = (*VITS, "mobile_sam")
"""The models with SAM's own mask decoder."""

PROMPTS = (
    "takes prompts: give predict --instances to find its objects; "
    "naslora.sam.prompts.build_predictor gives its masks of points and boxes"
)
"""Why a promptable model does not label whole images."""


class PromptableSam(Sam):
    """segment_anything's ``Sam`` with an encoder of ours. Its mask decoder is trainable.

    Its tensors have SAM's names, and segment_anything's ``SamPredictor`` and
    ``SamAutomaticMaskGenerator`` take it. Frozen batch norms of the encoder stay in evaluation
    mode, also after ``train()``.

    Args:
        name: one of ``PROMPTED``.
        image_size: side S of the square images in pixels, as in ``build_image_encoder``.

    Attributes:
        left_out: as in ``SamForSegmentation``.

    Raises:
        UserError: an argument is out of range.
    """

    num_classes = 1
    """An object and all else."""

    def __init__(self, name: str, image_size: int) -> None:
        family = find_family(name)
        if name not in PROMPTED:
            raise UserError(
                f"prompts work with {', '.join(PROMPTED)}, got {name!r}: {family.title} has a "
                "mask decoder of its own"
            )
        encoder: Any = build_image_encoder(name, image_size).requires_grad_(False)
        keep_frozen(encoder)
        encoder.img_size = image_size  # which the predictor reads; TinyViT does not have it
        decoder = MaskDecoder(
            transformer_dim=EMBED_DIM,
            transformer=build_transformer(),
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        )
        prompt_encoder = build_prompt_encoder(family, image_size)
        super().__init__(encoder, prompt_encoder, decoder, [*family.mean], [*family.std])
        self.name, self.image_size = name, image_size
        self.left_out: dict[str, Tensor] = {}

    @property
    def family(self) -> Family:
        """The family of SAMs that the model belongs to."""
        return find_family(self.name)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Encodes (B, 3, S, S) RGB images in [0, 1] to (B, 256, g, g)."""
        return self.image_encoder((255 * images - self.pixel_mean) / self.pixel_std)

    decode = decode


AnySam = SamForSegmentation | PromptableSam
"""The model of a run, by its task."""


def build_promptable(
    name: str,
    image_size: int,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    attention: Attention = "stock",
) -> PromptableSam:
    """Builds a promptable SAM and loads a checkpoint. Arguments and errors as ``build_model``."""
    return made(partial(PromptableSam, name, image_size), checkpoint, seed, attention)


class Squash(ResizeLongestSide):
    """Resizes images to squares, as ``naslora train`` does, and prompts with them."""

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        """Height and width after resizing."""
        return long_side_length, long_side_length

    def apply_coords(self, coords: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
        """Moves (..., 2) points, x and y, of an image of this height and width.

        Raises:
            UserError: a point, or the corner of a box, is outside of the image.
        """
        height, width = original_size
        outside = ((coords < 0) | (coords > (width, height))).any(-1)
        if outside.any():
            x, y = coords[outside][0]
            raise UserError(f"the point ({x:g}, {y:g}) is outside of the image of {width}x{height}")
        return super().apply_coords(coords, original_size)


def build_predictor(
    model: str | PromptableSam = "vit_t",
    image_size: int = SHIPPED_SIZE,
    checkpoint: str | Path | None = None,
) -> SamPredictor:
    """Builds segment_anything's predictor on a model of ours.

    Its ``set_image`` takes an (H, W, 3) uint8 RGB image. Its ``predict`` takes points (N, 2) and a
    box (4,) in pixels of that image, and returns masks (C, H, W), their estimated IoU (C,) and
    their logits (C, 4g, 4g), for a grid of g x g tokens.

    Args:
        model: one of ``PROMPTED``, or the model of a run with ``--task promptable``, as
            ``naslora.trained.load_model`` loads it. The other arguments are for a name.
        image_size: S, to which images are resized without keeping the aspect ratio, in pixels.
        checkpoint: as in ``build_model``. A model that was fine-tuned, merged with "center" or
            "calibrated" and exported to safetensors is such a checkpoint, too.

    Raises:
        UserError: another model; there are no pre-trained weights to load; as
            ``build_promptable``.
    """
    if isinstance(model, str):
        if find_checkpoint(model, checkpoint) is None:
            raise UserError(f"a predictor for {model} needs pre-trained weights: give a checkpoint")
        model = build_promptable(model, image_size, checkpoint, attention="fused")
    predictor = SamPredictor(model.eval().requires_grad_(False))
    predictor.transform = Squash(model.image_size)
    return predictor
