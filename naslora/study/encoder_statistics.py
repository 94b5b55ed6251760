"""How local an encoder is, block by block (paper, Table 4).

The mean attention distance (Raghu et al. 2021) is how far a token looks. The relative log amplitude
(Park and Kim 2022) is how much of the high frequencies the output of a block keeps.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from segment_anything.modeling.image_encoder import add_decomposed_rel_pos, window_unpartition
from torch import Tensor, nn

from naslora.errors import UserError
from naslora.methods.encoders import is_plain_vit, tiny_vit_stages


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
        encoder: a plain ViT of SAM, MobileSAM's TinyViT, or SAM 2's Hiera; adapted or not.
        images: (B, 3, S, S) normalised batches, as the encoder takes them.
        image_size: S in pixels.

    Raises:
        UserError: the encoder is of another kind, or its method adds tokens to those of the image.
    """
    blocks = _blocks(encoder)
    encoder.eval()
    distances = [_Mean() for _ in blocks]
    amplitudes = [_Mean() for _ in blocks]
    grids: list[tuple[int, int]] = [(0, 0)] * len(blocks)
    handles = []

    def watch(i: int, block: Any) -> None:
        def before_block(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            grids[i] = inputs[0].shape[1], inputs[0].shape[2]

        def before_attention(attention: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found = attention_distances(attention, inputs[0])  # (B * windows, h, w)
            step, (height, width) = _step(attention), grids[i]
            queries = height // step, width // step
            found = _without_padding(found, _side(block.window_size) // step, queries)
            distances[i].add(found * image_size / grids[i][0])

        def after_block(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            amplitudes[i].add(relative_log_amplitude(output))

        handles.append(block.register_forward_pre_hook(before_block))
        handles.append(block.attn.register_forward_pre_hook(before_attention))
        handles.append(block.register_forward_hook(after_block))

    try:
        for i, block in enumerate(blocks):
            watch(i, block)
        for batch in images:
            encoder(batch)
    finally:
        for handle in handles:
            handle.remove()
    if any(distance.count == 0 for distance in distances):
        raise UserError(
            "attention distances cannot be measured: the run's method attends to more tokens than "
            "those of the image"
        )
    return [
        BlockStatistics(i + 1, _side(block.window_size) or None, distance.value, amplitude.value)
        for i, (block, distance, amplitude) in enumerate(
            zip(blocks, distances, amplitudes, strict=True)
        )
    ]


class _Mean:
    """A running mean of the elements of tensors."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self.total += float(values.double().sum())
        self.count += values.numel()

    @property
    def value(self) -> float:
        return self.total / self.count


def _blocks(encoder: Any) -> list[Any]:
    """The transformer blocks: modules of segment_anything or of timm."""
    for module in (encoder, getattr(encoder, "trunk", encoder)):  # SAM 2 has a trunk
        if is_plain_vit(module):
            return list(module.blocks)
    stages: list[Any] = tiny_vit_stages(encoder)
    blocks = [block for stage in stages for block in stage.blocks]
    if not blocks:
        raise UserError(f"cannot analyse a {type(encoder).__name__}: it has no attention blocks")
    return blocks


def attention_distances(attention: Any, x: Tensor) -> Tensor:
    """Attention distance of each query: sum_k attention_qk |position_q - position_k|.

    Args:
        attention: attention module of segment_anything, of timm's TinyViT, or of timm's Hiera.
        x: its input, (B, h, w, C), or (B, h * w, C) with h = w.

    Returns:
        (B, h, w) float32 distances in tokens of the keys, mean over the heads. Hiera pools the
        queries at the start of a stage: then (B, h / 2, w / 2). A pooled query is in the middle of
        its four tokens.
    """
    batch = x.shape[0]
    h, w = x.shape[1:3] if x.dim() == 4 else attention.resolution
    if x.dim() == 4:
        q, k = _plain_queries_and_keys(attention, x)
    else:
        q, k = _tiny_queries_and_keys(attention, x)
    step = _step(attention)
    if step > 1:
        q = _pooled(attention, q, (h, w))
    keys = _places(h, w, x.device)
    queries = step * _places(h // step, w // step, x.device) + (step - 1) / 2
    away = torch.cdist(queries, keys)  # (M, N)
    distance = x.new_zeros(batch, len(queries), dtype=torch.float32)
    heads = q.shape[1]
    for head in range(heads):  # one at a time: all heads of a global block would take gigabytes
        logits = q[:, head] @ k[:, head].transpose(-2, -1)  # (B, M, N)
        if x.dim() == 3:
            logits = logits + attention.get_attention_biases(x.device)[head]
        elif getattr(attention, "use_rel_pos", False):
            logits = add_decomposed_rel_pos(
                logits,
                q[:, head] / attention.scale,
                attention.rel_pos_h,
                attention.rel_pos_w,
                (h, w),
                (h, w),
            )
        distance += (logits.float().softmax(-1) * away).sum(-1) / heads
    return distance.view(batch, h // step, w // step)


def _places(h: int, w: int, device: torch.device) -> Tensor:
    """(h * w, 2) float32 rows and columns."""
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([rows.flatten(), columns.flatten()], 1).to(device, torch.float32)


def _pooled(attention: Any, q: Tensor, grid: tuple[int, int]) -> Tensor:
    """Queries (B, heads, h * w, d) to those that Hiera pools, (B, heads, h * w / 4, d)."""
    maps = q.transpose(2, 3).flatten(1, 2).unflatten(2, grid)  # (B, heads * d, h, w)
    return attention.q_pool(maps).flatten(2).unflatten(1, (q.shape[1], -1)).transpose(2, 3)


def _side(window: int | tuple[int, int]) -> int:
    """The side of a square window; 0 is none. timm's Hiera gives two equal sides."""
    return window if isinstance(window, int) else window[0]


def _step(attention: Any) -> int:
    """Tokens along an axis for one query: 2 where Hiera pools the queries, else 1."""
    return 1 if getattr(attention, "q_pool", None) is None else 2


def _plain_queries_and_keys(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, (B, heads, N, d) each; the queries are scaled."""
    batch, h, w, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, h * w, 3, attention.num_heads, -1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q * attention.scale, k


def _tiny_queries_and_keys(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of TinyViT, which normalises its input and keeps q, k and v of a head together."""
    batch, tokens, _ = x.shape
    qkv = attention.qkv(attention.norm(x)).view(batch, tokens, attention.num_heads, -1)
    q, k = qkv[..., : 2 * attention.key_dim].transpose(1, 2).chunk(2, dim=-1)
    return q * attention.scale, k


def _without_padding(found: Tensor, window: int, grid: tuple[int, int]) -> Tensor:
    """Values of windows, (B * windows, h, w), as values of the image's tokens, (B, H, W)."""
    if window == 0:
        return found
    padded = tuple(side + -side % window for side in grid)
    return window_unpartition(found[..., None], window, padded, grid)[..., 0]


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
