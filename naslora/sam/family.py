"""What naslora knows of a family of SAMs: the contract of the files in ``families/``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from naslora.sam.decoder import SegmentationDecoder
from naslora.sam.naming import HuggingFace, Naming, Tensors

PATCH_SIZE = 16
"""Side in pixels of the image patch of one token of the image embedding, for every encoder."""


@dataclass(frozen=True)
class Family:
    """A kind of SAM: one encoder and one decoder in several sizes.

    An encoder maps (B, 3, S, S) normalised images to the embedding (B, 256, S/16, S/16), or to a
    tuple of it and further maps, which the family's decoder takes.
    """

    title: str
    """What people call it, such as SAM 2.1."""
    models: Mapping[str, Any]
    """The sizes of its models by their names for ``--model``."""
    build_encoder: Callable[[str, int], nn.Module]
    """Maps a model's name and the image size S to an encoder with random weights."""
    build_decoder: Callable[[str, int, int], SegmentationDecoder]
    """Maps a model's name, the number of classes and the number of mask tokens to a decoder."""
    official: Naming
    """The names in the official checkpoints."""
    matches: Callable[[str, Tensors], bool]
    """Whether a checkpoint, under our names, was made for the model of a name."""
    huggingface: HuggingFace | None = None
    """How the transformers library stores it; None if it does not know it."""
    multiple: int = PATCH_SIZE
    """S is a multiple of this number of pixels."""
    fuses: bool = True
    """Whether ``fuse_attention`` has a faster attention for the encoder."""
    elsewhere: str | None = None
    """A regular expression for the starts of official names that our models lack, but the original
    code needs."""


def width_of(tensors: Tensors, positions: str, axis: int) -> int | None:
    """The channels of a checkpoint's position embedding of 4 axes; None if it has none.

    Args:
        tensors: the checkpoint, under our names.
        positions: the embedding's name.
        axis: the axis of its channels.
    """
    found = tensors.get(positions)
    return found.shape[axis] if found is not None and found.dim() == 4 else None


def depth_of(tensors: Tensors, blocks: str) -> int:
    """The number of transformer blocks in a checkpoint.

    Args:
        tensors: the checkpoint, under our names.
        blocks: the start of the blocks' names, such as ``image_encoder.blocks.``.
    """
    found = {name[len(blocks) :].split(".")[0] for name in tensors if name.startswith(blocks)}
    return len(found)
