"""Full fine-tuning: every parameter of the encoder is trained."""

from torch import nn

from naslora.adapter.config import NASLoRAConfig

UNMERGED = "it trains the encoder's own weights, there is nothing to fold"


def add(encoder: nn.Module, config: NASLoRAConfig) -> None:
    """Lets the whole encoder train."""
    encoder.requires_grad_(True)
