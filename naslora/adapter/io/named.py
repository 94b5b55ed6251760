"""Several adapters on one model, of which one computes.

The adapters are layers around the same frozen nn.Linear modules. ``set_adapter`` puts an adapter's
layers into the model in place of another's. ``disable_adapter`` puts the frozen layers there. The
layers that are not in the model are neither in its state dict nor among its parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from naslora.adapter.io.wrappers import unwrap
from naslora.adapter.layer.applied import applied
from naslora.adapter.layer.config import NASLoRAConfig
from naslora.adapter.layer.frozen_norms import keep_frozen
from naslora.adapter.layer.injection import build_layers, check_config
from naslora.adapter.layer.layer import NASLoRALinear
from naslora.adapter.layer.modules import NAMED, adapter_layers, check_model, replace_module
from naslora.adapter.layer.targets import find_targets, with_names
from naslora.errors import UserError

DEFAULT = "default"
"""Name of the adapter that ``inject`` added."""


@dataclass
class NamedAdapters:
    """The adapters of a model."""

    layers: dict[str, dict[str, NASLoRALinear]]
    """For each adapter its layers by their names in the model."""
    active: str
    """The adapter that computes, unless all are disabled."""
    disabled: bool = field(default=False)
    """Whether the frozen layers compute."""


def add_adapter(
    model: nn.Module, name: str, config: NASLoRAConfig | None = None, *, seed: int = 0
) -> list[str]:
    """Adds another adapter to a model of ``inject``. It does not compute before ``set_adapter``.

    Args:
        model: a model that ``inject`` adapted. That adapter is called "default".
        name: the new adapter's name.
        config: what to add where; None for the configuration of the active adapter.
        seed: of every random number.

    Returns:
        The names of its layers, in model order.

    Raises:
        UserError: the name is taken or no string, the model has no adapter, is merged or has its
            adapters disabled, it was adapted by ``naslora.methods.apply``, or as ``inject``. The
            model is then unchanged.
    """
    check_model(model)
    model = unwrap(model)
    if not isinstance(name, str) or not name:
        raise UserError(f"name must be a name, got {name!r}")
    if applied(model) is not None:
        raise UserError("add_adapter needs a model of inject; methods.apply adds one adapter alone")
    host, adapters = _find(model)
    if name in adapters.layers:
        raise UserError(f"name: the model has an adapter {name!r} already")
    if adapters.disabled:
        raise UserError("the adapters are disabled; add one outside of disable_adapter")
    active = adapters.layers[adapters.active]
    config = next(iter(active.values())).config if config is None else config
    check_config(config)
    _swap(host, active, {})
    try:
        config = with_names(config, host)
        layers = build_layers(host, find_targets(host, config.target), config, seed)
        for layer in layers.values():
            keep_frozen(layer)
    finally:
        _swap(host, {}, active)
    adapters.layers[name] = layers
    setattr(host, NAMED, adapters)
    return list(layers)


def set_adapter(model: nn.Module, name: str) -> None:
    """Lets an adapter compute, and no other. An optimizer belongs to one adapter.

    Args:
        model: a model of ``inject`` or ``add_adapter``.
        name: the adapter's name.

    Raises:
        UserError: there is no such adapter, or the model is merged.
    """
    host, adapters = _find(model)
    if name not in adapters.layers:
        known = ", ".join(adapters.layers)
        raise UserError(f"name must be one of the model's adapters, {known}, got {name!r}")
    if not adapters.disabled:
        _swap(host, adapters.layers[adapters.active], adapters.layers[name])
    adapters.active = name


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that computes; None if the model has none or they are disabled."""
    model = unwrap(model)
    if not any(adapter_layers(model)):
        return None
    return _find(model)[1].active


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Lets the frozen layers compute while the body runs.

    Inside, ``set_adapter`` chooses the adapter that computes afterwards.

    Args:
        model: a model of ``inject``.

    Raises:
        UserError: the model has no adapter, or is merged.
    """
    host, adapters = _find(model)
    if adapters.disabled:
        yield
        return
    _swap(host, adapters.layers[adapters.active], {})
    adapters.disabled = True
    setattr(host, NAMED, adapters)
    try:
        yield
    finally:
        adapters.disabled = False
        _swap(host, {}, adapters.layers[adapters.active])


def _find(model: nn.Module) -> tuple[nn.Module, NamedAdapters]:
    """The module that was adapted, and its adapters.

    Raises:
        UserError: the model has no adapter, or is merged.
    """
    check_model(model)
    model = unwrap(model)
    for module in model.modules():
        adapters = getattr(module, NAMED, None)
        if isinstance(adapters, NamedAdapters):
            if not adapters.disabled:
                adapters.layers[adapters.active] = _present(module, adapters)
            return module, adapters
    layers = dict(adapter_layers(model))
    if not layers:
        raise UserError("the model has no NAS-LoRA layers; call inject(model) first, or unmerge")
    return model, NamedAdapters({DEFAULT: layers}, DEFAULT)


def _present(host: nn.Module, adapters: NamedAdapters) -> dict[str, NASLoRALinear]:
    """The layers of the active adapter that are in the model.

    They are not always the layers of the record: ``unmerge`` gives a deep copy layers of its own.

    Raises:
        UserError: the adapter is merged.
    """
    present = {}
    for name in adapters.layers[adapters.active]:
        layer = host.get_submodule(name)
        if not isinstance(layer, NASLoRALinear):
            raise UserError("the adapter is merged; call unmerge(model) first")
        present[name] = layer
    return present


def _swap(model: nn.Module, out: dict[str, NASLoRALinear], into: dict[str, NASLoRALinear]) -> None:
    """Puts the layers ``into`` in place of the layers ``out``, whose frozen layers return."""
    for name, layer in out.items():
        replace_module(model, name, layer.base)
    for name, layer in into.items():
        layer.base = cast(nn.Linear, model.get_submodule(name))
        layer.follow_base()
        layer.train(model.get_submodule(name).training)
        replace_module(model, name, layer)
