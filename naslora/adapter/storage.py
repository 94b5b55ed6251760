"""Adapters on disk: adapter_config.json and adapter_model.safetensors, only what was trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from naslora.adapter.applied import Method, applied, apply_method, find_method, own_names
from naslora.adapter.config import OUTPUT_FIELDS, MethodConfig, NASLoRAConfig
from naslora.adapter.injection import inject
from naslora.adapter.modules import adapter_layers, undone_on_error
from naslora.errors import UserError
from naslora.files import read_json, read_safetensors, replaced_file, write_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


@dataclass(frozen=True)
class Description:
    """The content of adapter_config.json."""

    method: str | None
    """Name of the method; None for a model of ``inject`` or one without adapters."""
    config: dict[str, Any] | None
    """Fields of the method's configuration; None for a model without adapters."""
    layers: list[str]
    """Names of the NAS-LoRA layers."""


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Saves what was trained: the adapters, and every other parameter that requires gradients.

    Both files are replaced atomically.

    Args:
        model: a model that ``inject`` or ``naslora.methods.apply`` adapted, or one without adapters
            of which a part is trained.
        directory: created if it does not exist.

    Raises:
        UserError: the model has no adapter and no trainable parameter.
    """
    directory = Path(directory)
    layers = dict(adapter_layers(model))
    tensors = trained_state(model)
    if not tensors:
        raise UserError("there is nothing to save: the model has no adapter and nothing trainable")
    present = applied(model)
    config: MethodConfig | None = None
    if present is not None:
        config = present.config
    elif layers:
        config = next(iter(layers.values())).config
    description = {
        "method": present.name if present else None,
        "config": config.to_dict() if config else None,
        "layers": list(layers),
    }
    write_json(directory / CONFIG_NAME, description)
    with replaced_file(directory / WEIGHTS_NAME) as temporary:
        save_file({k: v.cpu().contiguous() for k, v in _once(tensors).items()}, temporary)


def load_adapter(model: nn.Module, directory: str | Path, methods: Mapping[str, Method]) -> None:
    """``naslora.load_adapter`` with a table of methods.

    Args:
        model: as there.
        directory: as there.
        methods: the methods that a file may name, by their names.

    Raises:
        UserError: as there.
    """
    directory = Path(directory)
    stored = _read_description(directory / CONFIG_NAME)
    tensors = read_safetensors(directory / WEIGHTS_NAME)
    with undone_on_error(model):
        if applied(model) is None and not any(adapter_layers(model)):
            _adapt(model, stored, methods)
        problems = [
            *_differing_layers(model, stored),
            *_differing_settings(model, stored, methods),
            *_differing_tensors(model, tensors),
        ]
        if problems:
            listed = "; ".join(problems[:6]) + ("; ..." if len(problems) > 6 else "")
            raise UserError(
                f"the adapter in {directory} does not fit this model ({len(problems)} mismatches): "
                f"{listed}"
            )
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    # TinyViT caches its attention biases in evaluation mode; a change of mode drops the cache.
    training = model.training
    model.train()
    model.train(training)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors and every other parameter that requires gradients, by their names in
    ``model.state_dict()``."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = trainable | adapter_names(model)
    return {n: tensor.detach() for n, tensor in model.state_dict().items() if n in names}


def adapter_names(model: nn.Module) -> set[str]:
    """The adapters' tensors, by their names in ``model.state_dict()``: parameters, alpha, channels,
    statistics of norms and frozen buffers."""
    ours = tuple(f"{name}." if name else "" for name, _ in adapter_layers(model))
    bases = tuple(f"{prefix}base." for prefix in ours)
    return own_names(model) | {
        name
        for name in model.state_dict()
        if ours and name.startswith(ours) and not name.startswith(bases)
    }


def _once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first of each group of tensors that share their memory, such as VeRA's matrices."""
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        first.setdefault((tensor.data_ptr(), tensor.shape) if tensor.numel() else name, name)
    return {name: tensors[name] for name in first.values()}


def _read_description(path: Path) -> Description:
    stored = read_json(path)
    if not (
        isinstance(stored, dict)
        and isinstance(stored.get("method"), str | None)
        and isinstance(stored.get("config", 0), dict | None)
        and isinstance(stored.get("layers"), list)
    ):
        raise UserError(f"{path} is not an adapter configuration of naslora")
    return Description(stored.get("method"), stored["config"], stored["layers"])


def _adapt(model: nn.Module, stored: Description, methods: Mapping[str, Method]) -> None:
    if stored.method is not None:
        method = find_method(methods, stored.method)
        apply_method(method, model, method.read_config(stored.config or {}))
    elif stored.config is not None:  # written for ``inject``, or by a version without methods
        inject(model, NASLoRAConfig.from_dict(stored.config))


def _differing_layers(model: nn.Module, stored: Description) -> list[str]:
    present = {name for name, _ in adapter_layers(model)}
    missing = [name for name in stored.layers if name not in present]
    surplus = [name for name, _ in adapter_layers(model) if name not in stored.layers]
    return [
        *(f"layer {name} is not adapted in the model" for name in missing),
        *(f"layer {name} is not in the file" for name in surplus),
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
        ours, fields, method = present.config, present.method.fields, present.method
    elif layer is not None:
        ours, fields, method = layer.config, OUTPUT_FIELDS, methods.get(stored.method or "")
    else:
        return []
    if stored.config is None:
        return []
    theirs = method.read_config(stored.config) if method else NASLoRAConfig.from_dict(stored.config)
    if type(theirs) is not type(ours):
        return [f"the method is {stored.method} in the file, the model has NAS-LoRA layers"]
    return [
        f"{field} is {getattr(theirs, field)} in the file, {getattr(ours, field)} here"
        for field in fields
        if getattr(ours, field) != getattr(theirs, field)
    ]


def _differing_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    state = model.state_dict()
    problems = []
    for name, tensor in tensors.items():
        if name not in state:
            problems.append(f"{name} is not in the model")
        elif state[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(state[name].shape)} in the model"
            problems.append(f"{name} has shape {shapes}")
    ours = adapter_names(model)
    expected = _once({name: tensor for name, tensor in state.items() if name in ours})
    problems += [
        f"{name} is missing in the file" for name in sorted(expected.keys() - tensors.keys())
    ]
    return problems
