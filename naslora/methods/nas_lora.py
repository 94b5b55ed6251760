"""NAS-LoRA and NAS-PC-LoRA (paper, Eq. 2-3): a searchable cell inside LoRA.

With ``channel_ratio`` 0, NAS-PC-LoRA is plain LoRA in the fused kernels.
"""

import dataclasses
from functools import partial

from torch import nn

from naslora.adapter.layer.applied import Method
from naslora.adapter.layer.config import NASLoRAConfig
from naslora.adapter.layer.injection import inject
from naslora.adapter.merging.merge import CELLS


def add(encoder: nn.Module, config: NASLoRAConfig, seed: int, full: bool = False) -> None:
    """Injects cells on the share ``config.channel_ratio`` of the channels; on all if ``full``."""
    inject(encoder, dataclasses.replace(config, channel_ratio=1.0) if full else config, seed=seed)


def has_cell(config: NASLoRAConfig, full: bool = False) -> bool:
    """Whether there is a cell to search."""
    return full or config.cell_channels > 0


NAS_LORA = Method(
    "nas-lora",
    "NAS-LoRA",
    NASLoRAConfig,
    partial(add, full=True),
    CELLS,
    searches=partial(has_cell, full=True),
)
NAS_PC_LORA = Method("nas-pc-lora", "NAS-PC-LoRA", NASLoRAConfig, add, CELLS, searches=has_cell)
