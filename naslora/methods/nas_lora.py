"""NAS-LoRA and NAS-PC-LoRA (paper, Eq. 2-3): a searchable cell inside LoRA.

With ``channel_ratio`` 0, NAS-PC-LoRA is plain LoRA in the fused kernels.
"""

import dataclasses

from torch import nn

from naslora.adapter.layer.applied import Method
from naslora.adapter.layer.config import NASLoRAConfig
from naslora.adapter.layer.injection import inject
from naslora.adapter.merging.merge import CELLS


def add(encoder: nn.Module, config: NASLoRAConfig, seed: int) -> None:
    """NAS-PC-LoRA: the share ``config.channel_ratio`` of the channels passes through the cell."""
    inject(encoder, config, seed=seed)


def add_full(encoder: nn.Module, config: NASLoRAConfig, seed: int) -> None:
    """NAS-LoRA: all channels pass through the cell, whatever ``config.channel_ratio`` is."""
    inject(encoder, dataclasses.replace(config, channel_ratio=1.0), seed=seed)


def has_cell(config: NASLoRAConfig) -> bool:
    """Whether NAS-PC-LoRA has a cell to search."""
    return config.cell_channels > 0


def always_searches(config: NASLoRAConfig) -> bool:
    """NAS-LoRA has a cell in every configuration."""
    return True


NAS_LORA = Method("nas-lora", "NAS-LoRA", NASLoRAConfig, add_full, CELLS, searches=always_searches)
NAS_PC_LORA = Method("nas-pc-lora", "NAS-PC-LoRA", NASLoRAConfig, add, CELLS, searches=has_cell)
