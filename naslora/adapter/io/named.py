"""Several adapters on one model, of which one computes.

The adapters are layers around the same frozen nn.Linear modules. ``set_adapter`` puts an adapter's
layers into the model in place of another's. ``disable_adapter`` puts the frozen layers there. The
layers that are not in the model are neither in its state dict nor among its parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from torch import nn

from naslora.adapter.io.wrappers import unwrap
from naslora.adapter.layer.applied import applied
from naslora.adapter.layer.config import NASLoRAConfig
from naslora.adapter.layer.injection import build_layers
from naslora.adapter.layer.layer import NASLoRALinear
from naslora.adapter.layer.modules import NAMED, adapter_layers, keep_frozen, replace_module
from naslora.errors import UserError
from naslora.settings import checked

DEFAULT = "default"
"""Name of the adapter that ``inject`` added."""


@dataclass
class NamedAdapters:
    """The adapters of a model."""

    layers: dict[str, dict[str, NASLoRALinear]]
    """For each adapter its layers by their names in the model."""
    active: str
    """The adapter that computes, unless all are disabled."""
    disabled: bool = False
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
        UserError: the name is taken or no string, the model has no adapter or is merged, it was
            adapted by ``naslora.methods.apply``, or as ``inject``. The model is then unchanged.
    """
    host, adapters = _find(model)
    if not isinstance(name, str) or not name:
        raise UserError(f"name must be a name, got {name!r}")
    if applied(host) is not None:
        raise UserError("add_adapter needs a model of inject; methods.apply adds one adapter alone")
    if name in adapters.layers:
        raise UserError(f"name: the model has an adapter {name!r} already")
    active = next(iter(adapters.layers[adapters.active].values()))
    config = checked("config", active.config if config is None else config, NASLoRAConfig)
    with disable_adapter(model):
        layers = build_layers(host, config, seed)
        for layer in layers.values():
            keep_frozen(layer)
        adapters.layers[name] = layers
    return list(layers)


def set_adapter(model: nn.Module, name: str) -> None:
    """Lets the adapter of this name compute, and no other. An optimizer belongs to one adapter.

    Raises:
        UserError: there is no such adapter, or the model is merged.
    """
    adapters = _find(model)[1]
    if name not in adapters.layers:
        known = ", ".join(adapters.layers)
        raise UserError(f"name must be one of the model's adapters, {known}, got {name!r}")
    with disable_adapter(model):
        adapters.active = name


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that computes; None if the model has none or they are disabled."""
    return _find(model)[1].active if any(adapter_layers(model)) else None


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Lets the frozen layers compute while the body runs.

    Inside, ``set_adapter`` chooses the adapter that computes afterwards.

    Raises:
        UserError: the model has no adapter, or is merged.
    """
    host, adapters = _find(model)
    if adapters.disabled:
        yield
        return
    for name, layer in adapters.layers[adapters.active].items():
        replace_module(host, name, layer.base)
    adapters.disabled = True
    try:
        yield
    finally:
        adapters.disabled = False
        for name, layer in adapters.layers[adapters.active].items():
            base = cast(nn.Linear, host.get_submodule(name))
            layer.base = base
            layer.follow_base()
            layer.train(base.training)
            replace_module(host, name, layer)


def _find(model: nn.Module) -> tuple[nn.Module, NamedAdapters]:
    """The module that was adapted, and its adapters; a UserError if it has none or is merged."""
    for host in unwrap(model).modules():
        adapters = getattr(host, NAMED, None)
        if isinstance(adapters, NamedAdapters):
            break
    else:
        host, layers = unwrap(model), dict(adapter_layers(unwrap(model)))
        if not layers:
            raise UserError(
                "the model has no NAS-LoRA layers; call inject(model) first, or unmerge"
            )
        adapters = NamedAdapters({DEFAULT: layers}, DEFAULT)
        setattr(host, NAMED, adapters)
    if not adapters.disabled:
        # ``unmerge`` gives a deep copy layers of its own.
        names = adapters.layers[adapters.active]
        present = {name: host.get_submodule(name) for name in names}
        if not all(isinstance(layer, NASLoRALinear) for layer in present.values()):
            raise UserError("the adapter is merged; call unmerge(model) first")
        adapters.layers[adapters.active] = cast(dict[str, NASLoRALinear], present)
    return host, adapters
