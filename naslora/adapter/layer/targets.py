"""Finds the layers to adapt, by the name of a target, a regular expression, or their names."""

import dataclasses
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TypeVar

from torch import nn

from naslora.adapter.io.wrappers import bare_paths
from naslora.adapter.layer.config import TargetConfig
from naslora.adapter.layer.modules import adapter_layers
from naslora.errors import UserError

Own = TypeVar("Own", bound=TargetConfig)

_ATTENTION = (r"(qkv|attention\.[qkv]_proj)", r"(attn\.proj|attention\.o_proj)")
_MLP = (r"mlp\.(lin1|fc1|proj_in|layers\.0)", r"mlp\.(lin2|fc2|proj_out|layers\.1)")
_LINEARS = {
    "qkv": _ATTENTION[:1],
    "mlp": _MLP[:1],
    "qkv+mlp": (*_ATTENTION[:1], *_MLP[:1]),
    "all": (*_ATTENTION, *_MLP),
}
TARGETS = {
    # The mask decoder's transformer has an MLP of the same names, whose tokens form no grid.
    target: rf"^(?!(.*\.)?mask_decoder\.)(.*\.)?({'|'.join(ends)})$"
    for target, ends in _LINEARS.items()
}
"""The named targets: a regular expression for the names of each one's layers, in an encoder of any
family. "mlp" is the first linear of a block's MLP. It sees the whole image, never its windows."""


def target_name(names: Iterable[str]) -> str | None:
    """The named target that layers of these names make up, in all blocks or some; else None."""
    every = _LINEARS["all"]
    ends = {next((e for e in every if re.search(rf"(^|\.){e}$", name)), name) for name in names}
    return next((target for target, own in _LINEARS.items() if ends == {*own}), None)


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
    blocks = block_names(matches)
    if max(config.blocks) >= len(blocks):
        raise UserError(
            f"blocks must lie in 0..{len(blocks) - 1}, because {len(blocks)} blocks have layers "
            f"that match, got {list(config.blocks)}"
        )
    chosen = {blocks[i] for i in config.blocks}
    return {name: layer for name, layer in matches.items() if _block(name) in chosen}


def block_names(layers: Iterable[str]) -> list[str]:
    """The names of the blocks of layers, in their order."""
    return list(dict.fromkeys(map(_block, layers)))


def _block(layer: str) -> str:
    """A layer's name up to its last number, the block's index; the whole name without one."""
    found = re.match(r"(.*\.)?\d+(?=\.)", layer)
    return found[0] if found else layer


def _matching(model: nn.Module, target: str | tuple[str, ...]) -> dict[str, nn.Module]:
    modules, paths = dict(model.named_modules()), bare_paths(model)
    if isinstance(target, str):
        pattern = compiled("target", TARGETS.get(target, target))
        found = {name: module for name, module in modules.items() if name and pattern.search(name)}
        whole = target not in TARGETS or target in ("all", target_name(found))
        missing = [] if found and whole else [target]
    else:
        found = {name: module for name, module in modules.items() if name and paths[name] in target}
        missing = sorted({*target} - {paths[name] for name in found})
    if found and not missing:
        return found
    wanted = missing[0] if missing else ""
    some = "a part of " if found and wanted in TARGETS else ""
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    raise UserError(
        f"no layer matches {some}target {wanted!r}; nn.Linear layers with the nearest names: "
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
