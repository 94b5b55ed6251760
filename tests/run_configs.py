"""Configurations of runs for tests."""

import dataclasses
from typing import Any

from naslora.training.resolve import resolve
from naslora.training.run_config import DataConfig, ModelConfig, RunConfig


def run_config(**settings: Any) -> RunConfig:
    """A resolved configuration. Settings of the data and of the model need not be nested.

    Without a learning rate it is 1e-4, because ``resolve`` would read the data to fit one.
    """
    values: dict[str, Any] = {"data": {}, "model": {}}
    for name, value in settings.items():
        parts = {"data": DataConfig, "model": ModelConfig}
        owner = next((part for part, kind in parts.items() if hasattr(kind, name)), None)
        (values if owner is None else values[owner])[name] = value
    for name in ("training", "adapter"):
        if dataclasses.is_dataclass(values.get(name)):
            given = values[name].to_dict().items()
            values[name] = {field: value for field, value in given if value is not None}
    values["training"] = {"learning_rate": 1e-4} | values.get("training", {})
    return resolve(RunConfig.from_dict(values))
