"""The encoder is unchanged: only the mask decoder is trained."""

from torch import nn

from naslora.adapter.layer.applied import Method
from naslora.adapter.layer.config import MethodConfig


def add(encoder: nn.Module, config: MethodConfig, seed: int) -> None:
    """Adds nothing."""


METHOD = Method(
    "decoder-only",
    "Decoder only",
    MethodConfig,
    add,
    why_unmerged="it leaves the encoder unchanged, there is nothing to fold",
)
