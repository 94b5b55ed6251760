"""Full fine-tuning: every parameter of the encoder is trained."""

from dataclasses import dataclass

from torch import nn

from naslora.adapter.applied import Method
from naslora.adapter.config import MethodConfig


@dataclass(frozen=True)
class FullConfig(MethodConfig):
    """The settings of full fine-tuning."""

    seed: int = 0
    """Full fine-tuning draws no random number."""


def add(encoder: nn.Module, config: FullConfig) -> None:
    """Makes every parameter of the encoder trainable."""
    encoder.requires_grad_(True)


METHOD = Method(
    "full",
    "Full fine-tuning",
    FullConfig,
    add,
    why_unmerged="it trains the encoder's own weights, there is nothing to fold",
    trains_encoder=True,
)
