"""LoRA, DoRA and VeRA as Hugging Face's PEFT implements them, on the attention's qkv layers."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from naslora.adapter.layer.applied import OWN, Method
from naslora.adapter.layer.config import LowRankConfig, Rank, TargetConfig
from naslora.adapter.layer.layer import draw_lora_A, layer_generator
from naslora.adapter.layer.targets import find_targets
from naslora.adapter.merging.calibration import calibration_batches
from naslora.adapter.merging.merge import check_mergeable, replace_by_merged
from naslora.adapter.merging.report import MergeMode, MergeReport

# PEFT is imported inside functions: it imports Transformers, which takes seconds.


@dataclass(frozen=True)
class VeRAConfig(TargetConfig):
    """The settings of VeRA."""

    # A rank costs VeRA one parameter a layer, LoRA C_in + C_out. So LoRA's rank is not VeRA's.
    rank: Rank = field(default=256, metadata=OWN)
    """Rank r of the random matrices; 256 is PEFT's default."""


def add_lora(encoder: Any, config: LowRankConfig, seed: int) -> None:
    """LoRA (arXiv 2106.09685): W0 x + b0 + (lora_alpha / r) W_d W_e x, the paper's Eq. 1.

    Raises:
        UserError: as ``naslora.inject``, here and below.
    """
    from peft import LoraConfig

    _add(encoder, config, LoraConfig(r=config.rank, lora_alpha=_alpha(config)))
    _draw_lora_A(encoder, config, seed)


def add_dora(encoder: Any, config: LowRankConfig, seed: int) -> None:
    """DoRA (arXiv 2402.09353): LoRA on the weight's directions, and a trained magnitude.

    PEFT's magnitude has one number an output: 3840 a layer of ViT-H, and 4.12 M parameters in all.
    The paper's 4.04 M are those of one number an input: 1280 a layer.
    """
    from peft import LoraConfig

    _add(encoder, config, LoraConfig(r=config.rank, lora_alpha=_alpha(config), use_dora=True))
    _draw_lora_A(encoder, config, seed)


def add_vera(encoder: Any, config: VeRAConfig, seed: int) -> None:
    """VeRA (arXiv 2310.11454): trained scales around random matrices that all layers share."""
    from peft import VeraConfig

    _add(encoder, config, VeraConfig(r=config.rank, projection_prng_key=seed))


def _alpha(config: LowRankConfig) -> Any:
    """PEFT annotates its ``lora_alpha`` as an integer and takes any number."""
    return config.lora_alpha


def _add(encoder: Any, config: LowRankConfig | VeRAConfig, peft_config: Any) -> None:
    """PEFT wraps the target layers, in place."""
    from peft import get_peft_model

    peft_config.target_modules = list(find_targets(encoder, config.target, config.blocks))
    get_peft_model(encoder, peft_config)


@torch.no_grad()
def _draw_lora_A(encoder: nn.Module, config: LowRankConfig, seed: int) -> None:
    """Replaces PEFT's start of lora_A by the one of ``draw_lora_A``, of the same distribution.

    PEFT draws all layers from one stream, so a layer's numbers would depend on the layers before.
    """
    for name, layer in _peft_layers(encoder).items():
        weight = layer.lora_A["default"].weight
        generator = layer_generator(seed, name)
        weight.copy_(draw_lora_A(config.rank, layer.in_features, generator))


def _peft_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def merge(
    model: nn.Module, mode: MergeMode = "exact", calibration: Iterable[Any] | None = None
) -> MergeReport:
    """Folds PEFT's layers into the nn.Linear layers they wrap. Every mode is exact."""
    layers = _peft_layers(model)
    check_mergeable(model, layers, mode)
    merged = {name: _folded(layer) for name, layer in layers.items()}
    batches = calibration_batches(calibration)
    return replace_by_merged(model, layers, merged, mode, batches, _update)


def _folded(layer: Any) -> nn.Linear:
    folded = copy.deepcopy(layer)  # PEFT merges in place, and unmerging restores ``layer``
    folded.merge(safe_merge=True)
    return folded.get_base_layer()


def _update(layer: Any, x: Tensor, h: Tensor) -> Tensor:
    """The adapter's part of the output h."""
    return h - layer.base_layer(x)


def merge_modes(config: Any) -> list[MergeMode]:
    """All modes give the same result."""
    return ["exact"]


LORA = Method("lora", "LoRA", LowRankConfig, add_lora, merge, merge_modes)
DORA = Method("dora", "DoRA", LowRankConfig, add_dora, merge, merge_modes)
VERA = Method("vera", "VeRA", VeRAConfig, add_vera, merge, merge_modes)
