"""NAS-LoRA inside PEFT, through PEFT's registration of custom LoRA modules.

PEFT lists its methods in a closed enumeration (``PeftType``), and ``register_peft_method`` refuses
names outside it. So in memory NAS-LoRA is a custom module of PEFT's LoRA: ``NasLoraConfig`` is a
``LoraConfig`` that makes PEFT's LoRA build ``NasLoraLinear`` instead of its own layers. Plain LoRA
may stand beside it, on other layers. Its files name the type "NASLORA", so that PEFT without
naslora refuses them instead of building plain LoRA without the cells. Importing this module enters
two lines into PEFT's tables: the configuration of that type, and a tuner of LoRA that also prepares
the host of NAS-LoRA. From then on PEFT's own functions read and write these adapters.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, LoraModel, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from naslora.adapter.io.base_state import override_save_pretrained
from naslora.adapter.io.storage import PEFT_TYPE
from naslora.adapter.layer.adapted import shown
from naslora.adapter.layer.calls import host_calls, watch
from naslora.adapter.layer.config import CellInit, ChannelSelection, NASLoRAConfig
from naslora.adapter.layer.grid import place_hint
from naslora.adapter.layer.layer import NASLoRALinear, layer_generator
from naslora.adapter.layer.modules import adapter_layers, keep_frozen
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
    prefix_tokens: int | None = None
    seed: int = 0
    backend: str | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "NasLoraConfig":
        """Refuses the files of ``save_adapter``, whose type is the same.

        Raises:
            UserError: the values are theirs.
        """
        if "base_checksum" in kwargs:
            raise UserError("naslora.save_adapter wrote this adapter: call naslora.load_adapter")
        return super().__new__(cls)

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
        shared = {f.name for f in dataclasses.fields(NASLoRAConfig)} - {"rank", "lora_alpha"}
        values = {name: value for name, value in vars(self).items() if name in shared}
        return NASLoRAConfig(rank=rank, lora_alpha=lora_alpha, **values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, with ``peft_type`` "NASLORA"."""
        return {**super().to_dict(), "peft_type": PEFT_TYPE}


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

    def __getattr__(self, name: str) -> Any:
        """Also finds the tensors under the names for PEFT, which Transformers looks up."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not name.startswith(("encoder", "decoder", "cell_")):
                raise
            own = {_stored(n): n for n in super().state_dict()}[name]
            return functools.reduce(getattr, own.split("."), self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Copies what Transformers loads into such a tensor."""
        if isinstance(value, Tensor) and name.startswith(("encoder", "decoder", "cell_")):
            with torch.no_grad():
                getattr(self, name).copy_(value)
        else:
            super().__setattr__(name, value)

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

    Arguments are those of PEFT's layers. ``target_name`` seeds the random numbers.
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
            for adapter in self.adapters():
                adapter.called = True
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
            "a NAS-LoRA cell does not fold in place; call merge_and_unload() of a PeftModel, which "
            "is exact, or naslora.merge(model, 'center') before it"
        )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: Sequence[str] | None
    ) -> nn.Module:
        """What PEFT's ``unload`` and ``merge_and_unload`` put in this layer's place.

        Without ``merge`` it is the untouched nn.Linear, else the layer that ``naslora.merge`` left,
        or the one adapter that is named, or active, merged exactly. Values that are not finite are
        refused, also without ``safe_merge``.

        Raises:
            UserError: several adapters, or values that are not finite.
        """
        if not merge:
            return self.get_base_layer()
        names = [name for name in adapter_names or self.active_adapters if name in self.lora_nas]
        if len(names) != 1:
            raise UserError(f"one adapter merges at a time, got {', '.join(names) or 'none'}")
        alone = nn.Sequential(self.lora_nas[names[0]])
        if isinstance(alone[0], NASLoRALinear):
            alone[0].scaling = self.scaling[names[0]]
            merge_model(alone, "exact")
        return alone[0]


class NasLoraModel(LoraModel):
    """PEFT's tuner of LoRA. For the host of NAS-LoRA it also does what ``inject`` does.

    Frozen batch norms stay in evaluation mode after ``model.train()``. Layers that see token
    sequences take the grid that the host states. ``save_pretrained`` of the host refuses layers
    that were merged exactly. A warning names layers that the host does not call.
    """

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **options: Any
    ) -> None:
        """As PEFT's, for every door: ``get_peft_model``, ``add_adapter``, ``from_pretrained``."""
        super().inject_adapter(model, adapter_name, *args, **options)
        new = []
        for name, layer in model.named_modules():
            if isinstance(layer, NasLoraLinear):
                for _, adapter in adapter_layers(layer):
                    if not adapter.name:  # another adapter takes them from the layer's first one
                        place_hint(model, name, adapter, adapter.config.prefix_tokens)
                        host_calls(model, name)
                        new.append(name)
        if new:
            keep_frozen(model)
            override_save_pretrained(model)
            watch(model, new)

    def _create_and_replace(  # type: ignore[override]
        self, config: LoraConfig, adapter_name: str, target: nn.Module, *args: Any, **options: Any
    ) -> None:
        plain = isinstance(target, LoraLayer) and not isinstance(target, NasLoraLinear)
        if plain and isinstance(config, NasLoraConfig):
            raise UserError(
                f"adapter {adapter_name!r}: {options['current_key']} has plain LoRA already; "
                "choose other layers"
            )
        super()._create_and_replace(config, adapter_name, target, *args, **options)


PEFT_TYPE_TO_CONFIG_MAPPING[cast(PeftType, PEFT_TYPE)] = NasLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = NasLoraModel
