"""Finds NAS-LoRA layers in a model, replaces modules, and restores a model after an error."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from naslora.adapter.layer.calls import host_calls
from naslora.adapter.layer.layer import NASLoRALinear

NAMED = "named_adapters"
"""Attribute of a model with several adapters; copies and pickles of the model contain it."""


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, NASLoRALinear]]:
    """The model's NAS-LoRA layers with their names, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, NASLoRALinear):
            yield name, module


def draw_channels(model: nn.Module, seed: int, epoch: int) -> None:
    """Draws the channels of layers with ``channel_selection="resample"``, in place.

    The draw depends on the seed, the epoch and the layer's position: all processes agree.
    """
    for i, (_, layer) in enumerate(adapter_layers(model)):
        if layer.config.channel_selection == "resample":
            own = (seed * 10_007 + epoch) * 10_007 + i
            layer.draw_channels(torch.Generator().manual_seed(own))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts ``module`` where the submodule ``name`` was."""
    parent, _, child = name.rpartition(".")
    host_calls(model, name)
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """If the body raises, restores modules and ``requires_grad``. Tensor values are not restored.

    The class and the attributes of every module are restored, its hooks included.
    """
    modules = [
        (
            module,
            type(module),
            {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()},
        )
        for module in model.modules()
    ]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, own_class, attributes in modules:
            module.__class__ = own_class
            vars(module).clear()
            vars(module).update(attributes)
        for parameter, required in trainable:
            parameter.requires_grad_(required)
        raise
