"""The tensors of a cell, of the linear layer around it and of attention, as named tuples.

The public functions build these tuples once. Checks and backends take them whole.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Cell(NamedTuple):
    """The parameters of a mixed cell and the channels S that it mixes; c = |S|.

    The fields, in this order, are also the four arguments that describe a cell in the schemas of
    ``ops.py``: an operator is called with ``*cell``, and ``Cell(*arguments)`` restores the cell.
    """

    alpha: Tensor
    """(8,) architecture logits, in the order of ``OPERATIONS``."""
    depthwise: Sequence[Tensor]
    """The four depthwise kernels, (c, k, k) each, in the order of ``CONVOLUTIONS``."""
    pw: Tensor
    """(4, c, c) pointwise kernels as [operation, output, input]."""
    channels: Tensor | None
    """(c,) int64, the distinct channels S; None selects all channels."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The six tensors that have gradients: alpha, the four depthwise kernels, pw."""
        return (self.alpha, *self.depthwise, self.pw)

    def flatten(self) -> tuple[Tensor | None, ...]:
        """Returns the six parameters and channels: autograd finds only tensors outside of lists."""
        return (self.alpha, *self.depthwise, self.pw, self.channels)

    @staticmethod
    def unflatten(tensors: Sequence[Tensor]) -> "Cell":
        """Restores the cell from the seven values that ``flatten`` returned."""
        return Cell(tensors[0], tensors[1:5], tensors[5], tensors[6])

    def contiguous(self) -> "Cell":
        """Returns the same cell with every tensor contiguous."""
        channels = None if self.channels is None else self.channels.contiguous()
        depthwise = [dw.contiguous() for dw in self.depthwise]
        return Cell(self.alpha.contiguous(), depthwise, self.pw.contiguous(), channels)


class LoRALinear(NamedTuple):
    """The tensors of a linear layer with a low-rank adapter."""

    weight: Tensor
    """(C_out, C_in) the frozen weight W0."""
    bias: Tensor | None
    """(C_out,) the frozen bias b0, or None."""
    lora_A: Tensor
    """(r, C_in) the encoder W_e."""
    lora_B: Tensor
    """(C_out, r) the decoder W_d."""


class AttentionOperands(NamedTuple):
    """The differentiable arguments of attention. d are the features of a head, N = H W tokens."""

    q: Tensor
    """(B, heads, N, d)."""
    k: Tensor
    """(B, heads, N, d)."""
    v: Tensor
    """(B, heads, N, d)."""
    rel_h: Tensor
    """(B, heads, N, H): what each query adds to the scores of each row of keys."""
    rel_w: Tensor
    """(B, heads, N, W): what each query adds to the scores of each column of keys."""
