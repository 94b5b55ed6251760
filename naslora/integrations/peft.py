"""NAS-LoRA inside PEFT, through PEFT's registration of custom LoRA modules.

PEFT lists its methods in a closed enumeration (``PeftType``), and ``register_peft_method`` refuses
names outside it. So NAS-LoRA registers as a custom module of PEFT's LoRA: ``NasLoraConfig`` is a
``LoraConfig`` that makes PEFT's LoRA build ``NasLoraLinear`` instead of its own layers. Its files
name the type "NASLORA", which a plain ``PeftModel.from_pretrained`` refuses; without that, PEFT
would build plain LoRA layers and drop the cells.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from naslora.adapter.io.base_state import override_save_pretrained
from naslora.adapter.io.storage import PEFT_TYPE
from naslora.adapter.layer.calls import host_calls, shown, watch
from naslora.adapter.layer.config import CellInit, ChannelSelection, NASLoRAConfig
from naslora.adapter.layer.frozen_norms import keep_frozen
from naslora.adapter.layer.grid import place_hint
from naslora.adapter.layer.layer import NASLoRALinear, layer_generator
from naslora.adapter.layer.targets import TARGETS
from naslora.adapter.merging.merge import merge as merge_model
from naslora.errors import UserError

# The options of LoRA that NAS-LoRA has, too. All others must have PEFT's default value.
SUPPORTED = {
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
}


@dataclass
class NasLoraConfig(LoraConfig):
    """Configuration of NAS-LoRA for PEFT's ``get_peft_model``.

    A ``LoraConfig`` with the fields of ``NASLoRAConfig``. ``target_modules`` is PEFT's: a list of
    suffixes, or a regular expression that matches the whole name.

    Raises:
        UserError: a value is out of its range, or an option of LoRA is set that the cell does not
            support.
    """

    r: int = 3
    """LoRA rank: the number of channels between encoder and decoder."""
    lora_alpha: int = 32
    """Numerator of the scaling lora_alpha / r of the adapter's output."""
    target_modules: list[str] | str | None = TARGETS[str(NASLoRAConfig.target)]
    """The nn.Linear layers to adapt."""
    channel_ratio: float = 2 / 3
    """As in ``NASLoRAConfig``, and so are the fields below."""
    preset: str = "linear"
    channel_selection: ChannelSelection = "first"
    cell_init: CellInit = "skip"
    skip_lead: float = 3.0
    operations: tuple[str, ...] | None = None
    prefix_tokens: int = 0
    seed: int = 0
    backend: str | None = None

    def __post_init__(self) -> None:
        for option in dataclasses.fields(LoraConfig):
            factory: Any = option.default_factory
            off = option.default if factory is dataclasses.MISSING else factory()
            value, name = getattr(self, option.name), option.name
            if value != off and name not in SUPPORTED and not hasattr(PeftConfig, name):
                raise UserError(f"{name} must be {off!r}, got {value!r}: NAS-LoRA has no such part")
        super().__post_init__()
        self.adapter_config(self.r, self.lora_alpha)  # checks the values
        self._register_custom_module({nn.Linear: cast(type[nn.Module], NasLoraLinear)})

    def adapter_config(self, rank: int, lora_alpha: float) -> NASLoRAConfig:
        """The configuration of one layer, whose rank and alpha PEFT's patterns may change."""
        shared = {field.name for field in dataclasses.fields(NASLoRAConfig)}
        own = {field.name for field in dataclasses.fields(NasLoraConfig)} & shared
        values = {name: getattr(self, name) for name in own - {"rank", "lora_alpha"}}
        return NASLoRAConfig(rank=rank, lora_alpha=lora_alpha, **values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, with ``peft_type`` "NASLORA"."""
        return {**super().to_dict(), "peft_type": PEFT_TYPE}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> "NasLoraConfig":
        """The inverse of ``to_dict``.

        Raises:
            UserError: the file describes another method of PEFT.
        """
        kind = kwargs.pop("peft_type", PEFT_TYPE)
        if kind != PEFT_TYPE:
            raise UserError(f"peft_type must be {PEFT_TYPE}, got {kind!r}; load it with PEFT")
        return cls(**kwargs)


class NasLoraAdapter(NASLoRALinear):
    """One adapter of a ``NasLoraLinear``: a ``NASLoRALinear`` under names that PEFT can store.

    The base belongs to the ``NasLoraLinear``, so it is no submodule here. PEFT inserts the
    adapter's name behind the last "lora_" of a tensor's name, so a state dict holds lora_A and
    lora_B as ``encoder`` and ``decoder``, and the cell's tensors as ``cell_NAME``. Functions that
    find NAS-LoRA layers by their type find these: ``arch_parameters``, ``AlphaSearch``, ``merge``.
    """

    def __init__(
        self, base: nn.Linear, config: NASLoRAConfig, generator: torch.Generator | None = None
    ) -> None:
        # Until ``_held`` exists, the property raises AttributeError, and torch's own lookup finds
        # what the parent class registers.
        super().__init__(base, config, generator)
        self._held = [self._modules.pop("base")]  # in a list, torch does not see a submodule

    @property
    def base(self) -> nn.Linear:  # type: ignore[override]
        """The frozen nn.Linear."""
        return cast(nn.Linear, self._held[0])

    def state_dict(  # type: ignore[override]
        self, *args: Any, prefix: str = "", **options: Any
    ) -> dict[str, Any]:
        """As in torch, under the names for PEFT."""
        state = super().state_dict(*args, prefix=prefix, **options)
        for name in [name for name in state if name.startswith(prefix)]:
            state[prefix + _stored(name.removeprefix(prefix))] = state.pop(name)
        return state

    def _load_from_state_dict(self, state: Any, prefix: str, *arguments: Any) -> None:
        for name in super().state_dict():
            if prefix + _stored(name) in state:
                state[prefix + name] = state.pop(prefix + _stored(name))
        super()._load_from_state_dict(state, prefix, *arguments)


def _stored(name: str) -> str:
    return {"lora_A": "encoder", "lora_B": "decoder"}.get(name, name.replace(".", "_"))


class NasLoraLinear(nn.Module, LoraLayer):
    """PEFT's layer for NAS-LoRA: a frozen nn.Linear and its named adapters.

    Args:
        base_layer: the nn.Linear to adapt.
        adapter_name: the first adapter's name.
        r: LoRA rank.
        lora_alpha: numerator of the scaling.
        config: a ``NasLoraConfig``.
        kwargs: what PEFT passes to its layers beside; ``target_name`` seeds the random numbers.
    """

    adapter_layer_names = ("lora_nas",)
    other_param_names = ("r", "lora_alpha", "scaling")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: LoraConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.lora_nas = nn.ModuleDict()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Adds an adapter.

        Raises:
            UserError: ``config`` is not a ``NasLoraConfig``.
        """
        if not isinstance(config, NasLoraConfig):
            raise UserError(
                f"adapter {adapter_name!r}: this layer takes NasLoraConfig, got "
                f"{type(config).__name__}"
            )
        settings = config.adapter_config(r, lora_alpha)
        generator = layer_generator(config.seed, kwargs.get("target_name", ""))
        base = cast(nn.Linear, self.get_base_layer())
        adapter = NasLoraAdapter(base, settings, generator)
        for other in self.adapters()[:1]:  # what the host states of the tokens
            adapter.grid, adapter.hint, adapter.name = other.grid, other.hint, other.name
        self.lora_nas[adapter_name] = adapter
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = settings.scaling
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that reads a linear layer's device or dtype."""
        return shown(cast(nn.Linear, self.get_base_layer()).weight, self.adapters()[0].name)

    def adapters(self) -> list[NasLoraAdapter]:
        """All adapters of this layer."""
        return [cast(NasLoraAdapter, adapter) for adapter in self.lora_nas.values()]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, H, W, C_in) or (B, N, C_in) to the same with C_out, as ``NASLoRALinear``.

        Raises:
            UserError: the batch names an adapter for each sample (``adapter_names``).
        """
        if kwargs.get("adapter_names") is not None:
            raise UserError("adapter_names: NAS-LoRA has one adapter for a whole batch")
        active = [name for name in self.active_adapters if name in self.lora_nas]
        if self.disable_adapters or not active:
            return self.base_layer(x, *args)
        layers = [cast(NasLoraAdapter, self.lora_nas[name]) for name in active]
        for name, layer in zip(active, layers, strict=True):
            layer.scaling = self.scaling[name]  # PEFT may have rescaled it
        h = layers[0](x)
        for layer in layers[1:]:
            h = h + layer.update(x)
        return h

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Refuses: the cell mixes neighbouring tokens, so it does not fold into the base in place.

        Raises:
            UserError: always.
        """
        raise UserError(
            "merge_adapter cannot fold a NAS-LoRA cell in place; call merge_and_unload(), which "
            "is exact, or naslora.merge(model, 'center') before it"
        )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: Sequence[str] | None
    ) -> nn.Module:
        """What PEFT's ``unload`` and ``merge_and_unload`` put in this layer's place.

        Args:
            merge: False returns the untouched nn.Linear. True returns the layer that
                ``naslora.merge`` left, or else merges exactly.
            safe_merge: whether to refuse values that are not finite. They are refused always.
            adapter_names: the adapter to merge, one; None for the active one.

        Raises:
            UserError: several adapters, values that are not finite, or the model was not made by
                this module.
        """
        if not merge:
            return self.get_base_layer()
        names = [name for name in adapter_names or self.active_adapters if name in self.lora_nas]
        if len(names) != 1:
            raise UserError(f"one adapter merges at a time, got {', '.join(names) or 'none'}")
        alone = nn.Sequential(self.lora_nas[names[0]])
        if isinstance(alone[0], NASLoRALinear):
            if not alone[0].name:  # the host's save_pretrained does not know merged layers
                raise UserError(
                    "merge_and_unload needs a model of naslora.peft.get_peft_model or "
                    "naslora.peft.from_pretrained; or call naslora.merge(model, 'center') first"
                )
            alone[0].scaling = self.scaling[names[0]]
            merge_model(alone, "exact")
        return alone[0]

    def extra_repr(self) -> str:
        """The adapters' names, for ``print(model)``."""
        return f"adapters={list(self.lora_nas)}"


