"""How local an encoder is, block by block (paper, Table 4).

The mean attention distance (Raghu et al. 2021) is how far a token looks. The relative log amplitude
(Park and Kim 2022) is how much of the high frequencies the output of a block keeps.
"""

import math
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any, NamedTuple

import torch
from segment_anything.modeling.image_encoder import window_unpartition
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from naslora.errors import UserError
from naslora.sam.attention import fuse_attention, unfuse_attention
from naslora.sam.encoders import transformer_blocks


class BlockStatistics(NamedTuple):
    """Means over images of one transformer block."""

    block: int
    """Counted from 1, as in the paper."""
    window: int | None
    """Side of the attention windows in tokens; None if a token sees the whole image."""
    attention_distance: float
    """In pixels of the image, mean over heads and queries."""
    log_amplitude: float
    """Natural logarithm of the amplitude of the highest diagonal frequency over that of frequency
    0."""


@torch.no_grad()
def block_statistics(
    encoder: nn.Module, images: Iterable[Tensor], image_size: int
) -> list[BlockStatistics]:
    """Measures every transformer block of an image encoder.

    Queries that pad a window are left out. Keys that pad a window count, because the model attends
    to them.

    Args:
        encoder: of ``build_image_encoder``; adapted or not.
        images: (B, 3, S, S) normalised batches of equal size, as the encoder takes them.
        image_size: S in pixels.

    Raises:
        UserError: the encoder or its method adds tokens to those of the image.
    """
    encoder.eval()
    fused = unfuse_attention(encoder)
    blocks = transformer_blocks(encoder)
    watched = [_Watched(block) for block in blocks if hasattr(block, "window_size")]
    try:
        for batch in images:
            encoder(batch)
    finally:
        for block in watched:
            for handle in block.handles:
                handle.remove()
        if fused:
            fuse_attention(encoder)
    if not watched or not all(block.distances for block in watched):
        raise UserError(
            "attention distances cannot be measured: the run's encoder or method attends to more "
            "tokens than those of the image"
        )
    return [
        BlockStatistics(
            i,
            block.window or None,
            image_size * fmean(block.distances),
            fmean(block.amplitudes),
        )
        for i, block in enumerate(watched, 1)
    ]


class _Watched:
    """Measures a block whenever it computes, until its handles are removed."""

    def __init__(self, block: Any) -> None:
        size = block.window_size
        self.window: int = size if isinstance(size, int) else size[0]  # 0 is none
        self.distances: list[float] = []  # one mean a batch, as shares of the image's side
        self.amplitudes: list[float] = []
        self.found: Tensor | None = None
        attention = getattr(block, "attn", None) or block.attention  # in SAM 3
        self.handles = [
            attention.register_forward_pre_hook(self.before_attention),
            block.register_forward_hook(self.after_block),
        ]

    def before_attention(self, attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.found = attention_distances(attention, *inputs)  # (B * windows, M, M)
        self.step = 1 if getattr(attention, "q_pool", None) is None else 2

    def after_block(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.amplitudes.append(float(relative_log_amplitude(output).mean()))
        if self.found is None:
            return
        tokens = inputs[0].shape[1]
        if self.window:
            side, queries = self.window // self.step, tokens // self.step
            padded = queries + -queries % side
            windows = self.found[..., None]
            self.found = window_unpartition(windows, side, (padded,) * 2, (queries,) * 2)
        self.distances.append(float(self.found.mean()) / tokens)


class _Weights(TorchFunctionMode):
    """Keeps the last softmax of at least three dimensions: the weights of an attention."""

    kept: Tensor

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (Tensor.softmax, nn.functional.softmax) and result.dim() > 2:
            self.kept = result
        return result


def attention_distances(attention: Any, x: Tensor, *further: Any) -> Tensor:
    """Attention distance of each query: sum_k attention_qk |position_q - position_k|.

    Args:
        attention: attention module of segment_anything, of timm's TinyViT, of timm's Hiera, or of
            SAM 3 in transformers, as its package computes it.
        x: its input, (B, N, N, C), or (B, N * N, C).
        further: its further arguments.

    Returns:
        (B, N, N) float32 distances in tokens of the keys, mean over the heads. Hiera pools the
        queries at the start of a stage: then (B, N / 2, N / 2). A pooled query is in the middle of
        its four tokens.
    """
    attention.fused_attn = False  # timm's own fused attention shows no weights
    if hasattr(attention, "config"):
        attention.config._attn_implementation = "eager"  # nor does that of transformers
    with _Weights() as weights:
        attention.forward(x, *further)
    queries, keys = (math.isqrt(count) for count in weights.kept.shape[-2:])
    step = keys // queries
    away = torch.cdist(step * _places(queries, x) + (step - 1) / 2, _places(keys, x))
    found = (weights.kept.float() * away).sum(-1)
    return found.view(len(x), -1, queries, queries).mean(1)


def _places(side: int, like: Tensor) -> Tensor:
    """(side * side, 2) float32 rows and columns."""
    along = torch.arange(side, dtype=torch.float32, device=like.device)
    return torch.cartesian_prod(along, along)


def relative_log_amplitude(features: Tensor) -> Tensor:
    """Log amplitude of the highest diagonal frequency minus that of frequency 0.

    The log amplitudes of the two-dimensional Fourier transform are averaged over the channels.

    Args:
        features: (B, H, W, C) maps.

    Returns:
        (B,) float32.
    """
    amplitude = torch.fft.fft2(features.float(), dim=(1, 2)).abs()
    # The offset, about 1e-6 of a usual amplitude, keeps the logarithm of zero finite.
    logarithm = (amplitude + 1e-6).log().mean(-1)  # (B, H, W)
    height, width = logarithm.shape[1:]
    return logarithm[:, height // 2, width // 2] - logarithm[:, 0, 0]
