"""Recipes: a run's settings as YAML, one file for each row of the paper's Tables 1 to 3.

A recipe holds fields of ``RunConfig``, those of its adapter and of its search in ``adapter:`` and
``search:``, and may build on another file, ``base:``, whose settings it overrides. What ships with
the package lies in ``recipes/DATASET/METHOD.yaml``.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from naslora.adapter.config import NASLoRAConfig
from naslora.errors import UserError
from naslora.training.run_config import RunConfig
from naslora.training.search_config import SearchConfig

FOLDER = Path(__file__).parents[1] / "recipes"
PATHS = ("data", "root", "cache", "checkpoint")
# YAML 1.1 takes 1e-4 for text, as it lacks a point.
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?e[+-]?\d+", re.IGNORECASE)


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package, DATASET/METHOD."""
    files = FOLDER.glob("*/*.yaml")
    return sorted(f"{f.parent.name}/{f.stem}" for f in files if not f.stem.startswith("_"))


def load_recipe(name: str) -> RunConfig:
    """The settings of a recipe.

    Args:
        name: a shipped recipe, such as "isic2017/nas-pc-lora", or the path of a YAML file.

    Raises:
        UserError: there is none of this name, the file is no recipe, or a setting is out of range.
    """
    path = FOLDER / f"{name}.yaml" if name in shipped_recipes() else Path(name)
    if not path.is_file():
        names = [recipe.split("/") for recipe in shipped_recipes()]
        datasets, methods = (", ".join(sorted(set(part))) for part in zip(*names, strict=True))
        raise UserError(
            f"there is no recipe {name!r}; recipes are DATASET/METHOD, of {datasets} and "
            f"{methods}, or the path of a YAML file"
        )
    values = _read(path)
    try:
        adapter = NASLoRAConfig(**values.pop("adapter", {}))
        search = SearchConfig(**values.pop("search", {}))
        return RunConfig(**values, adapter=adapter, search=search, recipe=name)
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path} is no recipe: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """The settings in a file, on top of those of its base."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no recipe: expected lines such as method: nas-pc-lora")
    values = {key: _value(key, value) for key, value in values.items()}
    if "base" not in values:
        return values
    base = _read(path.parent / values.pop("base"))
    for key, value in values.items():
        base[key] = base.get(key, {}) | value if isinstance(value, dict) else value
    return base


def _value(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {inner: _value(inner, entry) for inner, entry in value.items()}
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    return Path(value) if key in PATHS and value is not None else value
