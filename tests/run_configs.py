"""Configurations of runs for tests."""

import dataclasses
from typing import Any

from naslora.training.resolve import resolve
from naslora.training.run_config import DataConfig, ModelConfig, RunConfig


def run_config(**settings: Any) -> RunConfig:
    """A resolved configuration. Settings of the data and of the model need not be nested."""
    values: dict[str, Any] = {"data": {}, "model": {}}
    for name, value in settings.items():
        parts = {"data": DataConfig, "model": ModelConfig}
        owner = next((part for part, kind in parts.items() if hasattr(kind, name)), None)
        (values if owner is None else values[owner])[name] = value
    for name in ("training", "adapter"):
        if dataclasses.is_dataclass(values.get(name)):
            values[name] = values[name].to_dict()
    return resolve(RunConfig.from_dict(values))
