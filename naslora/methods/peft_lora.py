"""LoRA, DoRA and VeRA as Hugging Face's PEFT implements them, on the attention's qkv layers."""

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from naslora.config import NASLoRAConfig
from naslora.injection import find_targets
from naslora.merging import MergeMode, MergeReport, check_mergeable, replace_by_merged

if TYPE_CHECKING:
    from peft import PeftConfig

# PEFT is imported where it is used: with Transformers behind it, that takes seconds.


def add_lora(encoder: nn.Module, config: NASLoRAConfig) -> None:
    """LoRA: W0 x + (lora_alpha / r) W_d W_e x, the paper's Eq. 1."""
    from peft import LoraConfig

    _add(encoder, config, LoraConfig(r=config.rank, lora_alpha=config.lora_alpha))


def _add(encoder: nn.Module, config: NASLoRAConfig, peft_config: "PeftConfig") -> None:
    """Lets PEFT wrap the target layers, in place, with random numbers from ``config.seed``."""
    from peft import get_peft_model

    peft_config.target_modules = find_targets(encoder, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        get_peft_model(encoder, peft_config)


def merge(
    model: nn.Module, mode: MergeMode = "exact", calibration: Iterable[Any] | None = None
) -> MergeReport:
    """Folds PEFT's layers into the nn.Linear layers they wrap; every mode is exact."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {
        n: module for n, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    check_mergeable(model, layers, mode)
    merged = {name: _folded(layer) for name, layer in layers.items()}
    return replace_by_merged(model, layers, merged, mode, calibration)


@torch.no_grad()
def _folded(layer: nn.Module) -> nn.Linear:
    folded = copy.deepcopy(layer)  # PEFT merges in place, and the layer is what unmerging restores
    folded.merge(safe_merge=True)
    return folded.get_base_layer()
