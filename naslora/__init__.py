"""NAS-LoRA for the Segment Anything Model: inject, search, merge (arXiv 2512.03499)."""

from naslora.adapter.config import NASLoRAConfig
from naslora.adapter.injection import adapter_parameters, arch_parameters, inject
from naslora.adapter.layer import NASLoRALinear
from naslora.adapter.merging import MergeReport, unmerge
from naslora.adapter.storage import load_adapter, save_adapter
from naslora.errors import UserError
from naslora.methods import merge

__all__ = [
    "MergeReport",
    "NASLoRAConfig",
    "NASLoRALinear",
    "UserError",
    "adapter_parameters",
    "arch_parameters",
    "inject",
    "load_adapter",
    "merge",
    "save_adapter",
    "unmerge",
]
