"""Full fine-tuning: every parameter of the encoder is trained."""

from torch import nn

from naslora.adapter.layer.applied import Method
from naslora.adapter.layer.config import MethodConfig


def add(encoder: nn.Module, config: MethodConfig, seed: int) -> None:
    """Makes every parameter of the encoder trainable."""
    encoder.requires_grad_(True)


METHOD = Method(
    "full",
    "Full fine-tuning",
    MethodConfig,
    add,
    why_unmerged="it trains the encoder's own weights, there is nothing to fold",
    trains_encoder=True,
)
