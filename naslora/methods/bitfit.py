"""BitFit (arXiv 2106.10199): every bias of the encoder is trained, and nothing else."""

from torch import nn

from naslora.adapter.layer.applied import Method
from naslora.adapter.layer.config import MethodConfig
from naslora.methods.encoders import refuse


def add(encoder: nn.Module, config: MethodConfig, seed: int) -> None:
    """Makes the biases of linear layers, convolutions and norms trainable.

    Raises:
        UserError: the encoder has none.
    """
    biases = [p for name, p in encoder.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not biases:
        raise refuse("bitfit", encoder, "biases")
    for bias in biases:
        bias.requires_grad_(True)


METHOD = Method(
    "bitfit",
    "BitFit",
    MethodConfig,
    add,
    why_unmerged="it trains the encoder's own biases, there is nothing to fold",
)
