"""LoRA, DoRA and VeRA as Hugging Face's PEFT implements them, on the attention's qkv layers."""

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from naslora.adapter.layer.applied import OWN, Folding, Method
from naslora.adapter.layer.config import LowRankConfig, Rank, TargetConfig
from naslora.adapter.layer.layer import draw_lora_A, layer_generator
from naslora.adapter.layer.targets import find_targets
from naslora.adapter.merging.report import MergeMode

# PEFT is imported inside functions: it imports Transformers, which takes seconds.


@dataclass(frozen=True)
class VeRAConfig(TargetConfig):
    """The settings of VeRA."""

    # A rank costs VeRA one parameter a layer, LoRA C_in + C_out. So LoRA's rank is not VeRA's.
    rank: Rank = field(default=256, metadata=OWN)
    """Rank r of the random matrices; 256 is PEFT's default."""


def add_lora(encoder: Any, config: LowRankConfig, seed: int, dora: bool = False) -> None:
    """LoRA (arXiv 2106.09685): W0 x + b0 + (lora_alpha / r) W_d W_e x, the paper's Eq. 1.

    DoRA (arXiv 2402.09353) applies it to the weight's directions, and trains a magnitude. PEFT's
    magnitude has one number an output: 3840 a layer of ViT-H, and 4.12 M parameters in all. The
    paper's 4.04 M are those of one number an input: 1280 a layer.

    PEFT draws lora_A of all layers from one stream, so a layer's numbers would depend on the layers
    before. They are replaced by those of ``draw_lora_A``, of the same distribution.

    Raises:
        UserError: as ``naslora.inject``.
    """
    from peft import LoraConfig, get_peft_model

    alpha: Any = config.lora_alpha  # PEFT annotates it as an integer and takes any number
    targets = list(find_targets(encoder, config))
    options = LoraConfig(r=config.rank, lora_alpha=alpha, use_dora=dora, target_modules=targets)
    get_peft_model(encoder, options)
    for name, layer in _peft_layers(encoder):
        drawn = draw_lora_A(config.rank, layer.in_features, layer_generator(seed, name))
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(drawn)


def add_vera(encoder: Any, config: VeRAConfig, seed: int) -> None:
    """VeRA (arXiv 2310.11454): trained scales around random matrices that all layers share.

    Raises:
        UserError: as ``naslora.inject``.
    """
    from peft import VeraConfig, get_peft_model

    targets = list(find_targets(encoder, config))
    options = VeraConfig(r=config.rank, projection_prng_key=seed, target_modules=targets)
    get_peft_model(encoder, options)


def _peft_layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def _folded(layer: Any, mode: MergeMode) -> nn.Linear:
    """Exact in every mode."""
    folded = copy.deepcopy(layer)  # PEFT merges in place, and unmerging restores ``layer``
    folded.merge(safe_merge=True)
    return folded.get_base_layer()


def _update(layer: Any, x: Tensor, h: Tensor) -> Tensor:
    """The adapter's part of the output h."""
    return h - layer.base_layer(x)


def _modes(config: Any) -> list[MergeMode]:
    """All modes give the same result."""
    return ["exact"]


FOLDING = Folding(_peft_layers, _folded, _update, _modes)
LORA = Method("lora", "LoRA", LowRankConfig, add_lora, FOLDING)
DORA = Method("dora", "DoRA", LowRankConfig, partial(add_lora, dora=True), FOLDING)
VERA = Method("vera", "VeRA", VeRAConfig, add_vera, FOLDING)
