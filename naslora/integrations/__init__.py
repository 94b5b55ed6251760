"""NAS-LoRA in other people's software. Each module imports the library that it serves.

- ``trainer``: a callback for the Hugging Face Trainer.
- ``lightning``: a callback for Lightning.
- ``hub``: adapters on the Hugging Face Hub.
- ``peft``: NAS-LoRA as a custom module of PEFT; ``naslora.peft`` is its public name.

``naslora.integrations.AlphaCallback`` is the callback for the Trainer. It is imported on first use,
because it needs transformers.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from naslora.integrations.trainer import AlphaCallback as AlphaCallback

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, None, {"trainer": ["AlphaCallback"]})
