"""The fine-tuning methods that the paper compares, behind one interface.

``METHODS`` lists them. A method's file holds all that the software knows of it: its configuration,
its layers, and its ``Method`` entry. ``apply`` freezes an image encoder and adds what a method
trains. ``trainable_parameters``, ``auxiliary_loss`` and ``merge`` ask the record that ``apply``
leaves on the encoder.
"""

import dataclasses
from typing import TYPE_CHECKING, Literal

from naslora.adapter.io.loading import load_adapter
from naslora.adapter.layer.applied import (
    METHODS,
    Applied,
    Method,
    applied,
    auxiliary_loss,
    find_method,
    trainable_parameters,
)
from naslora.adapter.layer.config import MethodConfig
from naslora.adapter.layer.injection import apply
from naslora.adapter.merging.merge import merge
from naslora.adapter.merging.report import MergeMode
from naslora.methods import conv_lora, mona, nas_lora, own_weights, peft_lora, sam_adapter, vpt

__all__ = [
    "METHODS",
    "Applied",
    "Method",
    "MethodName",
    "applied",
    "apply",
    "auxiliary_loss",
    "configure",
    "find_method",
    "load_adapter",
    "merge",
    "merge_modes",
    "searches",
    "trainable_parameters",
]

METHODS.update(
    (method.name, method)
    for method in (
        own_weights.FULL,
        own_weights.DECODER_ONLY,
        own_weights.BITFIT,
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
)
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
    method, default = find_method(name), default or type(shared)()
    changed = {
        field.name: getattr(shared, field.name)
        for field in dataclasses.fields(method.config)
        if (type(shared) is method.config or not field.metadata.get("own"))
        and getattr(shared, field.name, None) != getattr(default, field.name, None)
    }
    return dataclasses.replace(method.checked(start), **changed)


def searches(name: str, config: MethodConfig | None = None) -> bool:
    """Whether a method has architecture parameters alpha to search. Arguments as ``apply``."""
    method = find_method(name)
    config = method.checked(config)
    return method.searches is not None and method.searches(config)


def merge_modes(name: str, config: MethodConfig | None = None) -> list[MergeMode]:
    """The modes of merging a method whose results differ; empty if it cannot be merged.

    Arguments as ``apply``.
    """
    method = find_method(name)
    config = method.checked(config)
    return [] if isinstance(method.merge, str) else method.merge.modes(config)
