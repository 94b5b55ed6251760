"""NAS-LoRA inside PEFT: after this import, PEFT's own functions take ``NasLoraConfig``."""

from peft import PeftModel, get_peft_model

from naslora.integrations.peft import NasLoraConfig

__all__ = ["NasLoraConfig", "from_pretrained", "get_peft_model"]

from_pretrained = PeftModel.from_pretrained
