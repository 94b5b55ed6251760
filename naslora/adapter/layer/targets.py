"""Finds the layers to adapt, by a regular expression or by their names."""

import dataclasses
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import TypeVar

from torch import nn

from naslora.adapter.io.wrappers import bare_paths
from naslora.adapter.layer.calls import check_host
from naslora.adapter.layer.config import TargetConfig
from naslora.adapter.layer.modules import adapter_layers
from naslora.errors import UserError

LIKE = 0.5
"""The share of equal characters from which a name counts as like a target."""

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
    if not isinstance(config.target, str) and config.blocks is None:
        return config
    paths = bare_paths(model)
    names = tuple(paths[name] for name in find_targets(model, config.target, config.blocks))
    return dataclasses.replace(config, target=names, blocks=None)


def find_targets(
    model: nn.Module, target: str | Sequence[str], blocks: Sequence[int] | None = None
) -> dict[str, nn.Linear]:
    """The nn.Linear layers to adapt with their names, in model order.

    Args:
        model: a model without NAS-LoRA layers.
        target: a regular expression, searched in the modules' names; or the names without those of
            wrappers.
        blocks: which of the matches to take, counted from 0; None for all.

    Raises:
        UserError: no layer matches, a name is none of the model's, a match is no nn.Linear, a block
            index is out of range, or the model has NAS-LoRA layers already.
    """
    present = [name for name, _ in adapter_layers(model)]
    if present:
        raise UserError(f"the model has NAS-LoRA layers already, the first is {present[0]!r}")
    matches = {}
    for name, module in _matching(model, target).items():
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise UserError(f"target {target!r} matches {name!r}, a {kind}, not nn.Linear")
        check_host(model, name)
        matches[name] = module
    if blocks is None:
        return matches
    if max(blocks) >= len(matches):
        raise UserError(
            f"blocks must lie in 0..{len(matches) - 1}, because {len(matches)} layers match, got "
            f"{list(blocks)}"
        )
    names = list(matches)
    return {names[block]: matches[names[block]] for block in sorted(blocks)}


def _matching(model: nn.Module, target: str | Sequence[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    if isinstance(target, str):
        pattern = compiled("target", target)
        found = {name: module for name, module in modules.items() if name and pattern.search(name)}
        missing = target if not found else None
    else:
        paths, wanted = bare_paths(model), set(target)
        found = {name: module for name, module in modules.items() if name and paths[name] in wanted}
        missing = min(wanted - {paths[name] for name in found}, default=None)
    if missing is None:
        return found
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    raise UserError(
        f"no layer matches target {missing!r}; nn.Linear layers with the nearest names: "
        f"{', '.join(_nearest(missing, linear)) or 'none'}"
    )


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
