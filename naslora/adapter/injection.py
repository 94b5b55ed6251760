"""Puts NAS-LoRA into an existing model, and finds its parameters again."""

import re
from collections.abc import Sequence

import torch
from torch import nn

from naslora.adapter.config import NASLoRAConfig
from naslora.adapter.layer import NASLoRALinear
from naslora.adapter.modules import adapter_layers, replace_module
from naslora.errors import UserError


def inject(model: nn.Module, config: NASLoRAConfig) -> list[str]:
    """Replaces the matching nn.Linear layers by ``NASLoRALinear``, in place; freezes all else.

    Every random number comes from ``config.seed``: the same model and configuration give the same
    adapter on every device.

    Args:
        model: any model whose target layers see (B, H, W, C) or (B, N, C) token grids.
        config: what to inject where.

    Returns:
        The names of the replaced layers, in model order.

    Raises:
        UserError: no layer matches, a match is no nn.Linear, a block index is out of range, there
            is no such preset, or the model has NAS-LoRA layers already. The model is then
            unchanged.
    """
    targets = find_targets(model, config.target, config.blocks)
    generator = torch.Generator().manual_seed(config.seed)
    adapted = {name: NASLoRALinear(base, config, generator) for name, base in targets.items()}
    model.requires_grad_(False)
    for name, layer in adapted.items():
        layer.train(model.training)
        replace_module(model, name, layer)
    return list(targets)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' weights without alpha: lora_A, lora_B and the operations'."""
    return [
        parameter
        for _, layer in adapter_layers(model)
        for name, parameter in layer.named_parameters()
        if name != "alpha" and not name.startswith("base.")
    ]


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
    pattern = re.compile(target)
    matches = {}
    for name, module in model.named_modules():
        if not name or not pattern.search(name):
            continue
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise UserError(f"target {target!r} matches {name!r}, a {kind}, not nn.Linear")
        matches[name] = module
    if not matches:
        linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise UserError(
            f"no layer matches target {target!r}; the model's nn.Linear layers are: "
            f"{', '.join(linear[:8]) or 'none'}{' ...' if len(linear) > 8 else ''}"
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
