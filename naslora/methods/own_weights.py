"""The methods that add nothing to the encoder: they train some of its own weights, or none.

Full fine-tuning trains all of them, BitFit (arXiv 2106.10199) the biases.
"""

from torch import nn

from naslora.adapter.layer.applied import Method
from naslora.adapter.layer.config import MethodConfig
from naslora.methods.encoders import refuse


def train_all(encoder: nn.Module, config: MethodConfig, seed: int) -> None:
    """Makes every parameter of the encoder trainable."""
    encoder.requires_grad_(True)


def train_none(encoder: nn.Module, config: MethodConfig, seed: int) -> None:
    """Changes nothing: only the mask decoder is trained."""


def train_biases(encoder: nn.Module, config: MethodConfig, seed: int) -> None:
    """Makes the biases of linear layers, convolutions and norms trainable.

    Raises:
        UserError: the encoder has none.
    """
    biases = [p for name, p in encoder.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not biases:
        raise refuse("bitfit", encoder, "biases")
    for bias in biases:
        bias.requires_grad_(True)


FULL = Method(
    "full",
    "Full fine-tuning",
    MethodConfig,
    train_all,
    "it trains the encoder's own weights, there is nothing to fold",
    trains_encoder=True,
)
DECODER_ONLY = Method(
    "decoder-only",
    "Decoder only",
    MethodConfig,
    train_none,
    "it leaves the encoder unchanged, there is nothing to fold",
)
BITFIT = Method(
    "bitfit",
    "BitFit",
    MethodConfig,
    train_biases,
    "it trains the encoder's own biases, there is nothing to fold",
)
