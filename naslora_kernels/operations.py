"""The eight candidate operations: their order, their shapes, and the convolution they fold to."""

from typing import NamedTuple

import torch
from torch import Tensor


class Convolution(NamedTuple):
    """A separable convolution of the cell: depthwise ``kernel x kernel``, then pointwise."""

    name: str
    """Its name in reports and files."""
    kernel: int
    """The side of the depthwise kernel, in taps."""
    dilation: int
    """The distance between neighbouring taps, in pixels."""

    @property
    def reach(self) -> int:
        """The distance of the outermost tap from the centre, in pixels: the zero padding."""
        return self.dilation * (self.kernel // 2)


CONVOLUTIONS = (
    Convolution("sep_conv_3x3", kernel=3, dilation=1),
    Convolution("sep_conv_5x5", kernel=5, dilation=1),
    Convolution("dil_conv_3x3", kernel=3, dilation=2),
    Convolution("dil_conv_5x5", kernel=5, dilation=2),
)

# alpha, reports and files have this order.
OPERATIONS = (
    *(conv.name for conv in CONVOLUTIONS),
    "avg_pool_3x3",
    "max_pool_3x3",
    "skip_connect",
    "none",
)
AVG_POOL, MAX_POOL, SKIP, NONE = range(len(CONVOLUTIONS), len(OPERATIONS))

# The side of the convolution that all operations fold to, in taps.
FOLDED_SIZE = 2 * max(conv.reach for conv in CONVOLUTIONS) + 1


def folded_convolution(mixture: Tensor, depthwise: tuple[Tensor, ...], pw: Tensor) -> Tensor:
    """Folds the four convolutions and the skip connection of a cell into one convolution.

    K = sum_i a_i (pw_i o dw_i) + a_skip * identity. The mixture is linear in its convolutions, so
    one zero-padded convolution with K, which has at most 41 non-zero taps, gives the same map. The
    two poolings are not part of K.

    Args:
        mixture: (8,) the operations' weights a = softmax(alpha).
        depthwise: the four depthwise kernels, (c, k, k) each, in the order of ``CONVOLUTIONS``.
        pw: (4, c, c) pointwise kernels as [operation, output, input].

    Returns:
        K (c, c, 9, 9) as [output, input, row, column], in the dtype of ``pw``. ``conv2d`` takes it
        with ``padding=4``.
    """
    channels = pw.shape[-1]
    folded = pw.new_zeros(channels, channels, FOLDED_SIZE, FOLDED_SIZE)
    centre = FOLDED_SIZE // 2
    for i, (conv, dw) in enumerate(zip(CONVOLUTIONS, depthwise, strict=True)):
        taps = slice(centre - conv.reach, centre + conv.reach + 1, conv.dilation)
        folded[:, :, taps, taps] += mixture[i] * pw[i, :, :, None, None] * dw[None]
    folded[:, :, centre, centre] += mixture[SKIP] * torch.eye(
        channels, dtype=pw.dtype, device=pw.device
    )
    return folded
