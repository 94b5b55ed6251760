"""How local an encoder is, block by block (paper, Table 4).

The mean attention distance (Raghu et al. 2021) says how far a token looks, the relative log
amplitude (Park and Kim 2022) how much of the high frequencies its output keeps.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from segment_anything.modeling.image_encoder import add_decomposed_rel_pos, window_unpartition
from torch import Tensor, nn

from naslora.errors import UserError
from naslora.methods.encoders import is_plain_vit, tiny_vit_stages


class BlockStatistics(NamedTuple):
    """Means over images of one transformer block."""

    block: int
    """From 1, as the paper counts."""
    window: int | None
    """Side of its attention windows in tokens; None if a token sees the whole image."""
    attention_distance: float
    """In pixels of the image, mean over heads and queries."""
    log_amplitude: float
    """Of the highest diagonal frequency, relative to that of frequency 0; natural logarithm."""


@torch.no_grad()
def block_statistics(
    encoder: nn.Module, images: Iterable[Tensor], image_size: int
) -> list[BlockStatistics]:
    """Measures every transformer block of an image encoder.

    A query that only pads a window is left out; a key that pads one is attended to, and counts.

    Args:
        encoder: a plain ViT of SAM, or MobileSAM's TinyViT; adapted or not.
        images: (B, 3, S, S) batches as the encoder takes them, normalised.
        image_size: S in pixels, the unit of the distances.

    Raises:
        UserError: an encoder of another kind, or one whose method adds tokens to the image's.
    """
    blocks = _blocks(encoder)
    encoder.eval()
    distances = [_Mean() for _ in blocks]
    amplitudes = [_Mean() for _ in blocks]
    grids: list[tuple[int, int]] = [(0, 0)] * len(blocks)
    handles = []

    def watch(i: int, block: nn.Module) -> None:
        def before_block(_, inputs: tuple[Tensor, ...]) -> None:
            grids[i] = inputs[0].shape[1:3]

        def before_attention(attention: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found = attention_distances(attention, inputs[0])  # (B * windows, h, w)
            found = _without_padding(found, block.window_size, grids[i])
            distances[i].add(found * image_size / grids[i][0])

        def after_block(_, inputs: tuple[Tensor, ...], output: Tensor) -> None:
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
            "the image's"
        )
    return [
        BlockStatistics(i + 1, block.window_size or None, distance.value, amplitude.value)
        for i, (block, distance, amplitude) in enumerate(
            zip(blocks, distances, amplitudes, strict=True)
        )
    ]


class _Mean:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self.total += float(values.double().sum())
        self.count += values.numel()

    @property
    def value(self) -> float:
        return self.total / self.count


def _blocks(encoder: nn.Module) -> list[nn.Module]:
    if is_plain_vit(encoder):
        return list(encoder.blocks)
    blocks = [block for stage in tiny_vit_stages(encoder) for block in stage.blocks]
    if not blocks:
        raise UserError(f"cannot analyse a {type(encoder).__name__}: it has no attention blocks")
    return blocks


def attention_distances(attention: nn.Module, x: Tensor) -> Tensor:
    """How far each query looks, in tokens: sum_k attention_qk |position_q - position_k|.

    Args:
        attention: of segment_anything, or of timm's TinyViT.
        x: its input, (B, h, w, C) or (B, h * w, C) with h = w.

    Returns:
        (B, h, w), mean over the heads.
    """
    batch = x.shape[0]
    h, w = x.shape[1:3] if x.dim() == 4 else attention.resolution
    if x.dim() == 4:
        q, k = _plain_queries_and_keys(attention, x)
    else:
        q, k = _tiny_queries_and_keys(attention, x)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1).to(x.device, torch.float32)
    away = torch.cdist(places, places)  # (N, N)
    distance = x.new_zeros(batch, h * w, dtype=torch.float32)
    heads = q.shape[1]
    for head in range(heads):  # one at a time: all of a global block's would take gigabytes
        logits = q[:, head] @ k[:, head].transpose(-2, -1)  # (B, N, N)
        if x.dim() == 3:
            logits = logits + attention.get_attention_biases(x.device)[head]
        elif attention.use_rel_pos:
            logits = add_decomposed_rel_pos(
                logits,
                q[:, head] / attention.scale,
                attention.rel_pos_h,
                attention.rel_pos_w,
                (h, w),
                (h, w),
            )
        distance += (logits.float().softmax(-1) * away).sum(-1) / heads
    return distance.view(batch, h, w)


def _plain_queries_and_keys(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, heads, N, d) each; the queries scaled."""
    batch, h, w, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, h * w, 3, attention.num_heads, -1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q * attention.scale, k


def _tiny_queries_and_keys(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """As above; TinyViT normalises inside and keeps q, k, v of a head together."""
    batch, tokens, _ = x.shape
    qkv = attention.qkv(attention.norm(x)).view(batch, tokens, attention.num_heads, -1)
    q, k = qkv[..., : 2 * attention.key_dim].transpose(1, 2).chunk(2, dim=-1)
    return q * attention.scale, k


def _without_padding(found: Tensor, window: int, grid: tuple[int, int]) -> Tensor:
    """(B * windows, h, w) of windows to (B, H, W) of the image's tokens."""
    height, width = grid
    if window == 0:
        return found
    padded = tuple(side + -side % window for side in grid)
    return window_unpartition(found[..., None], window, padded, (height, width))[..., 0]


def relative_log_amplitude(features: Tensor) -> Tensor:
    """(B,) of (B, H, W, C) maps: log amplitude of the highest diagonal frequency less that of 0.

    The logarithms of the two-dimensional Fourier transform's amplitudes are averaged over the
    channels.
    """
    amplitude = torch.fft.fft2(features.float(), dim=(1, 2)).abs()
    # Some 1e-6 of what is usual, so that a map without a frequency has no infinite logarithm
    logarithm = (amplitude + 1e-6).log().mean(-1)  # (B, H, W)
    height, width = logarithm.shape[1:]
    return logarithm[:, height // 2, width // 2] - logarithm[:, 0, 0]
