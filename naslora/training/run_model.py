"""The model of a run: built, adapted, its parameters counted, its embeddings kept on disk."""

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from naslora.adapter.layer.modules import arch_parameters
from naslora.data.cache import Cache
from naslora.errors import UserError
from naslora.methods import apply, trainable_parameters
from naslora.results import ParameterCounts
from naslora.sam.encoders import checkpoint_blocks, set_channels, stem
from naslora.sam.precision import DTYPES
from naslora.sam.prompts import AnySam, build_promptable
from naslora.sam.segmentation import build_model
from naslora.training.run_config import RunConfig, TrainConfig
from naslora_kernels import available_backends
from naslora_kernels.backends import ENVIRONMENT_VARIABLE


def frozen_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype of the encoder's frozen weights while training."""
    return DTYPES[config.frozen_precision or config.mixed_precision or "no"]


def build_adapted_model(config: RunConfig) -> AnySam:
    """Builds the model of a run before training.

    Its encoder has the pre-trained weights, frozen, and a fresh adapter. Its decoder is trainable.
    Errors as in ``build_frozen_model`` and ``apply``.
    """
    model = build_frozen_model(config)
    apply(config.method, model, config.adapter, config.seed)
    if len(config.data.channels) not in (0, 3):
        stem(model.image_encoder).requires_grad_(True)
    if config.training.gradient_checkpointing:
        checkpoint_blocks(model.image_encoder)
    return model


def build_frozen_model(config: RunConfig) -> AnySam:
    """Builds the model of a run without its adapter.

    Raises:
        UserError: as ``build_model``; the kernel backend cannot be used here.
    """
    backend = getattr(config.adapter, "backend", None) or os.environ.get(ENVIRONMENT_VARIABLE)
    if backend:
        reasons = available_backends()
        reason = reasons.get(backend, "it does not exist")
        if reason is not None:
            usable = ", ".join(name for name, reason in reasons.items() if reason is None)
            raise UserError(
                f"backend {backend!r} cannot be used here: {reason}; choose one of {usable}, or "
                "give none"
            )
    return build_run_model(config)


def build_run_model(config: RunConfig, checkpoint: str | None = None) -> AnySam:
    """Builds the model of a run's task with the weights of a checkpoint, None for its own, as
    ``build_model``."""
    own, size, data = config.model, config.model.image_size, config.data
    rest = checkpoint or own.checkpoint, config.seed, own.attention
    if config.task == "semantic":
        semantic = build_model(own.name, size, data.num_classes, *rest)
        if data.channel_mean is not None and data.channel_std is not None:
            set_channels(semantic, data.channel_mean, data.channel_std)
        return semantic
    model = build_promptable(own.name, size, *rest)
    model.prompt_encoder.requires_grad_(config.prompts.train_prompt_encoder)
    return model


def count_parameters(model: AnySam) -> ParameterCounts:
    """Counts the parameters by part of the model."""
    architecture = sum(p.numel() for p in arch_parameters(model))
    trained = {*trainable_parameters(model), *stem(model.image_encoder).parameters()}
    adapter = sum(p.numel() for p in trained if p.requires_grad) - architecture
    parts = (model.mask_decoder, model.prompt_encoder)
    decoder = sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    frozen = everything - decoder - adapter - architecture
    return ParameterCounts(frozen, decoder, adapter, architecture)


def keep_embeddings(encoder: nn.Module, cache: Cache, how: str) -> None:
    """Makes an encoder read the maps of an image that it has seen before, in any run.

    The frozen encoder is changed in place. ``how`` names the weights, and all else but the image
    that the maps depend on.
    """
    forward: Any = encoder.forward

    @torch.no_grad()
    def kept(images: Tensor) -> Any:
        autocast = torch.is_autocast_enabled(images.device.type)

        def maps_of(image: Tensor) -> list[Tensor]:
            found = forward(image[None])
            return [part.cpu() for part in (found if isinstance(found, tuple) else (found,))]

        batch = []
        for image in images:
            content = image.cpu().contiguous().view(torch.uint8).numpy().tobytes()
            batch.append(cache.get([content], f"{how} {autocast}", partial(maps_of, image)))
        found = tuple(torch.cat(part).to(images.device) for part in zip(*batch, strict=True))
        return found if len(found) > 1 else found[0]

    encoder.forward = kept  # type: ignore[method-assign]
