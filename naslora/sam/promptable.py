"""SAM as it is: masks of objects from points, boxes and earlier masks."""

from functools import partial
from pathlib import Path
from typing import Any

from segment_anything.modeling import MaskDecoder, Sam
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
        name: the argument.
        left_out: as in ``SamForSegmentation``.

    Raises:
        UserError: an argument is out of range.
    """

    num_classes = 1
    """An object and all else."""

    def __init__(self, name: str, image_size: int) -> None:
        if name not in PROMPTED:
            raise UserError(
                f"prompts work with {', '.join(PROMPTED)}, got {name!r}: {find_family(name).title} "
                "has a mask decoder of its own"
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
        family = find_family(name)
        prompt_encoder = build_prompt_encoder(image_size, family.patch).requires_grad_(False)
        super().__init__(encoder, prompt_encoder, decoder, [*family.mean], [*family.std])
        self.name = name
        self.image_size = image_size
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
    return made(partial(PromptableSam, name, image_size), name, checkpoint, seed, attention)
