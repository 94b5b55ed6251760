"""NAS-LoRA in other people's software. Each module imports the library that it serves.

- ``trainer``: a callback for the Hugging Face Trainer. It is also ``AlphaCallback`` here, which is
  imported on first use, because it needs transformers.
- ``lightning``: a callback for Lightning.
- ``hub``: adapters on the Hugging Face Hub.
- ``peft``: NAS-LoRA as a custom module of PEFT; ``naslora.peft`` is its public name.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"trainer": ["AlphaCallback"]}
)
