"""NAS-LoRA for the Segment Anything Model: inject, search, merge (arXiv 2512.03499).

A name of ``__init__.pyi`` is imported when it is first used. ``import naslora`` alone does not
import torch, so that the command line can take an interrupt while torch is imported.
"""

import importlib
from typing import Any

import lazy_loader

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("naslora")
    return _attribute(name)
