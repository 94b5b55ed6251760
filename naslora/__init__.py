"""NAS-LoRA for the Segment Anything Model: inject, search, merge (arXiv 2512.03499).

A name is imported when it is first used (module ``__getattr__``, PEP 562). ``import naslora`` alone
does not import torch, so that the command line can take an interrupt while torch is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from naslora.adapter.io.base_state import base_state_dict, load_base_state_dict
    from naslora.adapter.io.merged_files import load_merged, save_merged
    from naslora.adapter.io.named import (
        active_adapter,
        add_adapter,
        disable_adapter,
        set_adapter,
    )
    from naslora.adapter.io.storage import save_adapter
    from naslora.adapter.layer.alpha_search import (
        AlphaSearch,
        param_groups,
        print_trainable_parameters,
        weight_parameters,
    )
    from naslora.adapter.layer.config import NASLoRAConfig
    from naslora.adapter.layer.injection import adapter_parameters, arch_parameters, inject
    from naslora.adapter.layer.layer import NASLoRALinear
    from naslora.adapter.merging.merge import merge
    from naslora.adapter.merging.merged import unmerge
    from naslora.adapter.merging.report import MergeReport
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
    "AlphaSearch": "naslora.adapter.layer.alpha_search",
    "MergeReport": "naslora.adapter.merging.report",
    "NASLoRAConfig": "naslora.adapter.layer.config",
    "NASLoRALinear": "naslora.adapter.layer.layer",
    "UserError": "naslora.errors",
    "active_adapter": "naslora.adapter.io.named",
    "adapter_parameters": "naslora.adapter.layer.injection",
    "add_adapter": "naslora.adapter.io.named",
    "arch_parameters": "naslora.adapter.layer.injection",
    "base_state_dict": "naslora.adapter.io.base_state",
    "disable_adapter": "naslora.adapter.io.named",
    "fuse_attention": "naslora.sam.attention",
    "inject": "naslora.adapter.layer.injection",
    "load_adapter": "naslora.methods",
    "load_base_state_dict": "naslora.adapter.io.base_state",
    "load_merged": "naslora.adapter.io.merged_files",
    "merge": "naslora.adapter.merging.merge",
    "param_groups": "naslora.adapter.layer.alpha_search",
    "print_trainable_parameters": "naslora.adapter.layer.alpha_search",
    "save_adapter": "naslora.adapter.io.storage",
    "save_merged": "naslora.adapter.io.merged_files",
    "set_adapter": "naslora.adapter.io.named",
    "unfuse_attention": "naslora.sam.attention",
    "unmerge": "naslora.adapter.merging.merged",
    "weight_parameters": "naslora.adapter.layer.alpha_search",
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
