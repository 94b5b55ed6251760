"""NAS-LoRA in other people's software. Each module imports the library that it serves.

- ``trainer``: a callback for the Hugging Face Trainer. It is also ``AlphaCallback`` here, which is
  imported on first use (module ``__getattr__``, PEP 562), because it needs transformers.
- ``lightning``: a callback for Lightning.
- ``hub``: adapters on the Hugging Face Hub.
- ``peft``: NAS-LoRA as a custom module of PEFT; ``naslora.peft`` is its public name.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from naslora.integrations.trainer import AlphaCallback

__all__ = ["AlphaCallback"]


def __getattr__(name: str) -> Any:
    if name == "AlphaCallback":
        from naslora.integrations.trainer import AlphaCallback  # imports transformers

        return AlphaCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
