"""Merged models on disk: merged.json and model.safetensors, the whole merged model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from torch import Tensor, nn

from naslora.adapter.io.storage import PEFT_TYPE, base_model, unshared
from naslora.adapter.io.wrappers import bare_paths, bare_state, fill, unwrap
from naslora.adapter.layer.modules import adapter_layers, undone_on_error
from naslora.adapter.merging.merged import merged_modules, restore_merged
from naslora.errors import UserError, listing
from naslora.files import read_json, read_safetensors, reading, write_json, write_tensors
from naslora.state_dicts import check_fit, mismatches, weights_checksum

MERGED_CONFIG = "merged.json"
MERGED_WEIGHTS = "model.safetensors"


class Merged(msgspec.Struct):
    """What is read of merged.json."""

    layers: Annotated[list[str], msgspec.Meta(min_length=1)]
    """The merged layers' names."""
    config: dict[str, Any] = {}
    """The configuration of the run, if ``naslora merge`` wrote the folder."""
    weights_checksum: str | None = None
    """None compares nothing."""


def save_merged(
    model: nn.Module, directory: str | Path, details: Mapping[str, Any] | None = None
) -> None:
    """Saves a merged model as a whole. ``load_merged`` reads it.

    Both files are replaced atomically.

    Args:
        model: a merged model, inside wrappers or not.
        directory: created if it does not exist.
        details: further entries of merged.json, JSON-ready.

    Raises:
        UserError: the model is not merged.
    """
    paths = bare_paths(model)
    layers = [paths[name] for name, _ in merged_modules(model)]
    if not layers:
        raise UserError("the model is not merged: call merge first, or save_adapter")
    tensors = unshared(bare_state(model))
    description = {
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": base_model(model),
        "layers": layers,
        "weights_checksum": merged_checksum(tensors),
        **(details or {}),
    }
    write_tensors(Path(directory) / MERGED_WEIGHTS, tensors)
    write_json(Path(directory) / MERGED_CONFIG, description)


def merged_checksum(tensors: Mapping[str, Tensor]) -> str:
    """The checksum in merged.json. The order of names does not depend on the host."""
    ordered = (tensors[name] for name in sorted(tensors))
    return weights_checksum(tensor for tensor in ordered if tensor.is_floating_point())


def load_merged(model: nn.Module, directory: str | Path) -> None:
    """Loads the folder of ``save_merged`` or ``naslora merge`` into the original model, exactly.

    Raises:
        UserError: the model is adapted or merged, a file is missing or damaged, or does not fit the
            model. The message lists the mismatches. The model is then unchanged.
    """
    if any(adapter_layers(model)) or any(merged_modules(model)):
        raise UserError("load_merged needs the original model: this one is adapted or merged")
    directory = Path(directory)
    stored = read_merged(directory / MERGED_CONFIG)
    tensors = read_safetensors(directory / MERGED_WEIGHTS)
    what = f"the merged model in {directory}"
    with reading(directory, "does not hold a whole merged model"), undone_on_error(model):
        linear = {n for n, m in unwrap(model).named_modules() if isinstance(m, nn.Linear)}
        if not linear.issuperset(stored.layers):
            lacking = listing({*stored.layers} - linear)
            raise UserError(f"{what} does not fit this model: it has no nn.Linear {lacking}")
        restore_merged(unwrap(model), stored.layers, tensors)
        state = bare_state(model)
        check_fit(what, mismatches(tensors, state, unshared(state)))
        if stored.weights_checksum not in (None, merged_checksum(tensors)):
            raise UserError(
                f"{directory / MERGED_WEIGHTS} holds other weights than {MERGED_CONFIG} says: use "
                "the files of one merge"
            )
    fill(model, tensors)


def read_merged(path: Path) -> Merged:
    """Reads merged.json.

    Raises:
        UserError: the file is missing or damaged, or describes no merged model.
    """
    with reading(path, "describes no merged model"):
        return msgspec.convert(read_json(path), Merged)
