"""SAM's image encoders and its prompt encoder, for any image size, and for other channels than RGB.

Each family of SAMs has a file in ``families/``.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from segment_anything.modeling import PromptEncoder
from timm.models import adapt_input_conv
from torch import nn
from torch.utils.checkpoint import checkpoint

from naslora.errors import UserError
from naslora.sam.decoder import EMBED_DIM
from naslora.sam.families import find_family
from naslora.sam.family import Family

LARGEST_IMAGE = 4096
"""Largest side of an image in pixels: 65,536 tokens."""


def build_image_encoder(name: str, image_size: int) -> nn.Module:
    """Builds an image encoder with random weights.

    The encoder maps (B, 3, S, S) normalised images to (B, 256, g, g), or to a tuple of it and the
    further maps that its family's decoder takes. g is S divided by the family's patch.

    Args:
        name: one of ``naslora.sam.families.MODELS``.
        image_size: S in pixels, a positive multiple of the family's ``multiple``.

    Errors as ``find_family`` and ``check_image_size``.
    """
    family = find_family(name)
    check_image_size(family, image_size)
    return family.build_encoder(name, image_size)


def check_image_size(family: Family, image_size: int) -> None:
    """Refuses sides of images, in pixels, that a family's encoder cannot take.

    Raises:
        UserError: the size is out of range or no multiple of the family's.
    """
    if image_size > LARGEST_IMAGE:
        raise UserError(f"image_size must be at most {LARGEST_IMAGE} pixels, got {image_size}")
    step = family.multiple
    if image_size < step or image_size % step:
        below = image_size // step * step
        near = " or ".join(str(n) for n in (below, below + step) if 0 < n <= LARGEST_IMAGE)
        raise UserError(
            f"image_size must be a positive multiple of {step} for {family.title}, got "
            f"{image_size}; choose {near or step}"
        )


def build_prompt_encoder(family: Family, image_size: int) -> PromptEncoder:
    """Builds SAM's prompt encoder, frozen: it provides the no-mask embedding and the positions."""
    grid = image_size // family.patch
    encoder = PromptEncoder(EMBED_DIM, (grid, grid), (image_size, image_size), mask_in_chans=16)
    return encoder.requires_grad_(False)


def transformer_blocks(encoder: nn.Module) -> list[nn.Module]:
    """The blocks of an encoder of ``build_image_encoder``, in their order.

    They are in lists called ``blocks`` or ``layers``. Those of TinyViT's first stage are
    convolutions.
    """
    lists = (m for name, m in encoder.named_modules() if re.search(r"(^|\.)(blocks|layers)$", name))
    return [block for own in lists for block in own.children()]


def checkpoint_blocks(encoder: nn.Module) -> None:
    """Makes the backward recompute each transformer block instead of keeping its activations.

    The encoder, of ``build_image_encoder``, is changed in place.
    """
    for block in transformer_blocks(encoder):
        forward: Any = block.forward
        block.forward = partial(checkpoint, forward, use_reentrant=False)  # type: ignore[method-assign]


def stem(encoder: nn.Module) -> nn.Conv2d:
    """The convolution of an image encoder that sees the image: its first one."""
    return next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))


def set_channels(model: Any, mean: Sequence[float], std: Sequence[float]) -> None:
    """Makes a model take images of C channels, in place.

    The kernels of the three colours repeat over the channels, scaled by 3/C, or are summed for one
    channel, as timm does it. So an image whose channels are alike gives what its grey copy in RGB
    gave. Three channels keep the convolution. ``mean`` and ``std`` are C values each: images in
    [0, 1] have the one subtracted, and are then divided by the other.
    """
    first, count = stem(model.image_encoder), len(mean)
    first.weight = nn.Parameter(adapt_input_conv(count, first.weight.data), requires_grad=False)
    first.in_channels = count
    for name, values in (("pixel_mean", mean), ("pixel_std", std)):
        setattr(model, name, torch.tensor(values).view(count, 1, 1))
