"""Reads the adapters that ``storage.py`` wrote into a model, exactly or not at all."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import msgspec
from torch import Tensor, nn

from naslora.adapter.io.storage import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Description,
    adapter_names,
    applied_config,
    base_checksum,
    unshared,
)
from naslora.adapter.io.wrappers import bare_state, fill, unwrap
from naslora.adapter.layer.applied import applied, find_method
from naslora.adapter.layer.config import OUTPUT_FIELDS, NASLoRAConfig
from naslora.adapter.layer.injection import apply, inject
from naslora.adapter.layer.modules import adapter_layers, bare_layers, undone_on_error
from naslora.adapter.merging.merged import merged_modules
from naslora.errors import UserError
from naslora.files import read_json, read_safetensors, reading
from naslora.state_dicts import check_fit, mismatches


def load_adapter(model: nn.Module, directory: str | Path, check_base: bool = True) -> None:
    """Loads what ``save_adapter`` saved, exactly. A model without adapters gets them first.

    Adding adapters freezes what ``apply`` or ``inject`` freezes. To train on, unfreeze it again.

    Args:
        model: the model that was adapted, in its adapted or in its original form.
        directory: the folder that ``save_adapter`` wrote.
        check_base: whether the frozen weights must be those that the adapter was trained on.
            Weights cast to bfloat16 count as equal, those cast to float16 do not.

    Raises:
        UserError: a file is missing or damaged, or does not fit the model. The message lists the
            mismatches. The model is then unchanged.
    """
    if any(merged_modules(model)):
        raise UserError("the model is merged: call unmerge before load_adapter")
    directory = Path(directory)
    stored = read_description(directory / CONFIG_NAME)
    tensors = read_safetensors(directory / WEIGHTS_NAME)
    with undone_on_error(model):
        if applied(unwrap(model)) is None and not any(adapter_layers(model)):
            _adapt(unwrap(model), stored)
        problems = _differing_settings(model, stored)
        problems += _differing_tensors(model, tensors, stored.other_tensors or [])
        check_fit(f"the adapter in {directory}", problems)
        trained = {*tensors, *(stored.unsaved_tensors or ())}
        expected = stored.base_checksum if check_base else None
        if expected is not None and expected != base_checksum(model, trained):
            raise UserError(
                f"the adapter in {directory} was trained on other frozen weights than this model "
                "has: load the checkpoint that it was trained on, or pass check_base=False"
            )
    fill(model, tensors)


def read_description(path: Path) -> Description:
    """Reads adapter_config.json.

    Raises:
        UserError: the file is missing or is no adapter configuration of naslora.
    """
    with reading(path, "is not an adapter configuration of naslora"):
        stored = read_json(path)
        if isinstance(stored, dict) and "peft_version" in stored:
            raise UserError(f"a PeftModel wrote {path}: call PeftModel.from_pretrained")
        return msgspec.convert(stored, Description)


def _adapt(model: nn.Module, stored: Description) -> None:
    values = stored.config or {}
    if isinstance(values.get("target", ()), str):  # a pattern of a stranger's would be run
        raise UserError(f"target: expected the names of layers, got {values['target']!r:.80}")
    if stored.method is not None:
        apply(stored.method, model, find_method(stored.method).config.from_dict(values))
    elif stored.config is not None:  # of ``inject``; the model may hold the one that was adapted
        config = NASLoRAConfig.from_dict(values)
        inject(model, dataclasses.replace(config, target=tuple(stored.layers), blocks=None))


def _differing_settings(model: nn.Module, stored: Description) -> list[str]:
    """Differences of method and configuration that change the output of equal tensors."""
    present, config, layers = applied(unwrap(model)), applied_config(model), bare_layers(model)
    ours, theirs = config.to_dict() if config else {}, stored.config or {}
    problems = []
    if present is not None and stored.method not in (None, present.method.name):
        problems.append(f"the method is {stored.method} in the file, {present.method.name} here")
    problems += [
        *(f"layer {n} is not adapted in the model" for n in stored.layers if n not in layers),
        *(f"layer {n} is not in the file" for n in layers if n not in stored.layers),
        *(
            f"{field} is {theirs[field]} in the file, {ours[field]} here"
            for field in OUTPUT_FIELDS
            if field in ours and field in theirs and ours[field] != theirs[field]
        ),
    ]
    return problems


def _differing_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], promised: list[str]
) -> list[str]:
    state, ours = bare_state(model), adapter_names(model)
    expected = {*unshared({name: state[name] for name in state if name in ours}), *promised}
    problems = mismatches(tensors, state, sorted(expected))
    for name, layer in bare_layers(model).items():
        name = f"{name}.channels".lstrip(".")
        channels = tensors.get(name)
        if channels is None or channels.is_floating_point() or channels.dim() != 1:
            continue  # reported as a missing tensor, a dtype or a shape
        values = channels.tolist()  # they index the channels of the layer's cell
        if len({*values}) < len(values) or not {*values} <= {*range(layer.rank)}:
            numbers = f"distinct numbers from 0 to {layer.rank - 1}"
            problems.append(f"{name} must be {numbers}, and is {values[:8]}")
    return problems
