"""NAS-LoRA for the Segment Anything Model: inject, search, merge (arXiv 2512.03499).

Importing the package imports the adapter alone. ``load_adapter`` needs the table of all methods,
so that name is resolved on first use (module ``__getattr__``, PEP 562).
"""

from typing import TYPE_CHECKING, Any

from naslora.adapter.config import NASLoRAConfig
from naslora.adapter.injection import adapter_parameters, arch_parameters, inject
from naslora.adapter.layer import NASLoRALinear
from naslora.adapter.merge_report import MergeReport
from naslora.adapter.merged import unmerge
from naslora.adapter.merging import merge
from naslora.adapter.storage import save_adapter
from naslora.errors import UserError

if TYPE_CHECKING:
    from naslora.methods import load_adapter

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


def __getattr__(name: str) -> Any:
    if name == "load_adapter":
        from naslora.methods import load_adapter  # imports every method

        return load_adapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
