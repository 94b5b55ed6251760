"""How methods are compared: which settings are tuned with which values, and on how many folds."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec
import tyro

from naslora.choices import Launcher
from naslora.errors import UserError
from naslora.settings import Count, Settings
from naslora.training.run_config import RunConfig

Values = Mapping[str, str]
"""Values of tuned settings, as text, by name."""


@dataclass(frozen=True)
class Design(Settings):
    """How methods are compared."""

    # A docstring of one line each: the parser would break others within a line of its help.
    tune: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Settings to tune, each as NAME=VALUE,VALUE,...: all combinations, on training images."""
    folds: Annotated[int, msgspec.Meta(ge=2)] | None = None
    """Test every image once, in so many folds; groups (a CSV column `group`) stay together."""
    inner_folds: Count = 1
    """How many of a fold's other folds, each in turn, score what is tuned on the rest."""
    margin: Annotated[float, msgspec.Meta(gt=0)] = 0.005
    """Differences in Dice that are smaller count as none in the test of equivalence."""


@dataclass(frozen=True)
class Launch(Settings):
    """Where the runs of a study are made."""

    launcher: Launcher = "local"
    """Make the runs here in turn, as jobs of Slurm by submitit, or on a cluster of Ray."""
    cluster: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """NAME=VALUE for submitit's update_parameters (slurm_partition=gpu) or for ray.init."""


def parse_grid(tune: Sequence[Sequence[str]]) -> list[Values]:
    """All combinations of the values of ``Design.tune``; without any, one of no values.

    Raises:
        UserError: a text is not NAME=VALUE,VALUE,..., or names a setting or a value twice.
    """
    settings: dict[str, list[str]] = {}
    for text in itertools.chain(*tune):
        name, _, listed = text.partition("=")
        values = [value.strip() for value in listed.split(",")]
        name = name.strip().lstrip("-").replace("-", "_")
        if not name or not all(values) or len(set(values)) < len(values) or name in settings:
            raise UserError(
                f"--tune takes NAME=VALUE,VALUE,... with distinct names and values, got {text!r}"
            )
        settings[name] = values
    return [dict(zip(settings, own, strict=True)) for own in itertools.product(*settings.values())]


def with_values(config: RunConfig, values: Values) -> RunConfig:
    """The configuration with other values of settings of its training or of its method.

    Raises:
        UserError: the method has no such setting, or the value is of a wrong type or out of range.
    """
    for name, text in values.items():
        part = "training" if name in config.training.__dataclass_fields__ else "adapter"
        settings = getattr(config, part)
        if name not in settings.__dataclass_fields__:
            raise UserError(
                f"--tune {name}: neither the training nor the method {config.method} has this "
                "setting; all methods get equal trials, so tune what all of them have"
            )
        config = replace(config, **{part: settings.with_text(name, text)})
    return config


def values_text(values: Values) -> str:
    """The values in words."""
    return ", ".join(f"{name}={value}" for name, value in values.items())
