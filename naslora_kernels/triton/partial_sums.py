"""The layout of the partial sums that ``cell_backward_kernel`` leaves.

This is the only place that states it. Both kernels get it as constants.
"""

from typing import NamedTuple


class PartialSums(NamedTuple):
    """Where the parts of one group's partial sums begin, in numbers from the group's first.

    With a = softmax(alpha). The sums of the gradients of weights lack the factor a_i.
    """

    pw: int
    """dL/dpw / a_i, [4, c, c]."""
    dw_sep3: int
    """dL/ddw / a_i of sep_conv_3x3, [c, 3, 3]."""
    dw_sep5: int
    """dL/ddw / a_i of sep_conv_5x5, [c, 5, 5]."""
    dw_dil3: int
    """dL/ddw / a_i of dil_conv_3x3, [c, 3, 3]."""
    dw_dil5: int
    """dL/ddw / a_i of dil_conv_5x5, [c, 5, 5]."""
    a_convolutions: int
    """dL/da_i of the four convolutions, as terms [blocks, 4]. Here the sums of weights end."""
    a_others: int
    """dL/da_i of avg_pool_3x3, max_pool_3x3 and skip_connect, [3]."""
    size: int
    """The numbers of a group."""

    @property
    def constants(self) -> dict[str, int]:
        """The constants of the kernels: PW, DW_SEP3, ..., SIZE."""
        return {name.upper(): start for name, start in self._asdict().items()}


def partial_sums(c: int, blocks: int) -> PartialSums:
    """Returns the layout for c channels.

    Args:
        c: the number of channels in S.
        blocks: the number of blocks of output channels. Each leaves its own terms of dL/da_i.
    """
    lengths = (4 * c * c, 9 * c, 25 * c, 9 * c, 25 * c, 4 * blocks, 3)
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return PartialSums(*starts)
