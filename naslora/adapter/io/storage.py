"""Writes adapters: adapter_config.json and adapter_model.safetensors, only what was trained.

``loading.py`` reads them.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, distributed, nn

from naslora.adapter.io.wrappers import bare_state, gathered, is_sharded, unwrap, writes_together
from naslora.adapter.layer.applied import applied, image_encoder
from naslora.adapter.layer.config import MethodConfig, TargetConfig
from naslora.adapter.layer.modules import NAMED, adapter_layers, bare_layers
from naslora.adapter.layer.targets import compiled, target_name
from naslora.adapter.merging.merged import merged_modules
from naslora.errors import UserError, listing
from naslora.files import write_json, write_tensors
from naslora.settings import checked
from naslora.state_dicts import weights_checksum

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_TYPE = "NASLORA"

Include = Literal["trainable", "adapter"] | Iterable[str]
"""What is saved: see ``save_adapter``."""


@dataclass(frozen=True)
class Description:
    """The content of adapter_config.json."""

    config: dict[str, Any] | None
    """Fields of the method's configuration; None for a model without adapters."""
    layers: list[str]
    """Names of the NAS-LoRA layers."""
    method: str | None = None
    """Name of the method; None for a model of ``inject`` or one without adapters."""
    target: str | None = None
    """The named target that the layers make up; None for other layers."""
    base_model_name_or_path: str | None = None
    """Where Transformers loaded the model from; None for other models."""
    other_tensors: list[str] | None = None
    """Names of the tensors beside the adapters', such as a mask decoder's, in the file with the
    weights."""
    unsaved_tensors: list[str] | None = None
    """Names of further tensors that were trained, which the file with the weights leaves out."""
    base_checksum: str | None = None
    """The checksum of the frozen weights under the adapter; None compares nothing."""
    peft_type: str | None = None
    """PEFT_TYPE, or None for a model without NAS-LoRA layers. PEFT's files have it, too."""


def save_adapter(model: nn.Module, directory: str | Path, include: Include = "trainable") -> None:
    """Saves what was trained, under the names of the model without any wrappers.

    Both files are replaced atomically.

    Args:
        model: a model that ``inject`` or ``naslora.methods.apply`` adapted, or one without adapters
            of which a part is trained. It may be inside wrappers such as DistributedDataParallel or
            ``torch.compile``. With sharded tensors (``fully_shard``) every process must call this,
            and the first one writes.
        directory: created if it does not exist.
        include: "trainable" saves the adapters, every other parameter that requires gradients, and
            the statistics of norms whose parameters do. "adapter" saves the adapters alone. Regular
            expressions save the adapters and the tensors in whose names one of them is found.

    Raises:
        UserError: the model is merged, its adapters are disabled, it has no adapter and nothing
            else to save, or a regular expression matches nothing.
    """
    tensors = selected_state(model, include)
    if not tensors:
        raise UserError("there is nothing to save: the model has no adapter and nothing trainable")
    whole = {name: gathered(tensor) for name, tensor in unshared(tensors).items()}
    checksum = base_checksum(model, {*trained_state(model), *whole})
    together = writes_together(model)
    try:
        if not together or distributed.get_rank() == 0:
            write_adapter(model, Path(directory), whole, checksum)
    finally:
        if together:
            distributed.barrier()


def write_adapter(
    model: nn.Module, directory: Path, tensors: Mapping[str, Tensor], checksum: str
) -> None:
    """Writes both files of an adapter: ``tensors``, and the ``checksum`` of the frozen weights."""
    present, layers, ours = applied(unwrap(model)), [*bare_layers(model)], adapter_names(model)
    config = applied_config(model)
    description = Description(
        config=config.to_dict() if config else None,
        layers=layers,
        method=present.method.name if present else None,
        target=target_name(config.target) if isinstance(config, TargetConfig) else None,
        base_model_name_or_path=base_model(model),
        other_tensors=sorted(tensors.keys() - ours),
        unsaved_tensors=sorted(trained_state(model).keys() - tensors.keys() - ours),
        base_checksum=checksum,
        peft_type=PEFT_TYPE if layers else None,
    )
    write_json(directory / CONFIG_NAME, asdict(description))
    write_tensors(directory / WEIGHTS_NAME, tensors)


