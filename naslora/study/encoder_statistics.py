"""How local an encoder is, block by block (paper, Table 4).

The mean attention distance (Raghu et al. 2021) is how far a token looks. The relative log amplitude
(Park and Kim 2022) is how much of the high frequencies the output of a block keeps.
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from segment_anything.modeling.image_encoder import window_unpartition
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from naslora.errors import UserError
from naslora.sam.attention import fuse_attention, unfuse_attention
from naslora.sam.encoders import transformer_blocks

OTHER_TOKENS = (
    "attention distances cannot be measured: the run's encoder or method attends to more tokens "
    "than those of the image"
)


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

    The encoder is of ``build_image_encoder``, adapted or not. It takes ``images``, normalised
    (B, 3, S, S) batches of equal size; ``image_size`` is S in pixels.

    Raises:
        UserError: the encoder or its method adds tokens to those of the image.
    """
    encoder.eval()
    blocks: list[Any] = [b for b in transformer_blocks(encoder) if hasattr(b, "window_size")]
    if not blocks:
        raise UserError(OTHER_TOKENS)
    sizes = (block.window_size for block in blocks)
    windows = [size if isinstance(size, int) else size[0] for size in sizes]
    found: list[list[tuple[float, float]]] = [[] for _ in blocks]  # one pair of means a batch
    weights = AttentionWeights()

    def measure(place: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        batch, tokens = inputs[0].shape[:2]
        side = windows[place] or tokens
        if weights.kept is None or weights.kept.shape[-1] != side**2:
            raise UserError(OTHER_TOKENS)
        count = -(-tokens // side)  # windows along a side
        distances = attention_distances(weights.kept, batch * count**2)
        own = distances.shape[-1]  # side, or half of it
        real, padded = tokens * own // side, count * own
        distances = window_unpartition(distances[..., None], own, (padded,) * 2, (real,) * 2)
        amplitude = float(relative_log_amplitude(output).mean())
        found[place].append((float(distances.mean()) / tokens, amplitude))
        weights.kept = None

    fused = unfuse_attention(encoder)
    with contextlib.ExitStack() as stack:
        if fused:
            stack.callback(fuse_attention, encoder)
        for place, block in enumerate(blocks):
            handle = block.register_forward_hook(partial(measure, place))
            stack.callback(handle.remove)
            attention = getattr(block, "attn", None) or block.attention  # in SAM 3
            attention.fused_attn = False  # timm's own fused attention shows no weights
            if hasattr(attention, "config"):
                attention.config._attn_implementation = "eager"  # nor does that of transformers
        stack.enter_context(weights)
        for batch in images:
            encoder(batch)
    means = [[fmean(values) for values in zip(*own, strict=True)] for own in found]
    return [
        BlockStatistics(i, window or None, image_size * distance, amplitude)
        for i, (window, (distance, amplitude)) in enumerate(zip(windows, means, strict=True), 1)
    ]


class AttentionWeights(TorchFunctionMode):
    """Keeps the last softmax of at least three dimensions: the weights of an attention."""

    kept: Tensor | None = None

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (Tensor.softmax, nn.functional.softmax) and result.dim() > 2:
            self.kept = result
        return result


def attention_distances(weights: Tensor, windows: int) -> Tensor:
    """Attention distance of each query: sum_k attention_qk |position_q - position_k|.

    Args:
        weights: (windows * heads, Q, K) or (windows, heads, Q, K): the attention of Q queries on a
            square to K keys on a square.
        windows: the number of squares.

    Returns:
        (windows, √Q, √Q) float32 distances in tokens of the keys, mean over the heads. Hiera pools
        the queries at the start of a stage: then Q = K / 4. A pooled query is in the middle of its
        four tokens.
    """
    queries, keys = (math.isqrt(count) for count in weights.shape[-2:])
    step = keys // queries
    away = torch.cdist(step * _places(queries, weights) + (step - 1) / 2, _places(keys, weights))
    found = (weights.float() * away).sum(-1)
    return found.view(windows, -1, queries, queries).mean(1)


def _places(side: int, like: Tensor) -> Tensor:
    """(side * side, 2) float32 rows and columns."""
    along = torch.arange(side, dtype=torch.float32, device=like.device)
    return torch.cartesian_prod(along, along)


def relative_log_amplitude(features: Tensor) -> Tensor:
    """Log amplitude of the highest diagonal frequency minus that of frequency 0: (B,) float32.

    The log amplitudes of the two-dimensional Fourier transform of (B, H, W, C) maps are averaged
    over the channels.
    """
    amplitude = torch.fft.fft2(features.float(), dim=(1, 2)).abs()
    # The offset, about 1e-6 of a usual amplitude, keeps the logarithm of zero finite.
    logarithm = (amplitude + 1e-6).log().mean(-1)  # (B, H, W)
    height, width = logarithm.shape[1:]
    return logarithm[:, height // 2, width // 2] - logarithm[:, 0, 0]
