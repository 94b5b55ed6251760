"""What the GPU backends are asked to do, without a GPU: the order of launches of
``naslora_kernels/gpu.py`` over tensors that have shapes alone."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import cases
from naslora_kernels import gpu
from naslora_kernels.operations import CONVOLUTIONS

FOLDED_SIZE = 9  # of the kernel that all operations fold to: as far as the furthest tap reaches


class Operands:
    """The tensors of one layer on the meta device: maps of a dtype, an adapter in float32."""

    def __init__(self, shape: cases.Shape, rank: int, dtype: torch.dtype) -> None:
        maps = partial(torch.empty, device="meta", dtype=dtype)
        numbers = partial(torch.empty, device="meta", dtype=torch.promote_types(dtype, torch.float))
        c = cases.channels_of(rank)
        self.x, self.z = maps(*shape.grid, shape.c_in), maps(*shape.grid, rank)
        self.grad_y, self.grad_h = maps(*shape.grid, rank), maps(*shape.grid, shape.c_out)
        self.weight, self.bias = maps(shape.c_out, shape.c_in), maps(shape.c_out)
        self.adapter = (numbers(rank, shape.c_in), numbers(shape.c_out, rank))
        self.cell = (
            numbers(8),
            [numbers(c, conv.kernel, conv.kernel) for conv in CONVOLUTIONS],
            numbers(4, c, c),
            torch.empty(c, dtype=torch.int64, device="meta"),
        )
        self.folded = (numbers(rank, rank, FOLDED_SIZE, FOLDED_SIZE), 0.3, 0.2)


def layer_forward(primitives: gpu.Primitives, of: Operands) -> tuple[Tensor, ...]:
    """h and z."""
    frozen = (of.weight, of.bias)
    return gpu.nas_lora_linear(primitives, of.x, *frozen, *of.adapter, *of.cell, cases.SCALING)


def layer_backward(primitives: gpu.Primitives, of: Operands, needed: str) -> tuple[Tensor, ...]:
    """The gradients ``needed``, of x, A, B, alpha and the weights of the operations."""
    flags = [name in needed.split() for name in ("x", "A", "B", "alpha", "weights")]
    frozen = (of.grad_h, of.x, of.z, of.weight)
    return gpu.nas_lora_linear_backward(
        primitives, *frozen, *of.adapter, *of.cell, cases.SCALING, *flags
    )


def cell_forward(primitives: gpu.Primitives, of: Operands) -> tuple[Tensor, ...]:
    """y."""
    return (gpu.mixed_cell(primitives, of.z, *of.cell),)


def cell_backward(primitives: gpu.Primitives, of: Operands, needed: str) -> tuple[Tensor, ...]:
    """The gradients ``needed``, of z, alpha and the weights of the operations."""
    flags = [name in needed.split() for name in ("z", "alpha", "weights")]
    return gpu.mixed_cell_backward(primitives, of.grad_y, of.z, *of.cell, *flags)


def folded_layer(primitives: gpu.Primitives, of: Operands) -> tuple[Tensor, ...]:
    """h of a layer that was merged."""
    frozen = (of.weight, of.bias)
    return (gpu.folded_linear(primitives, of.x, *frozen, *of.adapter, *of.folded),)


Work = Callable[[gpu.Primitives, Operands], tuple[Tensor, ...]]

# What training, search and inference do.
WORKS: dict[str, Work] = {
    "layer, forward": layer_forward,
    "layer, backward, weight step": partial(layer_backward, needed="x A B weights"),
    "layer, backward, architecture step": partial(layer_backward, needed="x alpha"),
    "cell, forward": cell_forward,
    "cell, backward": partial(cell_backward, needed="z alpha weights"),
    "folded layer, forward": folded_layer,
}
# Other gradients that may be due, for which the same kernels are compiled in another way.
OTHER_WORKS: dict[str, Work] = {
    "layer, everything": partial(layer_backward, needed="x A B alpha weights"),
    "layer, lora_B alone": partial(layer_backward, needed="B"),
    "cell, maps alone": partial(cell_backward, needed="z"),
    "cell, sums alone": partial(cell_backward, needed="alpha weights"),
}
