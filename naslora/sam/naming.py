"""Names of tensors: a model's own, those of its original code, and those of Hugging Face."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Naming:
    """Converts between our names and somebody else's. Names that neither knows stay as they are."""

    ours: Callable[[str], str]
    """Our name for one of theirs."""
    theirs: Callable[[str], str]
    """Their name for one of ours."""


def same_names() -> Naming:
    """The naming of code whose names we keep."""
    return Naming(str, str)


def by_prefix(*pairs: tuple[str, str]) -> Naming:
    """A naming by the starts of names.

    Args:
        pairs: our start and theirs; ``{}`` stands for any text without a dot. The first pair that
            fits a name replaces its start.
    """
    return Naming(
        ours=_replacing([(theirs, ours) for ours, theirs in pairs]), theirs=_replacing(pairs)
    )


def _replacing(pairs: Any) -> Callable[[str], str]:
    compiled = [(_pattern(old), new) for old, new in pairs]

    def replaced(name: str) -> str:
        for pattern, new in compiled:
            match = pattern.match(name)
            if match is not None:
                return new.format(*match.groups()) + name[match.end() :]
        return name

    return replaced


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile("([^.]+)".join(re.escape(part) for part in template.split("{}")))


def mlp_names(ours: str, theirs: str) -> tuple[tuple[str, str], ...]:
    """The pairs of a three-layer MLP of segment_anything and of Hugging Face."""
    parts = ("proj_in.", "layers.0.", "proj_out.")
    return tuple((f"{ours}layers.{i}.", f"{theirs}{part}") for i, part in enumerate(parts))


def part_names(ours: str, theirs: Mapping[int, str]) -> tuple[tuple[str, str], ...]:
    """The pairs of a numbered sequence whose parts have names at Hugging Face."""
    return tuple((f"{ours}{i}.", name) for i, name in theirs.items())


POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
PROMPTS_AND_DECODER = (
    (POSITIONS, "shared_image_embedding.positional_embedding"),
    (POSITIONS, "prompt_encoder.shared_embedding.positional_embedding"),
    ("prompt_encoder.point_embeddings.", "prompt_encoder.point_embed."),
    *part_names(
        "prompt_encoder.mask_downscaling.",
        {
            0: "prompt_encoder.mask_embed.conv1.",
            1: "prompt_encoder.mask_embed.layer_norm1.",
            3: "prompt_encoder.mask_embed.conv2.",
            4: "prompt_encoder.mask_embed.layer_norm2.",
            6: "prompt_encoder.mask_embed.conv3.",
        },
    ),
    (
        "mask_decoder.transformer.layers.{}.norm{}.",
        "mask_decoder.transformer.layers.{}.layer_norm{}.",
    ),
    (
        "mask_decoder.transformer.norm_final_attn.",
        "mask_decoder.transformer.layer_norm_final_attn.",
    ),
    *part_names(
        "mask_decoder.output_upscaling.",
        {
            0: "mask_decoder.upscale_conv1.",
            1: "mask_decoder.upscale_layer_norm.",
            3: "mask_decoder.upscale_conv2.",
        },
    ),
    *mlp_names("mask_decoder.iou_prediction_head.", "mask_decoder.iou_prediction_head."),
    *mlp_names(
        "mask_decoder.output_hypernetworks_mlps.{}.", "mask_decoder.output_hypernetworks_mlps.{}."
    ),
)
"""What all SAMs of Hugging Face have in common."""
PLAIN_VIT = (
    ("image_encoder.patch_embed.proj.", "vision_encoder.patch_embed.projection."),
    ("image_encoder.blocks.{}.norm{}.", "vision_encoder.layers.{}.layer_norm{}."),
    ("image_encoder.blocks.", "vision_encoder.layers."),
    *part_names(
        "image_encoder.neck.",
        {
            0: "vision_encoder.neck.conv1.",
            1: "vision_encoder.neck.layer_norm1.",
            2: "vision_encoder.neck.conv2.",
            3: "vision_encoder.neck.layer_norm2.",
        },
    ),
    ("image_encoder.", "vision_encoder."),
)
"""SAM's plain ViT."""


@dataclass(frozen=True)
class HuggingFace:
    """How a family is stored by the transformers library."""

    architecture: str
    """The class that loads it, such as SamModel."""
    kinds: tuple[str, ...]
    """The values of ``model_type`` in config.json; we write the first one."""
    naming: Naming
    config: Callable[[str, int], dict[str, Any]]
    """Maps the name of a model and its image size to config.json, without the two above."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Their names of tensors that are stored twice, by the name of the first."""
    stacked: Mapping[str, str] = field(default_factory=dict)
    """Their names of tensors whose rows are tensors of ours, with our names; ``{}`` is the row."""
    foreign: str = r"(?!)"
    """A regular expression for the starts of their names that their ``architecture`` lacks."""

    def to_ours(self, tensors: Tensors) -> dict[str, Tensor]:
        """Tensors under our names."""
        found = {}
        for name, tensor in tensors.items():
            if name in self.stacked and tensor.dim() > 1:
                rows = {self.stacked[name].format(i): row[None] for i, row in enumerate(tensor)}
                found.update(rows)
            else:
                found[self.naming.ours(name)] = tensor
        return found

    def to_theirs(self, tensors: Tensors) -> dict[str, Tensor]:
        """The inverse of ``to_ours``. Tensors that their architecture lacks are left out."""
        left, found = dict(tensors), {}
        for name, ours in self.stacked.items():
            rows = [left.pop(key) for key in sorted(left) if _pattern(ours).fullmatch(key)]
            found[name] = torch.cat(rows)
        found |= {self.naming.theirs(name): tensor for name, tensor in left.items()}
        found |= {copy: found[name].clone() for name, copy in self.copies.items()}
        return {k: v for k, v in found.items() if not re.match(self.foreign, k)}
