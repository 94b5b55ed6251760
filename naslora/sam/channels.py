"""Images of other channels than RGB: the encoder's first convolution, and the normalisation."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import nn


def stem(encoder: nn.Module) -> nn.Conv2d:
    """The convolution of an image encoder that sees the image: its first one."""
    return next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))


def set_channels(model: Any, mean: Sequence[float], std: Sequence[float]) -> None:
    """Makes a model take images of C channels, in place.

    The kernels of the three colours repeat over the channels, scaled by 3/C, or are summed for one
    channel, as timm does it. So an image whose channels are alike gives what its grey copy in RGB
    gave. Three channels keep the convolution.

    Args:
        model: a model with ``image_encoder``, ``pixel_mean`` and ``pixel_std``, for three channels.
        mean: C values in [0, 1], which are subtracted from images in [0, 1].
        std: C values by which the difference is divided.
    """
    first, count = stem(model.image_encoder), len(mean)
    first.weight = nn.Parameter(adapt_input_conv(count, first.weight.data), requires_grad=False)
    first.in_channels = count
    for name, values in (("pixel_mean", mean), ("pixel_std", std)):
        setattr(model, name, torch.tensor(values).view(count, 1, 1))
