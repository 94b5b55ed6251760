"""Reads the adapters that ``storage.py`` wrote into a model, exactly or not at all."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor, nn

from naslora.adapter.io.base_state import override_save_pretrained
from naslora.adapter.io.storage import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Description,
    adapter_names,
    base_checksum,
    layer_names,
    unshared,
)
from naslora.adapter.io.wrappers import (
    bare_state,
    copy_into,
    drop_caches,
    reshard,
    unwrap,
)
from naslora.adapter.layer.applied import Method, applied, apply_method, find_method
from naslora.adapter.layer.config import OUTPUT_FIELDS, MethodConfig, NASLoRAConfig
from naslora.adapter.layer.injection import inject
from naslora.adapter.layer.modules import adapter_layers, check_model, undone_on_error
from naslora.adapter.merging.merged import merged_modules
from naslora.errors import UserError, listing
from naslora.files import read_json, read_safetensors
from naslora.state_dicts import tensor_problems

Config = TypeVar("Config", bound=MethodConfig)


def load_adapter(
    model: nn.Module, directory: str | Path, methods: Mapping[str, Method], check_base: bool = True
) -> None:
    """``naslora.load_adapter`` with a table of methods.

    Args:
        model: as there.
        directory: as there.
        methods: the methods that a file may name, by their names.
        check_base: as there.

    Raises:
        UserError: as there.
    """
    check_model(model)
    if any(merged_modules(model)):
        raise UserError("the model is merged: call unmerge before load_adapter")
    directory = Path(directory)
    stored = read_description(directory / CONFIG_NAME)
    tensors = read_safetensors(directory / WEIGHTS_NAME)
    _check_promise(directory, stored, tensors, methods)
    reshard(model)
    with undone_on_error(model):
        if applied(unwrap(model)) is None and not any(adapter_layers(model)):
            _adapt(unwrap(model), stored, methods)
            override_save_pretrained(model)
        state = bare_state(model)
        problems = [
            *_differing_layers(layer_names(model), stored),
            *_differing_settings(unwrap(model), stored, methods),
            *_differing_tensors(model, state, tensors),
        ]
        if problems:
            listed = "; ".join(problems[:6]) + ("; ..." if len(problems) > 6 else "")
            raise UserError(
                f"the adapter in {directory} does not fit this model ({len(problems)} mismatches): "
                f"{listed}"
            )
        trained = {*tensors, *(stored.unsaved_tensors or ())}
        expected = stored.base_checksum if check_base else None
        if expected is not None and expected != base_checksum(model, trained):
            raise UserError(
                f"the adapter in {directory} was trained on other frozen weights than this model "
                "has: load the checkpoint that it was trained on, or pass check_base=False"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            copy_into(state[name], tensor)
    drop_caches(model)


def read_description(path: Path) -> Description:
    """Reads adapter_config.json.

    Raises:
        UserError: the file is missing or is no adapter configuration of naslora.
    """
    try:
        return msgspec.convert(read_json(path), Description)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is not an adapter configuration of naslora: {error}") from error


def _check_promise(
    directory: Path, stored: Description, tensors: Collection[str], methods: Mapping[str, Method]
) -> None:
    """Refuses files that lack tensors which adapter_config.json promises."""
    missing = sorted({*(stored.other_tensors or ())} - {*tensors})
    if missing:
        raise UserError(
            f"{directory / WEIGHTS_NAME} lacks {len(missing)} of the tensors that {CONFIG_NAME} "
            f"names: {listing(missing, 3)}; use another copy"
        )
    prefixes = tuple(f"{layer}." if layer else "" for layer in stored.layers)
    method = methods.get(stored.method or "")
    searched = stored.method is None or (method is not None and method.config is NASLoRAConfig)
    promised = bool(prefixes) or (searched and stored.config is not None)
    if promised and not (prefixes and any(name.startswith(prefixes) for name in tensors)):
        raise UserError(
            f"{directory} holds no tensor of an adapter, although its {CONFIG_NAME} describes one: "
            "the model was merged before it was saved"
        )


def _adapt(model: nn.Module, stored: Description, methods: Mapping[str, Method]) -> None:
    if stored.method is not None:
        method = find_method(methods, stored.method)
        apply_method(method, model, _config(method.config, stored.config or {}))
    elif stored.config is not None:  # written for ``inject``, or by a version without methods
        # The layers' names in this model; it may hold the one that was adapted.
        config = _config(NASLoRAConfig, stored.config)
        inject(model, dataclasses.replace(config, target=tuple(stored.layers), blocks=None))


def _config(kind: type[Config], values: dict[str, Any]) -> Config:
    """The configuration that a file holds. It names the layers: a pattern would be run."""
    if isinstance(values.get("target", ()), str):
        raise UserError(f"target: expected the names of layers, got {values['target']!r:.80}")
    return kind.from_dict(values)


def _differing_layers(present: Collection[str], stored: Description) -> list[str]:
    return [
        *(f"layer {n} is not adapted in the model" for n in stored.layers if n not in present),
        *(f"layer {n} is not in the file" for n in present if n not in stored.layers),
    ]


def _differing_settings(
    model: nn.Module, stored: Description, methods: Mapping[str, Method]
) -> list[str]:
    """Differences of method and configuration that change the output of equal tensors."""
    present, layer = applied(model), next((layer for _, layer in adapter_layers(model)), None)
    ours: MethodConfig
    method: Method | None
    if present is not None:
        if stored.method not in (None, present.name):
            return [f"the method is {stored.method} in the file, {present.name} here"]
        ours, method = present.config, present.method
    elif layer is not None:
        ours, method = layer.config, methods.get(stored.method or "")
    else:
        return []
    if stored.config is None:
        return []
    theirs = _config(method.config if method else NASLoRAConfig, stored.config)
    if type(theirs) is not type(ours):
        return [f"the method is {stored.method} in the file, the model has NAS-LoRA layers"]
    return [
        f"{field} is {getattr(theirs, field)} in the file, {getattr(ours, field)} here"
        for field in OUTPUT_FIELDS
        if getattr(ours, field, None) != getattr(theirs, field, None)
    ]


def _differing_tensors(
    model: nn.Module, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> list[str]:
    problems = []
    for name, tensor in tensors.items():
        problems += tensor_problems(name, tensor, state)
    for name, (_, layer) in zip(layer_names(model), adapter_layers(model), strict=True):
        problems += _channel_problems(f"{name}.channels".lstrip("."), layer.rank, tensors)
    ours = adapter_names(model)
    expected = unshared({name: tensor for name, tensor in state.items() if name in ours})
    problems += [
        f"{name} is missing in the file" for name in sorted(expected.keys() - tensors.keys())
    ]
    return problems


def _channel_problems(name: str, rank: int, tensors: Mapping[str, Tensor]) -> list[str]:
    """Problems of the channels of a layer's cell, which index its ``rank`` channels."""
    channels = tensors.get(name)
    if channels is None or channels.is_floating_point() or channels.dim() != 1:
        return []  # reported as a missing tensor, a dtype or a shape
    values = channels.tolist()
    if len(set(values)) == len(values) and all(0 <= value < rank for value in values):
        return []
    return [f"{name} must be distinct numbers from 0 to {rank - 1}, and is {values[:8]}"]
