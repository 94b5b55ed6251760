"""SAM with prompts: masks from points and boxes, through segment_anything's own predictor."""

from pathlib import Path

import numpy as np
from segment_anything import SamPredictor
from segment_anything.utils.transforms import ResizeLongestSide

from naslora.errors import UserError
from naslora.sam.promptable import PromptableSam, build_promptable
from naslora.sam.shipped import SHIPPED_SIZE, find_checkpoint


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
