"""Grad-CAM of an encoder: which parts of an image decide its foreground (paper, Fig. 4)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from naslora.sam.encoders import transformer_blocks
from naslora.sam.segmentation import SamForSegmentation


class _Foreground(nn.Module):
    """Images to (B, K, S, S) scores whose gradients do not vanish: logits if the task is binary."""

    def __init__(self, model: SamForSegmentation) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        return output.masks if output.classes is None else output.class_map()


def heat_map(model: SamForSegmentation, image: Tensor, mask: Tensor) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017) of the foreground's score at the encoder's last block.

    Args:
        model: trained or not.
        image: (3, S, S) in [0, 1].
        mask: (S, S) labels. The score is summed over the pixels of their foreground.

    Returns:
        (S, S) float32 in [0, 1].
    """
    from pytorch_grad_cam import GradCAM  # this import takes seconds

    last = transformer_blocks(model.image_encoder)[-1]

    def target(scores: Tensor) -> Tensor:
        labels = mask.to(scores.device)
        if scores.shape[0] == 1:
            return scores[0][labels == 1].sum()
        return torch.stack([scores[k][labels == k].sum() for k in range(1, len(scores))]).sum()

    # The encoder is frozen, so gradients reach its last block only on the way to the image.
    images = image[None].to(next(model.parameters()).device).requires_grad_(True)
    layers: dict[str, Any] = {
        "target_layers": [last],
        "reshape_transform": lambda x: x.permute(0, 3, 1, 2),
    }
    with GradCAM(_Foreground(model.eval()), **layers) as cam:
        heat = cam(images, [target])[0]
    model.zero_grad(set_to_none=True)
    return heat


def heat_overlay(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Paints a heat map over an image.

    Args:
        pixels: (S, S, 3) uint8 RGB.
        heat: (S, S) in [0, 1].

    Returns:
        (S, S, 3) uint8 RGB.
    """
    from pytorch_grad_cam.utils.image import show_cam_on_image  # this import takes seconds

    return show_cam_on_image(np.float32(pixels) / 255, heat, use_rgb=True)
