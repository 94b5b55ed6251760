"""The encoder is unchanged: only the mask decoder is trained."""

from dataclasses import dataclass

from torch import nn

from naslora.adapter.applied import Method
from naslora.adapter.config import MethodConfig


@dataclass(frozen=True)
class DecoderOnlyConfig(MethodConfig):
    """The settings of training the decoder alone."""

    seed: int = 0
    """The method draws no random number."""


def add(encoder: nn.Module, config: DecoderOnlyConfig) -> None:
    """Adds nothing."""


METHOD = Method(
    "decoder-only",
    "Decoder only",
    DecoderOnlyConfig,
    add,
    why_unmerged="it leaves the encoder unchanged, there is nothing to fold",
)
