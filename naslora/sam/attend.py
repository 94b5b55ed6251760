"""How fused attention computes: over a grid, in windows, with pooled queries."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora.adapter.layer.adapted import AdaptedLinear
from naslora.adapter.layer.layer import NASLoRALinear
from naslora.adapter.layer.windows import Windows
from naslora_kernels import rel_pos_attention


def traced() -> bool:
    """Whether a graph is recorded that other runtimes execute, which lack the fused operator."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


SMALL_WINDOW = 1024
"""Keys up to which ``dot_product_attention`` keeps the matrix of its weights on CPUs."""


def dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale q kᵀ + bias) v, for windows of any size.

    On CPUs in 16 bits forward and backward of PyTorch's fused kernel take 2 to 5 times the time of
    plain products with windows of 7 x 7 to 14 x 14 tokens, and 1.4 times with 32 x 32. Plain ones
    round as the code that is replaced does, which keeps the logits in 16 bits, too.

    ``q`` is (B, heads, N, d), ``k`` (B, heads, M, d), ``v`` (B, heads, M, e), ``bias``
    (heads, N, M), and the result (B, heads, N, e).
    """
    if q.device.type == "cpu" and q.dtype.itemsize == 2 and k.shape[2] <= SMALL_WINDOW:
        with torch.autocast("cpu", enabled=False):  # which computes softmax in float32
            logits = (q * scale) @ k.transpose(2, 3)
            if bias is not None:
                logits += bias
            return torch.softmax(logits, -1) @ v
    # PyTorch's fused kernel for CPUs takes masks of four dimensions only.
    mask = None if bias is None else bias[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def pooled_attention(
    attention: Any, x: Tensor, heads: int, pool: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Attention of which the queries may be pooled, as SAM 2 defines it.

    ``attention`` has ``scale``, ``qkv`` and ``proj``. ``x`` is (B, H, W, C), an image or windows of
    it, and so is the result, with H and W as they are after ``pool`` of (B, C, H, W) queries.
    """
    batch, height, width, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, height * width, 3, heads, -1)
    q, k, v = qkv.unbind(2)  # each (B, N, heads, d)
    if pool is not None:
        maps = pool(q.reshape(batch, height, width, -1).permute(0, 3, 1, 2))
        height, width = maps.shape[2:]
        q = maps.flatten(2).transpose(1, 2).unflatten(2, (heads, -1))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    o = dot_product_attention(q, k, v, attention.scale)
    return attention.proj(o.transpose(1, 2).reshape(batch, height, width, -1))


def over_grid(attention: Any, x: Tensor) -> Tensor:
    """Attention with decomposed relative positions, as segment_anything defines it.

    ``attention`` has ``qkv``, ``proj``, ``num_heads``, and what ``_attended`` reads. ``x`` and the
    result are (B, H, W, C), an image or windows of it.
    """
    return attention.proj(_attended(attention, *_heads(attention.qkv(x), attention.num_heads)))


def over_windows(attention: Any, x: Tensor, size: int) -> Tensor:
    """The same in windows, of ``size`` tokens a side, of images whose edge SAM pads with zeros.

    Linear layers do not compute the padding: it is the bias before the attention, and dropped after
    it. On CPUs the queries there are left out, too; on GPUs that would be four launches for one.
    """
    pointwise = _pointwise(attention.proj)
    windows = Windows(size, (x.shape[1], x.shape[2]), pointwise and x.device.type == "cpu")
    qkv = _in_windows(attention.qkv, x, windows)
    if windows.by_shape:
        parts = windows.heads(qkv, attention.num_heads)
        return attention.proj(windows.join([_attended(attention, *own) for own in parts]))
    o = _attended(attention, *_heads(qkv, attention.num_heads))
    unpartition, proj = windows.unpartition, attention.proj
    return proj(unpartition(o)) if pointwise else unpartition(proj(o))


def _in_windows(layer: nn.Module, x: Tensor, windows: Windows) -> Tensor:
    """``layer`` on the windows of images."""
    if _pointwise(layer):
        linear: Any = getattr(layer, "base", layer)
        return windows.partition(layer(x), linear.bias)
    if isinstance(layer, AdaptedLinear):
        return layer.in_windows(x, windows)
    # In the order of the original: Conv-LoRA draws a random number for each window.
    y = layer(windows._replace(by_shape=False).partition(x))
    return windows.ordered(y) if windows.by_shape else y


def _pointwise(layer: Any) -> bool:
    """Whether a linear layer, maybe with LoRA, maps each token by itself, and zeros to its bias."""
    kind = type(layer)
    if f"{kind.__module__}.{kind.__name__}" == "peft.tuners.lora.layer.Linear":
        return not any(layer.lora_bias.values())
    return kind is nn.Linear or (isinstance(layer, NASLoRALinear) and layer.cell is None)


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, each (B, H, W, heads, d), of (B, H, W, 3 C)."""
    # Split in the layout of the projection, so that the backward joins the gradients in one pass.
    return qkv.unflatten(-1, (3, heads, -1)).unbind(3)


def _attended(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the heads gather, before the last projection: (B, h, w, C).

    ``attention`` has ``scale``, ``use_rel_pos``, ``rel_pos_h``, ``rel_pos_w``. Queries are (B, h,
    w, heads, d), of the upper left corner of the grid or of all of it, keys and values (B, H, W,
    heads, d).
    """
    grid = k.shape[1], k.shape[2]
    height, width = q.shape[1:3]
    q, k, v = (part.flatten(1, 2).transpose(1, 2) for part in (q, k, v))  # (B, heads, N, d)
    if attention.use_rel_pos:
        by_row = q.unflatten(2, (height, width))  # (B, heads, h, w, d)
        table_h = relative_positions(attention.rel_pos_h, grid[0])[:height]
        table_w = relative_positions(attention.rel_pos_w, grid[1])[:width]
        rel_h = torch.einsum("bnhwc,hck->bnhwk", by_row, table_h).flatten(2, 3)
        rel_w = torch.einsum("bnhwc,wck->bnhwk", by_row, table_w).flatten(2, 3)
        if traced():
            bias = (rel_h[..., None] + rel_w[..., None, :]).flatten(3)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attention.scale)
        else:
            o = rel_pos_attention(q, k, v, rel_h, rel_w, grid, scale=attention.scale)
    else:
        o = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    o = o.transpose(1, 2)
    if traced():  # the decomposed operator's result lies in memory in another way
        o = o.clone(memory_format=torch.contiguous_format)
    return o.flatten(2).unflatten(1, (height, width))


def relative_positions(table: Tensor, size: int) -> Tensor:
    """The embeddings of the distances between all queries and keys of an axis of ``size`` tokens.

    ``table`` is (L, d), one row for each distance from -(L - 1) / 2 to (L - 1) / 2. It is
    interpolated if L is not 2 size - 1. The result is (size, d, size), by query, feature and key.
    """
    distances = 2 * size - 1
    if table.shape[0] != distances:
        table = F.interpolate(table.t()[None], size=distances, mode="linear")[0].t()
    # The distance of key j to query i is in row i - j + size - 1.
    if traced():  # Core ML has no unfold
        place = torch.arange(size, device=table.device)
        return table[place[:, None] - place + size - 1].transpose(1, 2)
    return table.unfold(0, size, 1).flip(2)  # one launch, no indices
