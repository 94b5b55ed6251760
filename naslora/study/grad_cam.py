"""Grad-CAM of an encoder: which parts of an image decide its foreground (paper, Fig. 4)."""

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from naslora.sam.encoders import transformer_blocks
from naslora.sam.segmentation import SamForSegmentation


def heat_overlay(
    model: SamForSegmentation, image: Tensor, mask: Tensor, pixels: np.ndarray
) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017) of the foreground's score at the encoder's last block.

    The score is a sum over the foreground's pixels: of logits if the task is binary, else of the
    class map.

    Args:
        model: trained or not.
        image: (3, S, S) in [0, 1].
        mask: (S, S) labels.
        pixels: (S, S, 3) uint8 RGB, the image.

    Returns:
        (S, S, 3) uint8 RGB: the heat over the image.
    """
    kept: list[Tensor] = []  # the output of the last block, (1, H, W, C)
    last = transformer_blocks(model.image_encoder)[-1]
    hook = last.register_forward_hook(lambda block, inputs, output: kept.append(output))
    # The encoder is frozen, so gradients reach its last block only on the way to the image.
    device = next(model.parameters()).device
    try:
        output = model.eval()(image[None].to(device).requires_grad_(True))
    finally:
        hook.remove()
    scores, labels = output.masks, mask.to(device)
    if output.classes is not None:
        scores = output.class_map()[:, 1:]
    score = sum(scores[0, k][labels == k + 1].sum() for k in range(scores.shape[1]))
    (gradient,) = torch.autograd.grad(score, kept)
    weights = gradient.mean((1, 2), keepdim=True)
    heat = (weights * kept[0]).sum(-1).relu().detach()[:, None]  # (1, 1, H, W)
    heat = F.interpolate(heat, mask.shape, mode="bilinear")[0, 0]
    heat = heat - heat.min()
    colours = matplotlib.colormaps["jet"]((heat / heat.max().clamp_min(1e-7)).float().cpu().numpy())
    return (255 * colours[..., :3] / 2 + pixels / 2).round().astype(np.uint8)
