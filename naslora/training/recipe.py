"""Recipes: a run's settings as YAML, one file for each row of the paper's Tables 1 to 3.

A recipe holds fields of ``RunConfig``; the fields of its adapter and its training stand below
``adapter:`` and ``training:``. It may name another file as ``base:``, whose settings it overrides.
The recipes of the package are the files ``naslora/recipes/DATASET/METHOD.yaml``.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from naslora.adapter.config import NASLoRAConfig
from naslora.errors import UserError
from naslora.training.run_config import PATHS, RunConfig
from naslora.training.train_config import TrainConfig

FOLDER = Path(__file__).parents[1] / "recipes"
# YAML 1.1 reads 1e-4 as text, because the number has no point.
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?e[+-]?\d+", re.IGNORECASE)


def shipped_recipes() -> list[str]:
    """Names of the recipes of the package, DATASET/METHOD, sorted."""
    files = FOLDER.glob("*/*.yaml")
    return sorted(f"{f.parent.name}/{f.stem}" for f in files if not f.stem.startswith("_"))


def load_recipe(name: str) -> RunConfig:
    """Reads the settings of a recipe.

    Args:
        name: a shipped recipe, such as "isic2017/nas-pc-lora", or the path of a YAML file.

    Raises:
        UserError: no recipe has this name, the file is not a recipe, or a setting is out of range.
    """
    path = FOLDER / f"{name}.yaml" if name in shipped_recipes() else Path(name)
    if not path.is_file():
        names = [recipe.split("/") for recipe in shipped_recipes()]
        datasets, methods = (", ".join(sorted(set(part))) for part in zip(*names, strict=True))
        raise UserError(
            f"there is no recipe {name!r}; give DATASET/METHOD (data sets: {datasets}; methods: "
            f"{methods}), or the path of a YAML file"
        )
    values = _read(path)
    try:
        adapter = NASLoRAConfig(**values.pop("adapter", {}))
        training = TrainConfig(**values.pop("training", {}))
        return RunConfig(**values, adapter=adapter, training=training, recipe=name)
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path} is no recipe: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """Reads the settings of a file and of its base; the file's own win."""
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
