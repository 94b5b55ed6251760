"""NAS-LoRA inside PEFT: ``get_peft_model(model, NasLoraConfig(...))``. Needs peft 0.19 or newer."""

from peft import PeftModel, get_peft_model

from naslora.integrations.peft import NasLoraConfig, from_pretrained

__all__ = ["NasLoraConfig", "PeftModel", "from_pretrained", "get_peft_model"]
