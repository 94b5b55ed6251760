"""Finds the layers to adapt, by a regular expression or by their names."""

import dataclasses
import re
from difflib import get_close_matches
from typing import TypeVar

from torch import nn

from naslora.adapter.io.wrappers import bare_paths
from naslora.adapter.layer.config import TargetConfig
from naslora.adapter.layer.modules import adapter_layers
from naslora.errors import UserError

Own = TypeVar("Own", bound=TargetConfig)


def compiled(name: str, expression: str) -> re.Pattern[str]:
    """A regular expression; ``name`` says what it is, for the message.

    Raises:
        UserError: it is none.
    """
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{name} is no regular expression: {expression!r}: {error}") from error


def with_names(config: Own, model: nn.Module) -> Own:
    """The configuration with the names of the layers that it adapts, without those of wrappers.

    Raises:
        UserError: as ``find_targets``.
    """
    paths = bare_paths(model)
    names = tuple(paths[name] for name in find_targets(model, config))
    return dataclasses.replace(config, target=names, blocks=None)


def find_targets(model: nn.Module, config: TargetConfig) -> dict[str, nn.Linear]:
    """The nn.Linear layers to adapt with their names, in model order.

    Args:
        model: a model without NAS-LoRA layers.
        config: states the layers.

    Raises:
        UserError: no layer matches, a name is none of the model's, a match is no nn.Linear, a block
            index is out of range, or the model has NAS-LoRA layers already.
    """
    present = [name for name, _ in adapter_layers(model)]
    if present:
        raise UserError(f"the model has NAS-LoRA layers already, the first is {present[0]!r}")
    matches = {}
    for name, module in _matching(model, config.target).items():
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise UserError(f"target {config.target!r} matches {name!r}, a {kind}, not nn.Linear")
        matches[name] = module
    if config.blocks is None:
        return matches
    if max(config.blocks) >= len(matches):
        raise UserError(
            f"blocks must lie in 0..{len(matches) - 1}, because {len(matches)} layers match, got "
            f"{list(config.blocks)}"
        )
    return {name: matches[name] for i, name in enumerate(matches) if i in config.blocks}


def _matching(model: nn.Module, target: str | tuple[str, ...]) -> dict[str, nn.Module]:
    modules, paths = dict(model.named_modules()), bare_paths(model)
    if isinstance(target, str):
        pattern = compiled("target", target)
        found = {name: module for name, module in modules.items() if name and pattern.search(name)}
        missing = [] if found else [target]
    else:
        found = {name: module for name, module in modules.items() if name and paths[name] in target}
        missing = sorted({*target} - {paths[name] for name in found})
    if found and not missing:
        return found
    wanted = missing[0] if missing else ""
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    raise UserError(
        f"no layer matches target {wanted!r}; nn.Linear layers with the nearest names: "
        f"{', '.join(_nearest(wanted, linear)) or 'none'}"
    )


def _nearest(target: str, names: list[str]) -> list[str]:
    """Names whose ends are like a target, one of those that differ in numbers only; without such
    names, the first ones."""
    wanted = " ".join(re.findall(r"[\w.]+", target.replace("\\.", "."))).strip(". ")
    parts = wanted.count(".") + 1
    endings = {re.sub(r"\d+", "0", ".".join(n.split(".")[-parts:])): n for n in reversed(names)}
    shown = get_close_matches(wanted, endings, 4, 0.5) or [*reversed(endings)][:4]
    return [endings[ending] for ending in shown]
