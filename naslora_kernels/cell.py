"""The tensors of a cell, of the linear layer around it and of attention, as named tuples.

The public functions build these tuples once. The operators take their fields, in this order.
"""

from typing import NamedTuple

from torch import Tensor


class Cell(NamedTuple):
    """The parameters of a mixed cell and the channels S that it mixes; c = |S|."""

    alpha: Tensor
    """(8,) architecture logits, in the order of ``OPERATIONS``."""
    dw_sep3: Tensor
    """(c, 3, 3); the four depthwise kernels are in the order of ``CONVOLUTIONS``."""
    dw_sep5: Tensor
    """(c, 5, 5)."""
    dw_dil3: Tensor
    """(c, 3, 3)."""
    dw_dil5: Tensor
    """(c, 5, 5)."""
    pw: Tensor
    """(4, c, c) pointwise kernels as [operation, output, input]."""
    channels: Tensor | None
    """(c,) int64, the distinct channels S; None selects all channels."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The six tensors that have gradients."""
        return self[:6]

    @property
    def depthwise(self) -> tuple[Tensor, ...]:
        """The four depthwise kernels."""
        return self[1:5]


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
    """The differentiable arguments of attention. N queries, H W keys, d features a head."""

    q: Tensor
    """(B, heads, N, d)."""
    k: Tensor
    """(B, heads, H W, d)."""
    v: Tensor
    """(B, heads, H W, d)."""
    rel_h: Tensor
    """(B, heads, N, H): what each query adds to the scores of each row of keys."""
    rel_w: Tensor
    """(B, heads, N, W): what each query adds to the scores of each column of keys."""
