"""NAS-LoRA for the Segment Anything Model: inject, search, merge (arXiv 2512.03499).

Importing the package imports the adapter alone. ``load_adapter`` needs the table of all methods,
so that name is resolved on first use (module ``__getattr__``, PEP 562).
"""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from naslora.methods import load_adapter

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
    "unmerge",
    "weight_parameters",
]


def __getattr__(name: str) -> Any:
    if name == "load_adapter":
        from naslora.methods import load_adapter  # imports every method

        return load_adapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
