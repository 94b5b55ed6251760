"""NAS-LoRA for the Segment Anything Model: inject, search, merge (arXiv 2512.03499).

A name is imported when it is first used (module ``__getattr__``, PEP 562). ``import naslora`` alone
does not import torch, so that the command line can take an interrupt while torch is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from naslora.adapter.alpha_search import (
        AlphaSearch,
        param_groups,
        print_trainable_parameters,
        weight_parameters,
    )
    from naslora.adapter.base_state import base_state_dict, load_base_state_dict
    from naslora.adapter.config import NASLoRAConfig
    from naslora.adapter.injection import adapter_parameters, arch_parameters, inject
    from naslora.adapter.layer import NASLoRALinear
    from naslora.adapter.merge_report import MergeReport
    from naslora.adapter.merged import unmerge
    from naslora.adapter.merged_files import load_merged, save_merged
    from naslora.adapter.merging import merge
    from naslora.adapter.named import (
        active_adapter,
        add_adapter,
        disable_adapter,
        set_adapter,
    )
    from naslora.adapter.storage import save_adapter
    from naslora.errors import UserError
    from naslora.methods import load_adapter
    from naslora.sam.attention import fuse_attention, unfuse_attention

__all__ = [
    "AlphaSearch",
    "MergeReport",
    "NASLoRAConfig",
    "NASLoRALinear",
    "UserError",
    "active_adapter",
    "adapter_parameters",
    "add_adapter",
    "arch_parameters",
    "base_state_dict",
    "disable_adapter",
    "fuse_attention",
    "inject",
    "load_adapter",
    "load_base_state_dict",
    "load_merged",
    "merge",
    "param_groups",
    "print_trainable_parameters",
    "save_adapter",
    "save_merged",
    "set_adapter",
    "unfuse_attention",
    "unmerge",
    "weight_parameters",
]

_MODULES = {
    "AlphaSearch": "naslora.adapter.alpha_search",
    "MergeReport": "naslora.adapter.merge_report",
    "NASLoRAConfig": "naslora.adapter.config",
    "NASLoRALinear": "naslora.adapter.layer",
    "UserError": "naslora.errors",
    "active_adapter": "naslora.adapter.named",
    "adapter_parameters": "naslora.adapter.injection",
    "add_adapter": "naslora.adapter.named",
    "arch_parameters": "naslora.adapter.injection",
    "base_state_dict": "naslora.adapter.base_state",
    "disable_adapter": "naslora.adapter.named",
    "fuse_attention": "naslora.sam.attention",
    "inject": "naslora.adapter.injection",
    "load_adapter": "naslora.methods",
    "load_base_state_dict": "naslora.adapter.base_state",
    "load_merged": "naslora.adapter.merged_files",
    "merge": "naslora.adapter.merging",
    "param_groups": "naslora.adapter.alpha_search",
    "print_trainable_parameters": "naslora.adapter.alpha_search",
    "save_adapter": "naslora.adapter.storage",
    "save_merged": "naslora.adapter.merged_files",
    "set_adapter": "naslora.adapter.named",
    "unfuse_attention": "naslora.sam.attention",
    "unmerge": "naslora.adapter.merged",
    "weight_parameters": "naslora.adapter.alpha_search",
}
"""The module of each name."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name in ("adapter", "errors", "files"):
        return importlib.import_module(f"naslora.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
