"""The fine-tuning methods that the paper compares, behind one interface.

``METHODS`` lists them. A method's file holds all that the software knows of it: its configuration,
its layers, and its ``Method`` entry. ``apply`` freezes an image encoder and adds what a method
trains. ``trainable_parameters``, ``auxiliary_loss`` and ``merge`` ask the record that ``apply``
leaves on the encoder.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn

from naslora.adapter.io import loading
from naslora.adapter.io.base_state import override_save_pretrained
from naslora.adapter.layer.applied import (
    Applied,
    Method,
    applied,
    apply_method,
    auxiliary_loss,
    find_method,
    trainable_parameters,
)
from naslora.adapter.layer.config import MethodConfig
from naslora.adapter.merging.merge import check_merges, merge
from naslora.adapter.merging.report import MergeMode
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
from naslora.settings import Seed, checked

__all__ = [
    "METHODS",
    "Applied",
    "Method",
    "MethodName",
    "applied",
    "apply",
    "auxiliary_loss",
    "check_merges",
    "configure",
    "load_adapter",
    "merge",
    "merge_modes",
    "searches",
    "trainable_parameters",
]

# In the order of rows in tables.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        full.METHOD,
        decoder_only.METHOD,
        bitfit.METHOD,
        vpt.METHOD,
        sam_adapter.METHOD,
        mona.METHOD,
        peft_lora.LORA,
        peft_lora.DORA,
        peft_lora.VERA,
        conv_lora.METHOD,
        nas_lora.NAS_LORA,
        nas_lora.NAS_PC_LORA,
    )
}
if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]  # the command line shows the choices


def configure(
    name: str,
    shared: MethodConfig,
    default: MethodConfig | None = None,
    start: MethodConfig | None = None,
) -> MethodConfig:
    """The configuration of a method beside another one's, for comparisons.

    Args:
        name: one of ``METHODS``.
        shared: the other method's. Its fields that differ from ``default`` are taken, if the method
            has them. VeRA has a rank of its own.
        default: of the same type; None for its defaults.
        start: where the other fields come from; None for the method's defaults.

    Raises:
        UserError: an unknown name, or ``start`` is a configuration of another method.
    """
    method, default = find_method(METHODS, name), default or type(shared)()
    changed = {
        field.name: getattr(shared, field.name)
        for field in dataclasses.fields(method.config)
        if (type(shared) is method.config or not field.metadata.get("own"))
        and getattr(shared, field.name, None) != getattr(default, field.name, None)
    }
    return dataclasses.replace(method.checked(start), **changed)


def apply(name: str, model: nn.Module, config: MethodConfig | None = None, seed: int = 0) -> None:
    """Freezes the image encoder and adds what a method trains, in place.

    Args:
        name: one of ``METHODS``.
        model: a model with an ``image_encoder``, of which nothing else changes; or the encoder.
        config: the method's own configuration; None for its defaults.
        seed: of every random number.

    Raises:
        UserError: an unknown name, another method's configuration, a model that has a method
            already, or an encoder that the method does not support. The model is then unchanged.
    """
    apply_method(find_method(METHODS, name), model, config, checked("seed", seed, Seed))
    override_save_pretrained(model)


def load_adapter(model: nn.Module, directory: str | Path, check_base: bool = True) -> None:
    """Loads what ``save_adapter`` saved, exactly. A model without adapters gets them first.

    Adding adapters freezes what ``apply`` or ``inject`` freezes. To train on, unfreeze it again.

    Args:
        model: the model that was adapted, in its adapted or in its original form.
        directory: the folder that ``save_adapter`` wrote.
        check_base: whether the frozen weights must be those that the adapter was trained on.
            Weights cast to bfloat16 count as equal, those cast to float16 do not.

    Raises:
        UserError: a file is missing or damaged, or does not fit the model. The message lists the
            mismatches. The model is then unchanged.
    """
    loading.load_adapter(model, directory, METHODS, check_base)


def searches(name: str, config: MethodConfig | None = None) -> bool:
    """Whether a method has architecture parameters alpha to search. Arguments as ``apply``."""
    method = find_method(METHODS, name)
    return method.searches(method.checked(config))


def merge_modes(name: str, config: MethodConfig | None = None) -> list[MergeMode]:
    """The modes of merging a method whose results differ; empty if it cannot be merged.

    Arguments as ``apply``.
    """
    method = find_method(METHODS, name)
    return method.merge_modes(method.checked(config))
