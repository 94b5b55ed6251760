"""SAM's image encoders and its prompt encoder, built for any image size.

Each family of SAMs has a file in ``families/``.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from segment_anything.modeling import PromptEncoder
from torch import nn
from torch.utils.checkpoint import checkpoint

from naslora.errors import UserError
from naslora.sam.decoder import EMBED_DIM
from naslora.sam.families import find_family
from naslora.sam.family import PATCH_SIZE

LARGEST_IMAGE = 4096
"""Largest side of an image in pixels: 65,536 tokens."""


def build_image_encoder(name: str, image_size: int) -> nn.Module:
    """Builds an image encoder with random weights.

    The encoder maps (B, 3, S, S) normalised images to (B, 256, S/16, S/16), or to a tuple of it and
    the further maps that its family's decoder takes.

    Args:
        name: one of ``naslora.sam.families.MODELS``.
        image_size: S in pixels, a positive multiple of 16, and of 32 for SAM 2.

    Raises:
        UserError: the name is unknown, or the size is not a multiple that the family can take.
    """
    family = find_family(name)
    if image_size < family.multiple or image_size % family.multiple:
        reason = "" if family.multiple == PATCH_SIZE else f" for {family.title}"
        raise UserError(
            f"image_size must be a positive multiple of {family.multiple}{reason}, got {image_size}"
        )
    if image_size > LARGEST_IMAGE:
        raise UserError(f"image_size must be at most {LARGEST_IMAGE} pixels, got {image_size}")
    return family.build_encoder(name, image_size)


def build_prompt_encoder(image_size: int) -> PromptEncoder:
    """Builds SAM's prompt encoder, which provides the no-mask embedding and the positions.

    Args:
        image_size: side of the images in pixels, a multiple of 16.
    """
    grid = image_size // PATCH_SIZE
    return PromptEncoder(EMBED_DIM, (grid, grid), (image_size, image_size), mask_in_chans=16)


def transformer_blocks(encoder: Any) -> list[nn.Module]:
    """The blocks of an encoder of ``build_image_encoder``, in their order."""
    own: Iterable[nn.Module]
    own = encoder.transformer_blocks() if hasattr(encoder, "transformer_blocks") else encoder.blocks
    return list(own)


def checkpoint_blocks(encoder: nn.Module) -> None:
    """Makes the backward recompute each transformer block instead of keeping its activations.

    Args:
        encoder: an encoder of ``build_image_encoder``; it is changed in place.
    """
    for block in transformer_blocks(encoder):
        forward: Any = block.forward
        block.forward = partial(checkpoint, forward, use_reentrant=False)  # type: ignore[method-assign]
