"""What naslora knows of a family of SAMs: the contract of the files in ``families/``."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from naslora.sam.decoder import SegmentationDecoder
from naslora.sam.naming import HuggingFace, Naming


@dataclass(frozen=True)
class Family:
    """A kind of SAM: one encoder and one decoder in several sizes.

    An encoder maps (B, 3, S, S) normalised images to the embedding (B, 256, g, g), g = S/patch, or
    to a tuple of it and further maps, which the family's decoder takes. The map may
    have another number of channels, which the decoder's neck brings to 256.
    """

    title: str
    """What people call it, such as SAM 2.1."""
    models: Mapping[str, Any]
    """The sizes of its models by their names for ``--model``."""
    build_encoder: Callable[[str, int], nn.Module]
    """Maps a model's name and the image size S to an encoder with random weights."""
    has_marks: Callable[[Collection[str]], bool]
    """Whether a checkpoint with tensors of these names may be the family's, if the encoder fits."""
    build_decoder: Callable[[str, int, int], SegmentationDecoder] = lambda name, classes, tokens: (
        SegmentationDecoder(classes, tokens)
    )
    """Maps a model's name, the number of classes and the number of mask tokens to a decoder."""
    official: Naming = field(default_factory=Naming)
    """The names in the official checkpoints."""
    huggingface: HuggingFace | None = None
    """How the transformers library stores it; None if it does not know it."""
    patch: int = 16
    """Side in pixels of the image patch of one token of the embedding."""
    grid_multiple: int = 1
    """g is a multiple of this number of tokens."""
    image_size: int = 1024
    """S if the user gives none: what the official weights were made for."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """What the encoder's normalised images have subtracted, for RGB in [0, 255]; ImageNet's."""
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """What they are then divided by."""
    fuses: bool = True
    """Whether ``fuse_attention`` has a faster attention for the encoder."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Checkpoints of its models on the Hugging Face Hub, as ``--checkpoint`` takes them."""
    home: str = ""
    """Where its authors have the weights."""
    licence: str = "Apache-2.0"
    """The licence of the weights."""
    new_decoder: bool = False
    """Whether official checkpoints hold the encoder alone: other parts keep random weights."""
    elsewhere: str | None = None
    """A regular expression for the starts of official names that our models lack, but the original
    code needs."""

    @property
    def multiple(self) -> int:
        """S is a multiple of this number of pixels."""
        return self.patch * self.grid_multiple