def get_peft_model(model: nn.Module, config: NasLoraConfig, **options: Any) -> PeftModel:
    """PEFT's ``get_peft_model``, which also does what ``inject`` does for the host.

    Frozen batch norms stay in evaluation mode after ``model.train()``. Layers that see token
    sequences take the grid that the host states. ``save_pretrained`` of the host refuses layers
    that were merged exactly. A warning names layers that the host does not call.

    Args:
        model: the base model; it is changed in place.
        config: the adapter's configuration.
        options: as PEFT's ``get_peft_model``, such as ``adapter_name``.

    Raises:
        UserError: ``config`` is not a ``NasLoraConfig``.
    """
    if not isinstance(config, NasLoraConfig):
        raise UserError(f"config must be a NasLoraConfig, got {type(config).__name__}")
    return _prepared(cast(PeftModel, peft.get_peft_model(model, config, **options)))


def _prepared(model: PeftModel) -> PeftModel:
    host = model.get_base_model()
    keep_frozen(host)
    layers = {n: m for n, m in host.named_modules() if isinstance(m, NasLoraLinear)}
    for name, layer in layers.items():
        host_calls(host, name)
        for adapter in layer.adapters():
            adapter.name = name
            place_hint(host, name, adapter)
    override_save_pretrained(host)
    watch(host, list(layers))
    return model


def from_pretrained(
    model: nn.Module, directory: str | Path, adapter_name: str = "default", **options: Any
) -> PeftModel:
    """``PeftModel.from_pretrained`` for NAS-LoRA.

    Args:
        model: the base model.
        directory: a folder of ``PeftModel.save_pretrained``, or a repository of the Hub.
        adapter_name: the adapter's name.
        options: as ``PeftModel.from_pretrained``, such as ``is_trainable``.

    Raises:
        UserError: the files hold no NAS-LoRA adapter, or do not fit the model.
    """
    config = NasLoraConfig.from_pretrained(str(directory))
    config.inference_mode = not options.get("is_trainable", False)
    return _prepared(
        PeftModel.from_pretrained(model, str(directory), adapter_name, config=config, **options)
    )