def applied_config(model: nn.Module) -> MethodConfig | None:
    """The configuration of the model's method or, after ``inject``, of its layers."""
    present = applied(unwrap(model))
    if present is not None:
        return present.config
    return next((layer.config for _, layer in adapter_layers(model)), None)


def base_model(model: nn.Module) -> str | None:
    """Where Transformers loaded the model from, a name or a path; None for other models."""
    name = getattr(unwrap(model), "name_or_path", None)
    return name if isinstance(name, str) and name else None


def selected_state(model: nn.Module, include: Include) -> dict[str, Tensor]:
    """What ``save_adapter`` saves, by its names in the model without wrappers. Not gathered.

    Raises:
        UserError: the model is merged, its adapters are disabled, or ``include`` is wrong or
            matches nothing.
    """
    if any(merged_modules(model)):
        raise UserError(
            "the model is merged, so its adapter is folded away: call unmerge first, or save the "
            "merged model with save_merged"
        )
    if getattr(getattr(unwrap(model), NAMED, None), "disabled", False):
        raise UserError("the adapters are disabled: save them outside of disable_adapter")
    if include == "trainable":
        return trained_state(model)
    state, names = bare_state(model), adapter_names(model)
    if include != "adapter":
        for expression in checked("include", include, tuple[str, ...]):
            pattern = compiled("include", expression)
            matches = {name for name in state if pattern.search(name)}
            if not matches:
                raise UserError(
                    f"include: no tensor's name matches {expression!r}; the model has the "
                    f"parts {listing({name.partition('.')[0] for name in state})}"
                )
            names |= matches
    return {name: tensor.detach() for name, tensor in state.items() if name in names}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors, every other parameter that requires gradients, and the buffers beside
    such parameters (statistics of norms), by their names in the model without wrappers."""
    state, names = bare_state(model, keep_vars=True), adapter_names(model)
    trained = {name for name, tensor in state.items() if tensor.requires_grad}
    parts = {name.rpartition(".")[0] for name in trained}
    return {
        name: tensor.detach()
        for name, tensor in state.items()
        if name in trained
        or name in names
        or (not isinstance(tensor, nn.Parameter) and name.rpartition(".")[0] in parts)
    }


def adapter_names(model: nn.Module) -> set[str]:
    """The adapters' tensors, by their names in the model without wrappers: parameters, alpha,
    channels, statistics of norms and frozen buffers."""
    own, state = unwrap(model), bare_state(model)
    present = applied(own)
    names = set()
    if present is not None:
        prefix = next((n for n, m in own.named_modules() if m is image_encoder(own)), "")
        names = {f"{prefix}.{name}".lstrip(".") for name in present.tensors}
    ours = tuple(f"{name}." if name else "" for name in bare_layers(model))
    bases = tuple(f"{prefix}base." for prefix in ours)
    return names | {n for n in state if n.startswith(ours) and not n.startswith(bases)}


def base_checksum(
    model: nn.Module, trained: Collection[str], state: Mapping[str, Tensor] | None = None
) -> str:
    """The checksum of the frozen weights under an adapter: ``weights_checksum``, in model order.

    It depends neither on the adapter nor on names and wrappers. Position embeddings that
    ``build_model`` resized count as the checkpoint has them, because resizing them rounds
    differently on other processors.

    Args:
        model: the adapted model. Collective if it is sharded and ``state`` is None.
        trained: names of the tensors that are no frozen weights, beside the adapter's.
        state: the model's tensors in one piece, by their names.
    """
    own = bare_state(model)
    values = {**own, **(state or {}), **getattr(unwrap(model), "left_out", {})}
    names = own.keys() - {*trained, *adapter_names(model)}
    return weights_checksum(
        gathered(values[name])
        for name, tensor in own.items()
        if name in names and tensor.is_floating_point()
    )


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first of each group of tensors that share their memory, such as VeRA's matrices."""
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        local: Any = tensor
        if is_sharded(tensor):
            local = local.to_local()
        first.setdefault((local.data_ptr(), tensor.shape) if local.numel() else name, name)
    return {name: tensors[name] for name in first.values()}
