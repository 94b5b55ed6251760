"""The encoder stays as it is: only the mask decoder is trained."""

from torch import nn

from naslora.adapter.config import NASLoRAConfig

UNMERGED = "it leaves the encoder as it is, there is nothing to fold"


def add(encoder: nn.Module, config: NASLoRAConfig) -> None:
    """Adds nothing."""
