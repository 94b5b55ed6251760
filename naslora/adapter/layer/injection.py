"""Puts NAS-LoRA into an existing model, and finds its parameters again."""

import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from naslora.adapter.io.base_state import override_save_pretrained
from naslora.adapter.layer.calls import watch
from naslora.adapter.layer.config import NASLoRAConfig
from naslora.adapter.layer.frozen_norms import keep_frozen
from naslora.adapter.layer.grid import place_hint
from naslora.adapter.layer.layer import NASLoRALinear, layer_generator
from naslora.adapter.layer.modules import NAMED, adapter_layers, check_model, replace_module
from naslora.adapter.layer.targets import compiled, find_targets, with_names
from naslora.errors import UserError
from naslora.settings import Seed, checked


def inject(
    model: nn.Module,
    config: NASLoRAConfig | None = None,
    *,
    train: str | Sequence[str] = (),
    seed: int = 0,
) -> list[str]:
    """Replaces the matching nn.Linear layers by ``NASLoRALinear``, in place; freezes all else.

    Frozen batch norms stay in evaluation mode from then on, also after ``model.train()``. Norms
    that are made trainable later follow the next ``model.train()``. A layer's random
    numbers come from ``seed`` and its name: the same model, configuration and seed give the same
    adapter on every device.

    Args:
        model: any model whose target layers see (B, H, W, C) or (B, N, C) token grids.
        config: what to inject where; None for the defaults.
        train: what is trained beside the adapter, such as ``("mask_decoder",)``: names of modules
            or parameters, ends of names that follow a dot, or regular expressions that match a
            whole name. The frozen weights of adapted layers stay frozen.
        seed: of every random number.

    Returns:
        The names of the replaced layers, in model order.

    Raises:
        UserError: an argument of a wrong type, no layer matches, a match is no nn.Linear, a block
            index is out of range, there is no such preset, a pattern of ``train`` matches nothing,
            or the model has NAS-LoRA layers already. The model is then unchanged.
    """
    config = NASLoRAConfig() if config is None else config
    check_model(model)
    check_config(config)
    if hasattr(model, NAMED):
        raise UserError("the model has NAS-LoRA layers already; add_adapter adds another adapter")
    patterns = _patterns(train)
    seed = checked("seed", seed, Seed)
    config = with_names(config, model)
    targets = find_targets(model, config.target)
    frozen = {id(parameter) for base in targets.values() for parameter in base.parameters()}
    trained = _matching_parameters(model, patterns, frozen)
    adapted = build_layers(model, targets, config, seed)
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    modules = _matching_modules(model, patterns)
    for name, layer in adapted.items():
        layer.train(model.training)
        replace_module(model, name, layer)
    keep_frozen(model, modules)
    override_save_pretrained(model)
    watch(model, list(targets))
    return list(targets)


def check_config(config: object) -> None:
    """Refuses what is no ``NASLoRAConfig``.

    Raises:
        UserError: it is none.
    """
    if not isinstance(config, NASLoRAConfig):
        raise UserError(f"config must be a NASLoRAConfig or None, got {type(config).__name__}")


def build_layers(
    model: nn.Module, targets: Mapping[str, nn.Linear], config: NASLoRAConfig, seed: int
) -> dict[str, NASLoRALinear]:
    """New layers around the targets, by the targets' names. The model is not changed, except that
    the targets are frozen."""
    layers = {
        name: NASLoRALinear(base, config, layer_generator(seed, name))
        for name, base in targets.items()
    }
    for name, layer in layers.items():
        layer.name = name
        place_hint(model, name, layer)
    return layers


def _patterns(train: str | Sequence[str]) -> tuple[str, ...]:
    several = (train,) if isinstance(train, str) else checked("train", train, tuple[str, ...])
    for pattern in several:
        compiled("train", pattern)
    return several


def _matches(pattern: str, name: str) -> bool:
    return (
        name == pattern
        or name.endswith(f".{pattern}")
        or bool(name and re.fullmatch(pattern, name))
    )


def _matching_modules(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    return [
        module
        for name, module in model.named_modules()
        if any(_matches(pattern, name) for pattern in patterns)
    ]


def _matching_parameters(
    model: nn.Module, patterns: Sequence[str], frozen: Collection[int]
) -> list[nn.Parameter]:
    """The parameters that the patterns of ``train`` select.

    Args:
        model: the model without its adapters.
        patterns: as the argument ``train`` of ``inject``.
        frozen: the ids of parameters that no pattern selects.

    Raises:
        UserError: a pattern selects nothing.
    """
    selected: list[nn.Parameter] = []
    for pattern in patterns:
        modules = _matching_modules(model, [pattern])
        parameters = [p for module in modules for p in module.parameters()]
        parameters += [p for name, p in model.named_parameters() if _matches(pattern, name)]
        trainable = [p for p in parameters if id(p) not in frozen and p.is_floating_point()]
        if not trainable:
            children = ", ".join(name for name, _ in model.named_children())
            raise UserError(
                f"train: {pattern!r} matches no module with parameters to train; the model's "
                f"parts are: {children or 'none'}"
            )
        selected += trainable
    return selected


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
