"""Adapters on disk: adapter_config.json and adapter_model.safetensors, only what was trained."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from naslora.config import NASLoRAConfig
from naslora.errors import UserError
from naslora.files import read_json, replaced_file, write_json
from naslora.injection import adapter_layers, inject, replace_module

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Saves what was trained: the adapters, and every other parameter that requires gradients.

    Both files are replaced atomically.

    Args:
        model: a model that ``inject`` adapted, or one without adapters of which a part is trained.
        directory: created if need be.

    Raises:
        UserError: the model has nothing that was trained.
    """
    directory = Path(directory)
    layers = dict(adapter_layers(model))
    tensors = trained_state(model)
    if not tensors:
        raise UserError("there is nothing to save: the model has no adapter and nothing trainable")
    config = next(iter(layers.values())).config.to_dict() if layers else None
    write_json(directory / CONFIG_NAME, {"config": config, "layers": list(layers)})
    with replaced_file(directory / WEIGHTS_NAME) as temporary:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary)


def load_adapter(model: nn.Module, directory: str | Path) -> None:
    """Loads what ``save_adapter`` saved, exactly; a model without adapters gets them injected.

    Injecting freezes everything but the adapters: to train a loaded decoder on, unfreeze it again.

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
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    injected = inject(model, config) if config and not any(adapter_layers(model)) else []
    try:
        _check_fit(model, config, stored["layers"], tensors, directory)
    except UserError:
        for name in injected:
            replace_module(model, name, model.get_submodule(name).base)
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors (alpha, channels and batch-norm statistics included) and every other
    parameter that requires gradients, by their names in ``model.state_dict()``."""
    ours = tuple(f"{name}." if name else "" for name, _ in adapter_layers(model))
    bases = tuple(f"{prefix}base." for prefix in ours)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if (ours and name.startswith(ours) and not name.startswith(bases)) or name in trainable
    }


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file to the CPU.

    Raises:
        UserError: it is missing, truncated or no safetensors file.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error


def _is_adapter_configuration(stored: object) -> bool:
    return (
        isinstance(stored, dict)
        and isinstance(stored.get("config", 0), dict | None)
        and isinstance(stored.get("layers"), list)
    )


def _check_fit(
    model: nn.Module,
    config: NASLoRAConfig | None,
    layers: list[str],
    tensors: dict[str, Tensor],
    directory: Path,
) -> None:
    """Raises a UserError that lists every way in which the stored adapter does not fit."""
    present = dict(adapter_layers(model))
    problems = [
        f"layer {name} is not adapted in the model" for name in layers if name not in present
    ]
    problems += [f"layer {name} is not in the file" for name in present if name not in layers]
    if config and present:
        ours = next(iter(present.values())).config
        for field in ("rank", "lora_alpha", "preset"):
            if getattr(ours, field) != getattr(config, field):
                problems.append(
                    f"{field} is {getattr(config, field)} in the file, {getattr(ours, field)} here"
                )
    state = model.state_dict()
    for name, tensor in tensors.items():
        if name not in state:
            problems.append(f"{name} is not in the model")
        elif state[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(state[name].shape)} in the model"
            problems.append(f"{name} has shape {shapes}")
    expected = {name for name in trained_state(model) if name.startswith(tuple(present))}
    problems += [f"{name} is missing in the file" for name in sorted(expected - tensors.keys())]
    if problems:
        listed = "; ".join(problems[:6]) + ("; ..." if len(problems) > 6 else "")
        raise UserError(
            f"the adapter in {directory} does not fit this model ({len(problems)} mismatches): "
            f"{listed}"
        )
