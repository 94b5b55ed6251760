"""Names of tensors: a model's own, those of its original code, and those of Hugging Face."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Pairs = tuple[tuple[str, str], ...]
"""Our parts of names and theirs."""


@dataclass(frozen=True)
class Naming:
    """Converts between our names and somebody else's. Names that neither knows stay as they are."""

    starts: Pairs = ()
    """Starts of names; ``{}`` stands for any text without a dot. The first pair that fits a name
    replaces its start."""
    ends: Pairs = ()
    """Ends of names."""
    foreign: str = r"(?!)"
    """A regular expression for the starts of their names of tensors that ``to_ours`` leaves out."""

    def ours(self, name: str) -> str:
        """Our name for one of theirs."""
        return self._replaced(name, 1, 0)

    def theirs(self, name: str) -> str:
        """Their name for one of ours."""
        return self._replaced(name, 0, 1)

    def to_ours(self, tensors: Tensors) -> dict[str, Tensor]:
        """Tensors under our names."""
        own = ((name, t) for name, t in tensors.items() if not re.match(self.foreign, name))
        return {self.ours(name): tensor for name, tensor in own}

    def to_theirs(self, tensors: Tensors) -> dict[str, Tensor]:
        """Tensors under their names."""
        return {self.theirs(name): tensor for name, tensor in tensors.items()}

    def _replaced(self, name: str, old: int, new: int) -> str:
        for pair in self.starts:
            if match := _pattern(pair[old]).match(name):
                name = pair[new].format(*match.groups()) + name[match.end() :]
                break
        for pair in self.ends:
            if name.endswith(pair[old]):
                name = name.removesuffix(pair[old]) + pair[new]
        return name


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile("([^.]+)".join(re.escape(part) for part in template.split("{}")))


def parts(ours: str, theirs: str, names: Mapping[int, str]) -> Pairs:
    """The pairs of a numbered sequence whose parts have names at Hugging Face."""
    return tuple((f"{ours}{i}.", f"{theirs}{name}.") for i, name in names.items())


def mlp(ours: str, theirs: str) -> Pairs:
    """The pairs of a three-layer MLP."""
    return parts(f"{ours}layers.", theirs, {0: "proj_in", 1: "layers.0", 2: "proj_out"})


POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
POSITIONS_TWICE = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)
"""Hugging Face stores the positional encoding twice."""
_LAYERS, _HYPER = "mask_decoder.transformer.layers.{}.", "mask_decoder.output_hypernetworks_mlps"
PROMPTS_AND_DECODER: Pairs = (
    *((POSITIONS, name) for name in POSITIONS_TWICE),
    ("prompt_encoder.point_embeddings.", "prompt_encoder.point_embed."),
    *parts(
        "prompt_encoder.mask_downscaling.",
        "prompt_encoder.mask_embed.",
        {0: "conv1", 1: "layer_norm1", 3: "conv2", 4: "layer_norm2", 6: "conv3"},
    ),
    (f"{_LAYERS}norm{{}}.", f"{_LAYERS}layer_norm{{}}."),
    (
        "mask_decoder.transformer.norm_final_attn.",
        "mask_decoder.transformer.layer_norm_final_attn.",
    ),
    *parts(
        "mask_decoder.output_upscaling.",
        "mask_decoder.upscale_",
        {0: "conv1", 1: "layer_norm", 3: "conv2"},
    ),
    *mlp("mask_decoder.iou_prediction_head.", "mask_decoder.iou_prediction_head."),
    *mlp(f"{_HYPER}.{{}}.", f"{_HYPER}.{{}}."),
)
"""What all SAMs of Hugging Face have in common."""
PLAIN_VIT: Pairs = (
    ("image_encoder.patch_embed.proj.", "vision_encoder.patch_embed.projection."),
    ("image_encoder.blocks.{}.norm{}.", "vision_encoder.layers.{}.layer_norm{}."),
    ("image_encoder.blocks.", "vision_encoder.layers."),
    *parts(
        "image_encoder.neck.",
        "vision_encoder.neck.",
        {0: "conv1", 1: "layer_norm1", 2: "conv2", 3: "layer_norm2"},
    ),
    ("image_encoder.", "vision_encoder."),
)
"""SAM's plain ViT."""


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Naming):
    """How a family is stored by the transformers library."""

    architecture: str
    """The class that loads it, such as SamModel."""
    kind: str
    """``model_type`` in config.json."""
    config: Callable[[str, int], dict[str, Any]]
    """Maps the name of a model and its image size to config.json, without the two above."""
    stacked: Mapping[str, str] = field(default_factory=dict)
    """Their names of tensors whose rows are tensors of ours, with our names; ``{}`` is the row."""

    def to_ours(self, tensors: Tensors) -> dict[str, Tensor]:
        """Tensors under our names, without those that their architecture lacks."""
        # SAM 3's model of videos has the prefix.
        left = {name.removeprefix("tracker_model."): tensor for name, tensor in tensors.items()}
        found: dict[str, Tensor] = {}
        for name, ours in self.stacked.items():
            if name in left and left[name].dim() > 1:
                found |= {ours.format(i): row[None] for i, row in enumerate(left.pop(name))}
        return found | super().to_ours(left)

    def to_theirs(self, tensors: Tensors) -> dict[str, Tensor]:
        """The inverse of ``to_ours``. Tensors that their architecture lacks are left out."""
        left, found = dict(tensors), {}
        for name, ours in self.stacked.items():
            rows = [left.pop(key) for key in sorted(left) if _pattern(ours).fullmatch(key)]
            found[name] = torch.cat(rows)
        found |= super().to_theirs(left)
        first, copy = POSITIONS_TWICE
        found[copy] = found[first].clone()
        return {k: v for k, v in found.items() if not re.match(self.foreign, k)}
