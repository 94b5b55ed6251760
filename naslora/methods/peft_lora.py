"""LoRA, DoRA and VeRA as Hugging Face's PEFT implements them, on the attention's qkv layers."""

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from naslora.adapter.config import NASLoRAConfig
from naslora.adapter.injection import find_targets
from naslora.adapter.merging import (
    MergeMode,
    MergeReport,
    calibration_batches,
    check_mergeable,
    replace_by_merged,
)

if TYPE_CHECKING:
    from peft import PeftConfig

# PEFT is imported where it is used: with Transformers behind it, that takes seconds.


def add_lora(encoder: nn.Module, config: NASLoRAConfig) -> None:
    """LoRA (arXiv 2106.09685): W0 x + b0 + (lora_alpha / r) W_d W_e x, the paper's Eq. 1."""
    from peft import LoraConfig

    _add(encoder, config, LoraConfig(r=config.rank, lora_alpha=config.lora_alpha))


def add_dora(encoder: nn.Module, config: NASLoRAConfig) -> None:
    """DoRA (arXiv 2402.09353): LoRA on the weight's directions beside a trained magnitude.

    PEFT's magnitude is one number an output, 3840 a layer of ViT-H and 4.12 M parameters in all;
    the paper's 4.04 M needs one an input, 1280 a layer.
    """
    from peft import LoraConfig

    _add(encoder, config, LoraConfig(r=config.rank, lora_alpha=config.lora_alpha, use_dora=True))


def add_vera(encoder: nn.Module, config: NASLoRAConfig) -> None:
    """VeRA (arXiv 2310.11454): trained scales around random matrices that all layers share.

    A rank costs it one parameter a layer, so its rank is PEFT's default, 256, whatever
    ``config.rank`` says.
    """
    from peft import VeraConfig

    _add(encoder, config, VeraConfig(projection_prng_key=config.seed))


def _add(encoder: nn.Module, config: NASLoRAConfig, peft_config: "PeftConfig") -> None:
    """Lets PEFT wrap the target layers, in place."""
    from peft import get_peft_model

    peft_config.target_modules = list(find_targets(encoder, config.target, config.blocks))
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
    return replace_by_merged(model, layers, merged, mode, calibration_batches(calibration))


def _folded(layer: nn.Module) -> nn.Linear:
    folded = copy.deepcopy(layer)  # PEFT merges in place, and the layer is what unmerging restores
    folded.merge(safe_merge=True)
    return folded.get_base_layer()
