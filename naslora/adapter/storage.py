"""Adapters on disk: adapter_config.json and adapter_model.safetensors, only what was trained."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from naslora.adapter.config import NASLoRAConfig
from naslora.adapter.injection import adapter_layers, inject, undone_on_error
from naslora.errors import UserError
from naslora.files import read_json, read_safetensors, replaced_file, write_json
from naslora.methods import METHODS, applied, apply, own_names

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Saves what was trained: the adapters, and every other parameter that requires gradients.

    Both files are replaced atomically.

    Args:
        model: a model that ``inject`` or ``naslora.methods.apply`` adapted, or one without adapters
            of which a part is trained.
        directory: created if need be.

    Raises:
        UserError: the model has nothing that was trained.
    """
    directory = Path(directory)
    layers = dict(adapter_layers(model))
    tensors = trained_state(model)
    if not tensors:
        raise UserError("there is nothing to save: the model has no adapter and nothing trainable")
    method = applied(model)
    config = method or next(iter(layers.values()), None)
    description = {
        "method": method.name if method else None,
        "config": config.config.to_dict() if config else None,
        "layers": list(layers),
    }
    write_json(directory / CONFIG_NAME, description)
    with replaced_file(directory / WEIGHTS_NAME) as temporary:
        save_file({k: v.cpu().contiguous() for k, v in _once(tensors).items()}, temporary)


def load_adapter(model: nn.Module, directory: str | Path) -> None:
    """Loads what ``save_adapter`` saved, exactly; a model without adapters gets them first.

    That freezes what applying or injecting them freezes: to train on, unfreeze it again.

    Args:
        model: the model that was adapted, in its own or in its original form.
        directory: the folder that ``save_adapter`` wrote.

    Raises:
        UserError: a file is missing or damaged, or does not fit the model; the message lists the
            mismatches. The model is then as it was.
    """
    directory = Path(directory)
    stored = read_json(directory / CONFIG_NAME)
    if not _is_adapter_configuration(stored):
        raise UserError(f"{directory / CONFIG_NAME} is not an adapter configuration of naslora")
    tensors = read_safetensors(directory / WEIGHTS_NAME)
    config = NASLoRAConfig.from_dict(stored["config"]) if stored["config"] else None
    with undone_on_error(model):
        if applied(model) is None and not any(adapter_layers(model)):
            _adapt(model, stored.get("method"), config)
        _check_fit(model, stored, config, tensors, directory)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    # TinyViT caches its attention biases in evaluation mode; a change of mode drops the cache.
    training = model.training
    model.train()
    model.train(training)


def _adapt(model: nn.Module, method: str | None, config: NASLoRAConfig | None) -> None:
    if method is not None:
        apply(method, model, config or NASLoRAConfig())
    elif config is not None:  # ``inject`` made it, or a version without methods
        inject(model, config)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors and every other parameter that requires gradients, by their names in
    ``model.state_dict()``."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = trainable | adapter_names(model)
    return {n: tensor.detach() for n, tensor in model.state_dict().items() if n in names}


def adapter_names(model: nn.Module) -> set[str]:
    """What belongs to the adapters - alpha, channels, statistics and frozen buffers included - by
    names in ``model.state_dict()``."""
    ours = tuple(f"{name}." if name else "" for name, _ in adapter_layers(model))
    bases = tuple(f"{prefix}base." for prefix in ours)
    return own_names(model) | {
        name
        for name in model.state_dict()
        if ours and name.startswith(ours) and not name.startswith(bases)
    }


def _once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors that share their memory, as the layers' frozen matrices do in VeRA, the first."""
    first: dict[tuple[int, torch.Size] | str, str] = {}
    for name, tensor in tensors.items():
        first.setdefault((tensor.data_ptr(), tensor.shape) if tensor.numel() else name, name)
    return {name: tensors[name] for name in first.values()}


def _is_adapter_configuration(stored: object) -> bool:
    return (
        isinstance(stored, dict)
        and isinstance(stored.get("method"), str | None)
        and isinstance(stored.get("config", 0), dict | None)
        and isinstance(stored.get("layers"), list)
    )


def _check_fit(
    model: nn.Module,
    stored: dict[str, Any],
    config: NASLoRAConfig | None,
    tensors: dict[str, Tensor],
    directory: Path,
) -> None:
    """Raises a UserError that lists every way in which the stored adapter does not fit."""
    layers, present, method = stored["layers"], dict(adapter_layers(model)), applied(model)
    problems = [
        f"layer {name} is not adapted in the model" for name in layers if name not in present
    ]
    problems += [f"layer {name} is not in the file" for name in present if name not in layers]
    if method and stored.get("method") not in (None, method.name):
        problems.append(f"the method is {stored['method']} in the file, {method.name} here")
    elif config:
        problems += _differing_fields(model, config)
    state = model.state_dict()
    for name, tensor in tensors.items():
        if name not in state:
            problems.append(f"{name} is not in the model")
        elif state[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(state[name].shape)} in the model"
            problems.append(f"{name} has shape {shapes}")
    ours = adapter_names(model)
    expected = _once({name: tensor for name, tensor in state.items() if name in ours})
    problems += [f"{name} is missing in the file" for name in sorted(expected - tensors.keys())]
    if problems:
        listed = "; ".join(problems[:6]) + ("; ..." if len(problems) > 6 else "")
        raise UserError(
            f"the adapter in {directory} does not fit this model ({len(problems)} mismatches): "
            f"{listed}"
        )


def _differing_fields(model: nn.Module, config: NASLoRAConfig) -> list[str]:
    """How the model's configuration differs from a stored one in what the tensors do not show."""
    method, layer = applied(model), next((layer for _, layer in adapter_layers(model)), None)
    ours = method or layer
    fields = METHODS[method.name].fields if method else METHODS["nas-pc-lora"].fields
    return [
        f"{field} is {getattr(config, field)} in the file, {getattr(ours.config, field)} here"
        for field in fields
        if ours and getattr(ours.config, field) != getattr(config, field)
    ]
