"""Recipes: a run's settings as YAML, one file a data set for the paper's Tables 1 to 3.

A recipe holds fields of ``RunConfig``: those of the data below ``data:``, and so on. Below
``methods:`` stand the settings of each method's adapter. A recipe may name another file as
``base:``, whose settings it overrides.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from naslora.errors import UserError
from naslora.training.run_config import RunConfig

RECIPES = Path(__file__).parents[1] / "recipes"


class _Loader(yaml.SafeLoader):
    """Also reads 1e-4 as a number, which is text in YAML 1.1, because it has no point."""


_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, [*"+-0123456789"])


def shipped_recipes() -> list[str]:
    """Names of the recipes of the package, those of data sets, sorted."""
    return sorted(f.stem for f in RECIPES.glob("*.yaml") if not f.stem.startswith("_"))


def load_recipe(name: str | None, method: str | None = None) -> RunConfig:
    """Reads the settings of a recipe for a fine-tuning method, None for that of the recipe.

    ``name`` is a shipped recipe, such as "isic2017", the path of a YAML file, or None for the
    defaults.

    Raises:
        UserError: no recipe has this name, the file is not a recipe, or a setting is unknown or out
            of range. The message names file and setting.
    """
    if name is None:
        return RunConfig.from_dict({} if method is None else {"method": method})
    path = RECIPES / f"{name}.yaml" if name in shipped_recipes() else Path(name)
    if not path.is_file():
        raise UserError(
            f"there is no recipe {name!r}; give one of {', '.join(shipped_recipes())}, or the path "
            "of a YAML file"
        )
    values = {**_read(path, ()), "recipe": name}
    if method is not None:
        values["method"] = method
    try:
        adapters = values.pop("methods", {})
        if not isinstance(adapters, dict):
            raise UserError(f"methods: expected the settings of methods, got {adapters!r:.80}")
        for other, adapter in adapters.items():  # those of other methods are checked as well
            RunConfig.from_dict({"method": other, "adapter": adapter})
            if other == values.get("method", RunConfig.method):
                values.setdefault("adapter", adapter)
        return RunConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Reads the settings of a file and of its base; the file's own win."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no recipe: expected lines such as method: nas-pc-lora")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or (path.parent / base).resolve() in above:
        raise UserError(f"{path}: base: expected another recipe's file, got {base!r:.80}")
    return _merged(_read(path.parent / base, (*above, path.resolve())), values)


def _merged(base: Any, own: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(own, dict)):
        return own
    return base | {key: _merged(base.get(key), value) for key, value in own.items()}
