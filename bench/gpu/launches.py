"""The launches of the GPU backends, without a GPU.

Runs the order of launches of ``naslora_kernels/launches.py`` over tensors that have only shapes.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from bench import cases
from naslora_kernels.cell import Cell, LoRALinear
from naslora_kernels.launches import Launches, Primitives
from naslora_kernels.operations import FOLDED_SIZE
from naslora_kernels.triton.attention import TritonAttention
from naslora_kernels.triton.tiles import most_features


class Operands:
    """The tensors of one layer: maps of a dtype, an adapter in float32. On the meta device they
    have only shapes."""

    def __init__(
        self, shape: cases.Shape, rank: int, dtype: torch.dtype, device: str = "meta"
    ) -> None:
        maps = partial(torch.randn, device=device, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float)
        numbers = partial(torch.randn, device=device, dtype=wide)
        self.x, self.z = maps(*shape.grid, shape.c_in), maps(*shape.grid, rank)
        self.grad_y, self.grad_h = maps(*shape.grid, rank), maps(*shape.grid, shape.c_out)
        self.linear = LoRALinear(
            maps(shape.c_out, shape.c_in),
            maps(shape.c_out),
            numbers(rank, shape.c_in),
            numbers(shape.c_out, rank),
        )
        parameters = [p.detach().to(wide) for p in cases.cell_parameters(rank, device).values()]
        self.cell = Cell(*parameters, torch.arange(cases.channels_of(rank), device=device))
        self.folded = (numbers(rank, rank, FOLDED_SIZE, FOLDED_SIZE), 0.3, 0.2)


def layer_backward(primitives: Primitives, of: Operands, needed: str) -> tuple[Tensor, ...]:
    """The gradients ``needed``, of x, A, B, alpha and the weights of the operations."""
    need = (name in needed.split() for name in ("x", "A", "B", "alpha", "weights"))
    weight, _, *factors = of.linear
    saved = (of.x, of.z, weight, *factors, *of.cell, cases.SCALING)
    return Launches(primitives).nas_lora_linear_backward(of.grad_h, *saved, *need)


def cell_backward(primitives: Primitives, of: Operands, needed: str) -> tuple[Tensor, ...]:
    """The gradients ``needed``, of z, alpha and the weights of the operations."""
    need = (name in needed.split() for name in ("z", "alpha", "weights"))
    return Launches(primitives).mixed_cell_backward(of.grad_y, of.z, *of.cell, *need)


# B, heads, (H, W), d: a global map and windows of ViT-B and ViT-H at 1024 x 1024, the global map of
# ViT-B at 2048 x 2048, a window of TinyViT, and a grid wider than a tile of keys.
AttentionShape: TypeAlias = tuple[int, int, tuple[int, int], int]
ATTENTION_SHAPES: list[AttentionShape] = [
    (1, 12, (64, 64), 64),
    (1, 16, (64, 64), 80),
    (25, 12, (14, 14), 64),
    (25, 16, (14, 14), 80),
    (1, 12, (128, 128), 64),
    (4, 4, (7, 7), 32),
    (1, 1, (2, 300), 128),
]
PRODUCTS = {"attention_forward": 2, "attention_keys": 4, "attention_queries": 3}  # of N x N scores


def attention(
    kernels: TritonAttention, shape: AttentionShape, dtype: torch.dtype, device: str = "meta"
) -> None:
    """Attention forward and backward with all gradients; q, k and v are of a joint projection."""
    if shape[-1] > most_features(dtype):  # then the reference computes
        return
    batch, heads, (height, width), features = shape
    maps = partial(torch.randn, device=device, dtype=dtype)
    tokens = height * width
    q, k, v = maps(batch, tokens, 3, heads, features).permute(2, 0, 3, 1, 4)
    biases = (maps(batch, heads, tokens, side) for side in (height, width))
    operands = (q, k, v, *biases)
    o, softmax = kernels.rel_pos_attention(*operands, 0.125)
    saved = (*operands, o, softmax, 0.125)
    kernels.rel_pos_attention_backward(torch.zeros_like(o), *saved, *[True] * 5)


Work = Callable[[Primitives, Operands], tuple[Tensor, ...]]

# What training, search and inference do: h and z, gradients, y, and the h of a merged layer.
WORKS: dict[str, Work] = {
    "layer, forward": lambda primitives, of: Launches(primitives).nas_lora_linear(
        of.x, *of.linear, *of.cell, cases.SCALING
    ),
    "layer, backward, weight step": partial(layer_backward, needed="x A B weights"),
    "layer, backward, architecture step": partial(layer_backward, needed="x alpha"),
    "cell, forward": lambda primitives, of: (Launches(primitives).mixed_cell(of.z, *of.cell),),
    "cell, backward": partial(cell_backward, needed="z alpha weights"),
    "folded layer, forward": lambda primitives, of: (
        Launches(primitives).folded_linear(of.x, *of.linear, *of.folded),
    ),
}
# Other sets of gradients. The same kernels are compiled differently for them.
OTHER_WORKS: dict[str, Work] = {
    "layer, everything": partial(layer_backward, needed="x A B alpha weights"),
    "layer, lora_B alone": partial(layer_backward, needed="B"),
    "cell, maps alone": partial(cell_backward, needed="z"),
    "cell, sums alone": partial(cell_backward, needed="alpha weights"),
}
