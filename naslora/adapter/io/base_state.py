"""The frozen model inside an adapted one: its tensors under the names they had before ``inject``.

Transformers' ``save_pretrained`` writes a model's state dict, and ``from_pretrained`` drops names
that it does not know, such as ``attn.qkv.base.weight``. So ``inject`` puts a function in front of
the method.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, distributed, nn
from torch.nn.modules.module import _IncompatibleKeys

from naslora.adapter.io.storage import (
    adapter_names,
    base_checksum,
    selected_state,
    unshared,
    write_adapter,
)
from naslora.adapter.io.wrappers import bare_state, fill, gathered, unwrap, writes_together
from naslora.adapter.layer.applied import applied
from naslora.adapter.layer.modules import adapter_layers, bare_layers
from naslora.adapter.merging.merged import MergedNASLoRALinear, merged_modules
from naslora.errors import UserError, listing

ADAPTER_FOLDER = "naslora_adapter"
"""The folder for ``load_adapter`` inside the one that ``save_pretrained`` writes."""


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors but the adapters', under the names they had before ``inject``.

    The state dict loads strictly into an unadapted model. Other parts that were trained, such as a
    mask decoder, are in it as they are now.

    Args:
        model: a model that ``inject`` or ``naslora.methods.apply`` gave NAS-LoRA layers, inside
            wrappers or not. With sharded tensors every process must call this, and gets them whole.

    Returns:
        The tensors, which share the model's memory unless they were sharded.

    Raises:
        UserError: the model is merged, or adapted with another method.
    """
    return {name: gathered(tensor) for name, tensor in _base_tensors(model).items()}


def load_base_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], strict: bool = True
) -> _IncompatibleKeys:
    """Loads a checkpoint of the unadapted model into an adapted one. The adapter stays as it is.

    Args:
        model: as in ``base_state_dict``.
        state: the tensors under the names of the unadapted model, with the parts of wrappers
            (``module.``) or without.
        strict: whether missing and unexpected names are an error.

    Returns:
        ``missing_keys``, names of the model that the state dict lacks, and ``unexpected_keys``,
        names of the state dict that the model lacks, as ``Module.load_state_dict`` returns them.

    Raises:
        UserError: as ``base_state_dict``; ``state`` is no mapping of tensors, or does not fit the
            model. The model is then unchanged.
    """
    targets, original = _base_tensors(model), _original_names(model)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError("state must be a state dict, a mapping from names to tensors")
    own = {}
    for name, tensor in state.items():
        bare = name.replace("_orig_mod.", "").removeprefix("module.")
        names = (name, bare, original.get(bare))
        own[next((known for known in names if known in targets), name)] = tensor
    missing = [name for name in targets if name not in own]
    unexpected = [name for name in own if name not in targets]
    if strict and (missing or unexpected):
        raise UserError(
            f"the state dict does not fit the model: it lacks {listing(missing)}; the model lacks "
            f"{listing(unexpected)}"
        )
    fitting = {name: tensor for name, tensor in own.items() if name in targets}
    for name, tensor in fitting.items():
        if tensor.shape != targets[name].shape:
            shapes = f"{tuple(tensor.shape)} in the state dict, {tuple(targets[name].shape)} here"
            raise UserError(f"{name} has shape {shapes}")
    adapted = {new: name for name, new in original.items()}
    fill(model, {adapted.get(name, name): tensor for name, tensor in fitting.items()})
    return _IncompatibleKeys(missing, unexpected)


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``base_state_dict``, not gathered."""
    if any(merged_modules(model)):
        raise UserError("the model is merged, so its weights have changed: call unmerge first")
    present = applied(unwrap(model))
    if present is not None and not any(adapter_layers(model)):
        raise UserError(
            f"the model is adapted with method {present.method.name}; only models with NAS-LoRA "
            "layers have a base state dict"
        )
    original, adapter = _original_names(model), adapter_names(model)
    state = bare_state(model)
    return {original.get(name, name): state[name] for name in state if name not in adapter}


def _original_names(model: nn.Module) -> dict[str, str]:
    """The names of the adapted layers' weights and biases, mapped to those before ``inject``."""
    if any("base" not in layer._modules for _, layer in adapter_layers(model)):
        raise UserError(
            "the adapter belongs to a PeftModel: call its save_pretrained, or its "
            "merge_and_unload or unload first"
        )
    prefixes = [f"{name}." if name else "" for name in bare_layers(model)]
    return {f"{p}base.{leaf}": f"{p}{leaf}" for p in prefixes for leaf in ("weight", "bias")}


# ---- Transformers --------------------------------------------------------------------------------


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in front of a model's ``save_pretrained``, whose arguments it takes.

    It writes the weights under the names they had before ``inject``, so that ``from_pretrained``
    finds all of them. The adapter's tensors stand beside them, so that Transformers' ``Trainer``
    resumes. ``load_adapter`` reads the adapter from the folder ``naslora_adapter``.

    Raises:
        UserError: the model is merged with mode "exact", the method takes no state dict, or the
            argument ``push_to_hub`` is given.
    """
    own = type(model).save_pretrained
    if any(isinstance(module, MergedNASLoRALinear) for module in model.modules()):
        raise UserError(
            "save_pretrained cannot store a model merged with mode 'exact': call "
            "naslora.save_merged(model, directory), or merge with mode 'center'"
        )
    transformers_saves = getattr(model, "_hf_peft_config_loaded", False)  # the adapter alone
    if transformers_saves or not any(adapter_layers(model)):
        return own(model, *args, **kwargs)
    original, signature = _original_names(model), inspect.signature(own)
    if "state_dict" not in signature.parameters:
        raise UserError(
            f"{type(model).__name__}.save_pretrained cannot store an adapted model: call "
            "naslora.save_adapter(model, directory)"
        )
    given = signature.bind(model, *args, **kwargs)
    if given.arguments.get("push_to_hub"):
        raise UserError(
            "save_pretrained(push_to_hub=True) leaves out the adapter's folder: call "
            "model.push_to_hub(repo_id)"
        )
    state = given.arguments.get("state_dict")
    if state is None:
        state = {name: gathered(tensor) for name, tensor in bare_state(model).items()}
    given.arguments["state_dict"] = {original.get(n, n): value for n, value in state.items()}
    result = own(*given.args, **given.kwargs)
    names = unshared(selected_state(model, "trainable"))
    adapter = {name: state[name] for name in names if name in state}
    complete = len(adapter) == len(names)  # the caller may have passed a part of the tensors
    first = not (writes_together(model) and distributed.get_rank())
    if complete and first and given.arguments.get("is_main_process", True):
        folder = Path(given.arguments["save_directory"]) / ADAPTER_FOLDER
        write_adapter(model, folder, adapter, base_checksum(model, names, state))
    return result


def override_save_pretrained(model: nn.Module) -> None:
    """Puts ours in front of the ``save_pretrained`` of the adapted model and of its parts."""
    for module in model.modules():
        if hasattr(type(module), "save_pretrained") and any(adapter_layers(module)):
            vars(module)["save_pretrained"] = partial(_save_pretrained, module)
