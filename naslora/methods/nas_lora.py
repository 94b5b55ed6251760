"""NAS-LoRA and NAS-PC-LoRA (paper, Eq. 2-3): a searchable cell inside LoRA.

With ``channel_ratio`` 0, NAS-PC-LoRA is plain LoRA in the fused kernels.
"""

import dataclasses

from torch import nn

from naslora.adapter.config import NASLoRAConfig
from naslora.adapter.injection import inject
from naslora.adapter.merging import MODES, merge

__all__ = ["FIELDS", "add", "add_full", "merge", "merge_modes"]

FIELDS = ("rank", "lora_alpha", "preset")


def add(encoder: nn.Module, config: NASLoRAConfig) -> None:
    """NAS-PC-LoRA: ``config.channel_ratio`` of the channels pass through the cell."""
    inject(encoder, config)


def add_full(encoder: nn.Module, config: NASLoRAConfig) -> None:
    """NAS-LoRA: all channels pass through the cell."""
    inject(encoder, dataclasses.replace(config, channel_ratio=1.0))


def merge_modes(config: NASLoRAConfig) -> list[str]:
    """The modes that can fold the cell: the preset `paper` is not linear, it has no centre taps."""
    return [mode for mode in MODES if mode != "center" or config.preset != "paper"]
