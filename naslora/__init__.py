"""NAS-LoRA for the Segment Anything Model: inject, search, merge (arXiv 2512.03499).

A name is imported when it is first used (module ``__getattr__``, PEP 562). ``import naslora`` alone
does not import torch, so that the command line can take an interrupt while torch is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from naslora.adapter.io.base_state import base_state_dict, load_base_state_dict
    from naslora.adapter.io.merged_files import load_merged, save_merged
    from naslora.adapter.io.named import active_adapter, add_adapter, disable_adapter, set_adapter
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
    "adapter.io.base_state": "base_state_dict load_base_state_dict",
    "adapter.io.merged_files": "load_merged save_merged",
    "adapter.io.named": "active_adapter add_adapter disable_adapter set_adapter",
    "adapter.io.storage": "save_adapter",
    "adapter.layer.alpha_search": (
        "AlphaSearch param_groups print_trainable_parameters weight_parameters"
    ),
    "adapter.layer.config": "NASLoRAConfig",
    "adapter.layer.injection": "adapter_parameters arch_parameters inject",
    "adapter.layer.layer": "NASLoRALinear",
    "adapter.merging.merge": "merge",
    "adapter.merging.merged": "unmerge",
    "adapter.merging.report": "MergeReport",
    "errors": "UserError",
    "methods": "load_adapter",
    "sam.attention": "fuse_attention unfuse_attention",
}
_NAMES = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"naslora.{_NAMES[name]}"), name)
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("naslora")
    if name in ("adapter", "errors", "files"):
        return importlib.import_module(f"naslora.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
