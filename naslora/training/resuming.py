"""last.pt: everything that ``--resume`` needs, checked before a trainer takes any of it."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from torch import Tensor

from naslora.errors import UserError
from naslora.files import check_version, read_torch
from naslora.results import Epoch, Mixture
from naslora.state_dicts import plain_tensors, tensor_problem
from naslora.training.step import Group


@dataclass(frozen=True)
class LastState:
    """The content of last.pt, with the ``version`` of the format beside it."""

    epoch: int
    """The number of finished epochs."""
    history: list[Epoch]
    operations: list[Mixture]
    model: dict[str, Tensor]
    """What is trained, as ``trained_state``."""
    moments: list[dict[int, dict[str, Tensor]]]
    """Of each optimizer: what it keeps of each parameter, by the place of the parameter. Its other
    settings are those of the run."""
    scaler: dict[str, int | float] | None
    """State of the loss scaling of float16."""
    base_checksum: str | None = None
    """The checksum of the frozen weights."""
    average: dict[str, Tensor] | None = None
    """The averaged weights and the number of their steps, as ``AveragedModel``."""


def read_last(path: Path) -> LastState:
    """Reads last.pt.

    Raises:
        UserError: it is damaged, of a later version, or holds something else.
    """
    stored = read_torch(path)
    if not isinstance(stored, dict):
        raise UserError(f"it holds a {type(stored).__name__}, no checkpoint of a run")
    check_version(path, stored.get("version", 0))
    try:
        # msgspec takes a tensor for a mapping
        json.dumps([stored.get("history"), stored.get("operations")], allow_nan=False)
        state = msgspec.convert(stored, LastState)
    except (TypeError, ValueError, msgspec.ValidationError) as error:
        raise UserError(f"it is no checkpoint of a run: {error}") from error
    for tensors in (
        state.model,
        state.average or {},
        *(m for moments in state.moments for m in moments.values()),
    ):
        plain_tensors(tensors, "it")
    return state


def check_last(last: LastState, own: LastState, groups: Sequence[Group], epochs: int) -> None:
    """Compares last.pt with the state of the trainer that resumes from it, before its first epoch.

    Raises:
        UserError: it belongs to another run or model, or its values are damaged.
    """
    if not (
        0 <= last.epoch <= epochs
        and [record.epoch for record in last.history] == list(range(1, last.epoch + 1))
        and [mixture.epoch for mixture in last.operations] == list(range(last.epoch + 1))
    ):
        raise UserError(
            f"it holds epoch {last.epoch} of {epochs}, {len(last.history)} records of epochs and "
            f"{len(last.operations)} of operations"
        )
    first, *others = (
        [len(weights) for weights in mixture.softmax]
        for mixture in own.operations + last.operations
    )
    if any(sizes != first for sizes in others):
        raise UserError("its records of operations are not those of this model's layers")
    if last.base_checksum not in (None, own.base_checksum):
        raise UserError(
            "the run was trained on other frozen weights: give it the checkpoint that it was "
            "started with"
        )
    for stored, tensors in ((last.model, own.model), (last.average or {}, own.average or {})):
        _check_names("tensors", stored, tensors)
        _check_tensors(stored, tensors)
    if last.scaler and own.scaler:
        _check_names("settings of the loss scaling", last.scaler, own.scaler)
    _check_names("optimizers", range(len(last.moments)), range(len(groups)))
    for group, moments in zip(groups, last.moments, strict=True):
        for place, values in moments.items():
            if place not in range(len(group.parameters)):
                raise UserError(f"its optimizer has a parameter {place}, and that of the run none")
            parameter = group.parameters[place]
            # what Adam and AdamW keep
            kept = {"step": parameter.new_zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            _check_names("optimizer states", values, kept)
            _check_tensors(values, kept)
            if min(values["step"].min(), values["exp_avg_sq"].min()) < 0:
                raise UserError("the state of an optimizer is negative")


def _check_names(what: str, stored: Collection[object], own: Collection[object]) -> None:
    differing = {*stored} ^ {*own}
    if differing:
        raise UserError(f"its {what} and those of the run differ in {min(map(str, differing))}")


def _check_tensors(stored: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    for name, tensor in stored.items():
        if problem := tensor_problem(name, tensor, own):
            raise UserError(problem)
