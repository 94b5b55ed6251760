"""Puts NAS-LoRA into an existing model, and finds its parameters again."""

import re
from collections.abc import Collection, Mapping, Sequence
from difflib import SequenceMatcher

from torch import nn

from naslora.adapter import checks
from naslora.adapter.base_state import override_save_pretrained
from naslora.adapter.calls import check_host, watch
from naslora.adapter.config import NASLoRAConfig
from naslora.adapter.frozen_norms import keep_frozen
from naslora.adapter.grid import place_hint
from naslora.adapter.layer import NASLoRALinear, layer_generator
from naslora.adapter.modules import NAMED, adapter_layers, check_model, replace_module
from naslora.errors import UserError

LIKE = 0.5
"""The share of equal characters from which a name counts as like a target."""


def inject(
    model: nn.Module, config: NASLoRAConfig | None = None, *, train: str | Sequence[str] = ()
) -> list[str]:
    """Replaces the matching nn.Linear layers by ``NASLoRALinear``, in place; freezes all else.

    Frozen batch norms stay in evaluation mode from then on, also after ``model.train()``. Norms
    that are made trainable later follow the next ``model.train()``. A layer's random
    numbers come from ``config.seed`` and its name: the same model and configuration give the same
    adapter on every device.

    Args:
        model: any model whose target layers see (B, H, W, C) or (B, N, C) token grids.
        config: what to inject where; None for the defaults.
        train: what is trained beside the adapter, such as ``("mask_decoder",)``: names of modules
            or parameters, ends of names that follow a dot, or regular expressions that match a
            whole name. ``config.modules_to_save`` adds to it. The frozen weights of adapted layers
            stay frozen.

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
    patterns = (*checks.patterns("train", train), *config.modules_to_save)
    targets = find_targets(model, config.target, config.blocks)
    frozen = {id(parameter) for base in targets.values() for parameter in base.parameters()}
    trained = _matching_parameters(model, patterns, frozen)
    adapted = build_layers(model, targets, config)
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
    model: nn.Module, targets: Mapping[str, nn.Linear], config: NASLoRAConfig
) -> dict[str, NASLoRALinear]:
    """New layers around the targets, by the targets' names. The model is not changed, except that
    the targets are frozen."""
    layers = {
        name: NASLoRALinear(base, config, layer_generator(config.seed, name))
        for name, base in targets.items()
    }
    for name, layer in layers.items():
        layer.name = name
        place_hint(model, name, layer)
    return layers


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


def find_targets(
    model: nn.Module, target: str, blocks: Sequence[int] | None = None
) -> dict[str, nn.Linear]:
    """The nn.Linear layers to adapt with their names, in model order.

    Args:
        model: a model without NAS-LoRA layers.
        target: a regular expression, searched in the modules' names.
        blocks: which of the matches to take, counted from 0; None for all.

    Raises:
        UserError: no layer matches, a match is no nn.Linear, a block index is out of range, or the
            model has NAS-LoRA layers already.
    """
    present = [name for name, _ in adapter_layers(model)]
    if present:
        raise UserError(f"the model has NAS-LoRA layers already, the first is {present[0]!r}")
    pattern = checks.Pattern("target", target)
    matches = {}
    for name, module in model.named_modules():
        if not name or not pattern.search(name):
            continue
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise UserError(f"target {target!r} matches {name!r}, a {kind}, not nn.Linear")
        check_host(model, name)
        matches[name] = module
    if not matches:
        linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise UserError(
            f"no layer matches target {target!r}; nn.Linear layers with the nearest names: "
            f"{', '.join(_nearest(target, linear)) or 'none'}"
        )
    if blocks is None:
        return matches
    if max(blocks) >= len(matches):
        raise UserError(
            f"blocks must lie in 0..{len(matches) - 1}, because {len(matches)} layers match, got "
            f"{list(blocks)}"
        )
    names = list(matches)
    return {names[block]: matches[names[block]] for block in sorted(blocks)}


def _nearest(target: str, names: Sequence[str], count: int = 4) -> list[str]:
    """Names whose ends are like a target, one of those that differ in numbers only; without such
    names, the first ones."""
    wanted = " ".join(re.findall(r"[\w.]+", target.replace("\\.", "."))).strip(". ")
    parts = wanted.count(".") + 1
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "0", name), name)

    def likeness(kind: str) -> float:
        ending = ".".join(kind.split(".")[-parts:])
        return SequenceMatcher(None, wanted, ending).ratio()

    alike = [kind for kind in kinds if likeness(kind) >= LIKE]
    shown = sorted(alike, key=likeness, reverse=True) or list(kinds)
    return [kinds[kind] for kind in shown[:count]]
