"""SAM for semantic segmentation: frozen encoder, constant prompts, trainable mask decoder."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora.adapter.layer.modules import keep_frozen
from naslora.errors import UserError
from naslora.sam.attention import Attention, fuse_attention
from naslora.sam.checkpoint import load_sam_checkpoint
from naslora.sam.encoders import build_image_encoder, build_prompt_encoder
from naslora.sam.families import find_family
from naslora.sam.family import Family
from naslora.sam.shipped import find_checkpoint

Model = TypeVar("Model")
MULTICLASS_TOKENS = 10
"""Number of mask tokens for several classes; for more than 10 classes as many as classes."""


@dataclass
class SegmentationOutput:
    """Prediction for B images of S x S pixels, with Q mask tokens and K classes."""

    masks: Tensor
    """(B, Q, S, S) mask logits, upsampled bilinearly to the image size; Q = 1 if binary."""
    classes: Tensor | None
    """(B, Q, K + 1) class logits of the mask tokens, "no object" last; None if binary."""
    mean: Tensor | None = None
    """(B, K, S, S) class map over an image and its mirror images, if these were computed."""

    def class_map(self) -> Tensor:
        """Computes the scores of the classes at each pixel.

        Returns:
            (B, K, S, S) float32. Binary: K = 1, the probability of the foreground. Several classes:
            the paper's class map, sum_q softmax(classes)_qk sigmoid(masks)_q.
        """
        if self.mean is not None:
            return self.mean
        masks = self.masks.float().sigmoid()
        if self.classes is None:
            return masks
        classes = self.classes.float().softmax(-1)[..., :-1]
        return torch.einsum("bqk,bqhw->bkhw", classes, masks)


def mirror(model: nn.Module, axes: list[list[int]]) -> None:
    """Makes a ``SamForSegmentation`` also see mirror images, in place, for scoring.

    Masks and classes stay those of the image alone. ``axes`` are of each mirror image the axes of
    (B, C, S, S) that are reversed.
    """

    def averaged(_: Any, inputs: tuple[Tensor], own: SegmentationOutput) -> SegmentationOutput:
        (images,) = inputs
        maps = [own.class_map()]
        maps += [model.forward(images.flip(turn)).class_map().flip(turn) for turn in axes]
        return SegmentationOutput(own.masks, own.classes, torch.stack(maps).mean(0))

    model.register_forward_hook(averaged)


def labels_of(class_map: Tensor, threshold: float = 0.5) -> Tensor:
    """Converts a class map, (B, K, H, W) scores, to (B, H, W) int64 labels.

    K = 1: 1 where the score exceeds the threshold, else 0. K > 1: the class with the highest score.
    """
    return (class_map[:, 0] > threshold).long() if class_map.shape[1] == 1 else class_map.argmax(1)


class SamForSegmentation(nn.Module):
    """SAM without prompts from a user. Only the mask decoder is trainable.

    Frozen batch norms of the encoder stay in evaluation mode, also after ``train()``.

    Args:
        name: one of ``naslora.sam.families.MODELS``.
        image_size: side S of the square images in pixels, as in ``build_image_encoder``.
        num_classes: 1 for binary segmentation, else K, with the background as class 0.

    Attributes:
        left_out: tensors of the SAM checkpoint that the model lacks or has in another size, for
            ``sam_state_dict``.

    Raises:
        UserError: an argument is out of range.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, name: str, image_size: int = 1024, num_classes: int = 1) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(f"num_classes must be at least 1, got {num_classes}")
        self.name = name
        self.image_size = image_size
        self.num_classes = num_classes
        self.left_out: dict[str, Tensor] = {}
        self.image_encoder = build_image_encoder(name, image_size).requires_grad_(False)
        keep_frozen(self.image_encoder)
        self.prompt_encoder = build_prompt_encoder(self.family, image_size)
        tokens = max(MULTICLASS_TOKENS, num_classes) if num_classes > 1 else 1
        self.mask_decoder = self.family.build_decoder(name, num_classes, tokens)
        for part, values in (("pixel_mean", self.family.mean), ("pixel_std", self.family.std)):
            own = torch.tensor([value / 255 for value in values])  # of images in [0, 1]
            self.register_buffer(part, own.view(3, 1, 1), persistent=False)

    @property
    def family(self) -> Family:
        """The family of SAMs that the model belongs to."""
        return find_family(self.name)

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Segments (B, C, S, S) images in [0, 1]: RGB, or as ``set_channels`` says.

        Raises:
            ValueError: the images have another shape.
        """
        size, channels = (self.image_size, self.image_size), len(self.pixel_mean)
        if images.dim() != 4 or images.shape[1:] != (channels, *size):
            expected = f"(B, {channels}, {size[0]}, {size[1]})"
            raise ValueError(f"images: expected {expected}, got {tuple(images.shape)}")
        encoded = self.image_encoder((images - self.pixel_mean) / self.pixel_std)
        embedding, *features = (encoded,) if isinstance(encoded, Tensor) else encoded
        positions = self.prompt_encoder.get_dense_pe()
        no_mask = self.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        masks, classes = self.mask_decoder(embedding, positions, no_mask, *features)
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
        return SegmentationOutput(masks, classes)


def build_model(
    name: str,
    image_size: int,
    num_classes: int = 1,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    attention: Attention = "stock",
) -> SamForSegmentation:
    """Builds SAM for segmentation and loads a checkpoint.

    Args:
        name: as in ``SamForSegmentation``, and so are ``image_size`` and ``num_classes``.
        checkpoint: as ``path`` of ``load_sam_checkpoint``; "none" keeps random weights. None loads
            the weights in the package, which it has for ``vit_t``, and keeps random weights for the
            others.
        seed: seed of the random weights. The global random state is not changed.
        attention: "fused" calls ``fuse_attention`` for the image encoder of a family that gains
            from it.

    Errors as ``SamForSegmentation``, ``find_checkpoint`` and ``load_sam_checkpoint``.
    """
    make = partial(SamForSegmentation, name, image_size, num_classes)
    return made(make, checkpoint, seed, attention)


def made(
    make: Callable[[], Model], checkpoint: str | Path | None, seed: int, attention: Attention
) -> Model:
    """The model that ``make`` builds, with the weights of a checkpoint. Arguments and errors as
    ``build_model``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = make()
    path = find_checkpoint(model.name, checkpoint)
    if path is not None:
        load_sam_checkpoint(model, path)
    if attention == "fused" and model.family.fuses:
        fuse_attention(model.image_encoder)
    return model


@torch.no_grad()
def predict_labels(model: SamForSegmentation, images: Tensor) -> Tensor:
    """The (B, S, S) int64 labels, on the CPU, of (B, C, S, S) images in [0, 1] on any device.

    The model is set to evaluation mode.
    """
    return labels_of(model.eval()(images.to(model.pixel_mean.device)).class_map()).cpu()
