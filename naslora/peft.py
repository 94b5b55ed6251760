"""NAS-LoRA inside PEFT: ``get_peft_model(model, NasLoraConfig(...))``."""

from naslora.integrations.peft import NasLoraConfig, from_pretrained, get_peft_model

__all__ = ["NasLoraConfig", "from_pretrained", "get_peft_model"]
