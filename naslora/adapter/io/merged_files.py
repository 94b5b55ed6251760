"""Merged models on disk: merged.json and model.safetensors, the whole merged model."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor, nn

from naslora.adapter.io.storage import PEFT_TYPE, base_model, unshared
from naslora.adapter.io.wrappers import (
    bare_paths,
    bare_state,
    copy_into,
    drop_caches,
    gathered,
    one_writer,
    reshard,
    unwrap,
)
from naslora.adapter.layer.modules import adapter_layers, check_model, undone_on_error
from naslora.adapter.merging.merged import merged_modules, restore_merged
from naslora.errors import UserError, listing
from naslora.files import (
    read_json,
    read_safetensors,
    reading,
    write_json,
    write_tensors,
)
from naslora.state_dicts import tensor_problems, weights_checksum

MERGED_CONFIG = "merged.json"
MERGED_WEIGHTS = "model.safetensors"


class _Layer(msgspec.Struct):
    name: str


class _Report(msgspec.Struct):
    layers: list[_Layer] = []


class Merged(msgspec.Struct):
    """What is read of merged.json. ``save_merged`` writes no report and no config."""

    layers: list[str] = []
    report: _Report = msgspec.field(default_factory=_Report)
    config: dict[str, Any] = {}
    weights_checksum: str | None = None
    """None compares nothing."""

    @property
    def names(self) -> list[str]:
        """The merged layers' names."""
        return self.layers or [layer.name for layer in self.report.layers]


def save_merged(model: nn.Module, directory: str | Path) -> None:
    """Saves a merged model as a whole. ``load_merged`` reads it.

    Both files are replaced atomically.

    Args:
        model: a merged model, inside wrappers or not. With sharded tensors every process must call
            this, and the first one writes.
        directory: created if it does not exist.

    Raises:
        UserError: the model is not merged.
    """
    check_model(model)
    paths = bare_paths(model)
    layers = [paths[name] for name, _ in merged_modules(model)]
    if not layers:
        raise UserError("the model is not merged: call merge first, or save_adapter")
    tensors = merged_state(model)
    description = {
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": base_model(model),
        "layers": layers,
        "weights_checksum": merged_checksum(tensors),
    }
    directory = Path(directory)
    with one_writer(model) as writes:
        if writes:
            write_tensors(directory / MERGED_WEIGHTS, tensors)
            write_json(directory / MERGED_CONFIG, description)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """What model.safetensors holds: all tensors, gathered, those that share memory once."""
    return {name: gathered(tensor) for name, tensor in unshared(bare_state(model)).items()}


def merged_checksum(tensors: Mapping[str, Tensor]) -> str:
    """The checksum of a merged model's weights, which merged.json holds."""
    ordered = (tensors[name] for name in sorted(tensors))
    return weights_checksum(tensor for tensor in ordered if tensor.is_floating_point())


def load_merged(model: nn.Module, directory: str | Path) -> None:
    """Loads what ``save_merged`` or ``naslora merge`` wrote, exactly, in place.

    Args:
        model: the original model, unadapted.
        directory: the folder.

    Raises:
        UserError: the model is adapted or merged, a file is missing or damaged, or does not fit the
            model. The message lists the mismatches. The model is then unchanged.
    """
    check_model(model)
    if any(adapter_layers(model)) or any(merged_modules(model)):
        raise UserError("load_merged needs the original model: this one is adapted or merged")
    directory = Path(directory)
    stored = read_merged(directory / MERGED_CONFIG)
    names = stored.names
    tensors = read_safetensors(directory / MERGED_WEIGHTS)
    reshard(model)
    with reading(directory, "does not hold a whole merged model"), undone_on_error(model):
        missing = [name for name in names if not _has_linear(unwrap(model), name)]
        if missing:
            raise UserError(
                f"the merged model in {directory} does not fit this model: it has no nn.Linear "
                f"{listing(missing)}"
            )
        restore_merged(unwrap(model), names, tensors)
        state = bare_state(model)
        problems = _mismatches(state, tensors)
        if problems:
            listed = "; ".join(problems[:6]) + ("; ..." if len(problems) > 6 else "")
            raise UserError(f"{directory} does not hold a whole merged model: {listed}")
        if stored.weights_checksum not in (None, merged_checksum(tensors)):
            raise UserError(
                f"{directory / MERGED_WEIGHTS} holds other weights than {MERGED_CONFIG} says: use "
                "the files of one merge"
            )
    for name, tensor in tensors.items():
        copy_into(state[name], tensor)
    drop_caches(model)


def read_merged(path: Path) -> Merged:
    """Reads merged.json.

    Raises:
        UserError: the file is missing or damaged, or describes no merged model.
    """
    with reading(path, "describes no merged model"):
        merged = msgspec.convert(read_json(path), Merged)
        if not merged.names:
            raise ValueError("it names no layer")
    return merged


def _has_linear(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), nn.Linear)
    except AttributeError:
        return False


def _mismatches(state: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    expected: Collection[str] = unshared(state)
    return [
        *(f"{name} is missing in the file" for name in expected if name not in tensors),
        *(problem for name in tensors for problem in tensor_problems(name, tensors[name], state)),
    ]
