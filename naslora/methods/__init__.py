"""The fine-tuning methods that the paper compares, behind one interface.

``apply`` freezes an image encoder and adds what a method trains; ``trainable_parameters`` are the
parameters it trains, ``auxiliary_loss`` is what it adds to the loss, and ``merge`` folds it into
the frozen weights, or says why that cannot be done. Each method has a file of its own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from naslora.adapter.config import NASLoRAConfig
from naslora.adapter.injection import undone_on_error
from naslora.adapter.merging import MergeMode, MergeReport
from naslora.errors import UserError
from naslora.methods import (
    bitfit,
    conv_lora,
    decoder_only,
    full,
    mona,
    nas_lora,
    peft_lora,
    sam_adapter,
    vpt,
)


class Method(NamedTuple):
    """What a method tells about itself."""

    title: str
    """Its name in tables."""
    add: Callable[[nn.Module, NASLoRAConfig], None]
    """Adds to a frozen encoder, in place, what the method trains; only that requires gradients."""
    merge: Callable[..., MergeReport] | None = None
    """Folds it into the frozen weights, as ``naslora.merge``; None if that cannot be."""
    why_unmerged: str = ""
    """Why it cannot be folded."""
    fields: tuple[str, ...] = ()
    """Fields of the configuration that decide its output beside the trained tensors."""


LORA_FIELDS = ("rank", "lora_alpha")
# In the order in which tables name them.
METHODS: dict[str, Method] = {
    "full": Method("Full fine-tuning", full.add, why_unmerged=full.UNMERGED),
    "decoder-only": Method("Decoder only", decoder_only.add, why_unmerged=decoder_only.UNMERGED),
    "bitfit": Method("BitFit", bitfit.add, why_unmerged=bitfit.UNMERGED),
    "vpt": Method("VPT", vpt.add, why_unmerged=vpt.UNMERGED),
    "sam-adapter": Method("SAM-Adapter", sam_adapter.add, why_unmerged=sam_adapter.UNMERGED),
    "mona": Method("Mona", mona.add, why_unmerged=mona.UNMERGED),
    "lora": Method("LoRA", peft_lora.add_lora, peft_lora.merge, fields=LORA_FIELDS),
    "dora": Method("DoRA", peft_lora.add_dora, peft_lora.merge, fields=LORA_FIELDS),
    "vera": Method("VeRA", peft_lora.add_vera, peft_lora.merge),
    "conv-lora": Method(
        "Conv-LoRA", conv_lora.add, why_unmerged=conv_lora.UNMERGED, fields=LORA_FIELDS
    ),
    "nas-lora": Method("NAS-LoRA", nas_lora.add_full, nas_lora.merge, fields=nas_lora.FIELDS),
    "nas-pc-lora": Method("NAS-PC-LoRA", nas_lora.add, nas_lora.merge, fields=nas_lora.FIELDS),
}
MethodName = Literal[tuple(METHODS)]


@dataclass(frozen=True)
class Applied:
    """What ``apply`` did to an encoder; it leaves this there as the attribute ``method``."""

    name: str
    config: NASLoRAConfig
    tensors: tuple[str, ...]
    """What belongs to the method - trained parameters, buffers - by names in the encoder's state
    dict. Everything else is as it was before."""


def apply(name: str, model: nn.Module, config: NASLoRAConfig) -> None:
    """Freezes the image encoder and adds what a method trains, in place.

    Args:
        name: one of ``METHODS``.
        model: a model with an ``image_encoder``, of which nothing else changes; or the encoder.
        config: the adapters' settings, of which a method takes what concerns it; all that it draws
            comes from ``seed``.

    Raises:
        UserError: an unknown name, a model that has a method already, or a method that does not fit
            the encoder. The model is then unchanged.
    """
    if name not in METHODS:
        raise UserError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    present = applied(model)
    if present is not None:
        raise UserError(f"the model has a method already: {present.name}")
    encoder = image_encoder(model)
    with undone_on_error(encoder):
        before = {id(tensor) for tensor in encoder.state_dict(keep_vars=True).values()}
        modules = set(encoder.modules())
        encoder.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            METHODS[name].add(encoder, config)
        for module in set(encoder.modules()) - modules:
            module.training = encoder.training
        encoder.method = Applied(name, config, tuple(_own_tensors(encoder, before)))


def applied(model: nn.Module) -> Applied | None:
    """What ``apply`` did to the model; None if it did nothing."""
    return getattr(image_encoder(model), "method", None)


def image_encoder(model: nn.Module) -> nn.Module:
    """The model's image encoder, or the model, which is one."""
    return getattr(model, "image_encoder", model)


def own_names(model: nn.Module) -> set[str]:
    """What belongs to the applied method, by names in ``model.state_dict()``."""
    present = applied(model)
    prefix = "image_encoder." if image_encoder(model) is not model else ""
    return {prefix + name for name in present.tensors} if present else set()


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the encoder that the applied method trains, alpha included."""
    present = applied(model)
    names = set(present.tensors) if present else ()
    encoder = image_encoder(model)
    return [parameter for name, parameter in encoder.named_parameters() if name in names]


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """What the last forward adds to the loss in training, to be asked for once; None if nothing."""
    balance = getattr(image_encoder(model), "balance", None)
    return balance.take() if balance is not None else None


def searches(name: str, config: NASLoRAConfig) -> bool:
    """Whether the method has architecture parameters alpha to search with."""
    return name == "nas-lora" or (name == "nas-pc-lora" and config.cell_channels > 0)


def merge_modes(name: str, config: NASLoRAConfig) -> list[str]:
    """The ways of merging that differ for a method; none if it cannot be merged."""
    if METHODS[name].merge is None:
        return []
    return nas_lora.merge_modes(config) if name.startswith("nas-") else ["exact"]


def merge(
    model: nn.Module, mode: MergeMode = "exact", calibration: Iterable[Any] | None = None
) -> MergeReport:
    """Folds the applied method into the frozen weights, in place; ``naslora.unmerge`` undoes it.

    LoRA, DoRA and VeRA become the nn.Linear layers that were there before, exactly in every mode.

    Args:
        model: a model that ``apply`` or ``naslora.inject`` adapted.
        mode: what becomes of a searched cell, as in ``naslora.adapter.merging.merge``.
        calibration: batches on which to measure errors, as there.

    Raises:
        UserError: as there; the method cannot be merged, and why.
    """
    check_merges(model)
    present = applied(model)
    fold = METHODS[present.name].merge if present else nas_lora.merge
    return fold(model, mode, calibration)


def check_merges(model: nn.Module) -> None:
    """Refuses a model whose method cannot be merged.

    Raises:
        UserError: and why it cannot.
    """
    present = applied(model)
    if present is not None and METHODS[present.name].merge is None:
        method = METHODS[present.name]
        raise UserError(f"{method.title} cannot be merged: {method.why_unmerged}")


def _own_tensors(encoder: nn.Module, before: set[int]) -> list[str]:
    """Names in the state dict of what is new, what trains, and statistics of norms that train."""

    def trains(buffer: str) -> bool:
        own = list(encoder.get_submodule(buffer.rpartition(".")[0]).parameters(recurse=False))
        return bool(own) and all(parameter.requires_grad for parameter in own)

    state = encoder.state_dict(keep_vars=True)
    statistics = {name for name, _ in encoder.named_buffers() if trains(name)}
    return [
        name
        for name, tensor in state.items()
        if id(tensor) not in before or tensor.requires_grad or name in statistics
    ]
