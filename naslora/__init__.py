"""NAS-LoRA for the Segment Anything Model: inject, search, merge (arXiv 2512.03499)."""

from naslora.checkpoint import load_adapter, save_adapter
from naslora.config import NASLoRAConfig
from naslora.errors import UserError
from naslora.injection import adapter_parameters, arch_parameters, inject
from naslora.layer import NASLoRALinear
from naslora.merging import MergeReport, unmerge
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
