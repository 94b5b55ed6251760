"""NAS-LoRA layers in a model and their parameters: found, put in, undone; norms kept frozen."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from naslora.adapter.io.wrappers import bare_paths
from naslora.adapter.layer.calls import host_calls
from naslora.adapter.layer.layer import NASLoRALinear

NAMED = "named_adapters"
"""Attribute of a model with several adapters; copies and pickles of the model contain it."""


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, NASLoRALinear]]:
    """The model's NAS-LoRA layers with their names, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, NASLoRALinear):
            yield name, module


def bare_layers(model: nn.Module) -> dict[str, NASLoRALinear]:
    """The same by their names in the model without wrappers."""
    paths = bare_paths(model)
    return {paths[name]: layer for name, layer in adapter_layers(model)}


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' weights without alpha: lora_A, lora_B and the operations'."""
    return [
        parameter
        for _, layer in adapter_layers(model)
        for name, parameter in layer.named_parameters()
        if name != "alpha" and not name.startswith("base.")
    ]


def cell_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the cells' operations; empty for plain LoRA."""
    cells = [layer.cell for _, layer in adapter_layers(model) if layer.cell is not None]
    return [parameter for cell in cells for parameter in cell.parameters()]


def arch_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The architecture logits alpha, one (8,) tensor a layer; empty for plain LoRA."""
    return [layer.alpha for _, layer in adapter_layers(model) if layer.alpha is not None]


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
    modules = [(module, type(module), vars(module).copy()) for module in model.modules()]
    for _, _, attributes in modules:
        attributes |= {k: copy.copy(v) for k, v in attributes.items() if isinstance(v, dict)}
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


class FrozenTrain:
    """Stands in front of a batch norm's ``train``. Copies and pickles of the norm contain it."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, mode: bool = True) -> nn.Module:
        """Sets the mode; evaluation mode while the norm's weight does not require gradients."""
        weight = self.norm.weight
        trains = weight is not None and weight.requires_grad
        return type(self.norm).train(self.norm, mode and bool(trains))


def keep_frozen(model: nn.Module, trained: Iterable[nn.Module] = ()) -> None:
    """Keeps the model's batch norms in evaluation mode while their weights do not train.

    ``model.train()`` would put frozen ones into training mode. Their running statistics would then
    follow the training images, and a saved adapter does not contain them. A norm that is made
    trainable later is in training mode again after the next ``train()``.

    Args:
        model: the model. The norms of adapters count too: they pause while alpha alone trains.
        trained: modules that train. Their batch norms without parameters are left alone; all
            others without parameters count as frozen.
    """
    left_alone = {norm for module in trained for norm in module.modules()}
    for module in model.modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, _LazyNormBase):
            continue
        if module.weight is not None or module not in left_alone:
            vars(module)["train"] = FrozenTrain(module)
            module.train(module.training)
