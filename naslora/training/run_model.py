"""The model of a run: built, adapted, and its parameters counted."""

import os

from naslora.adapter.injection import arch_parameters
from naslora.errors import UserError
from naslora.methods import (
    apply,
    trainable_parameters,
)
from naslora.sam.encoders import checkpoint_blocks
from naslora.sam.segmentation import SamForSegmentation, build_model
from naslora.training.run_config import RunConfig
from naslora_kernels import available_backends
from naslora_kernels.backends import ENVIRONMENT_VARIABLE


def build_adapted_model(config: RunConfig) -> SamForSegmentation:
    """The model of a run before training: pre-trained weights, fresh adapter, decoder trainable.

    Raises:
        UserError: as ``build_model`` and ``apply``; the kernel backend cannot be used here.
    """
    check_backend(config.adapter.backend or os.environ.get(ENVIRONMENT_VARIABLE) or None)
    seed = config.adapter.seed
    model = build_model(
        config.model, config.image_size, config.num_classes, config.checkpoint, seed
    )
    apply(config.method, model, config.adapter)
    if config.search.gradient_checkpointing:
        checkpoint_blocks(model.image_encoder)
    return model


def check_backend(name: str | None) -> None:
    backends = available_backends()
    if name is None or (name in backends and backends[name] is None):
        return
    reason = f"cannot be used here: {backends[name]}" if name in backends else "does not exist"
    usable = ", ".join(known for known, reason in backends.items() if reason is None)
    raise UserError(f"backend {name!r} {reason}; choose one of {usable}, or give none")


def count_parameters(model: SamForSegmentation) -> dict[str, int]:
    """Numbers of parameters: frozen, decoder, adapter (what the method trains in the encoder, but
    for alpha) and architecture (alpha)."""
    architecture = sum(p.numel() for p in arch_parameters(model))
    adapter = sum(p.numel() for p in trainable_parameters(model)) - architecture
    decoder = sum(p.numel() for p in model.mask_decoder.parameters())
    everything = sum(p.numel() for p in model.parameters())
    return {
        "frozen": everything - decoder - adapter - architecture,
        "decoder": decoder,
        "adapter": adapter,
        "architecture": architecture,
    }
