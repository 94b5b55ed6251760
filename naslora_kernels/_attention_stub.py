"""A stand-in for ``naslora_kernels.rel_pos_attention`` until that operator exists."""

import torch
from torch import Tensor


def rel_pos_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    grid: tuple[int, int],
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale q k^T + rel_h + rel_w) v, with the logits in memory.

    Args:
        q, k, v: (B, heads, H * W, d).
        rel_h: (B, heads, H * W, H), added to the logits of the keys in each row of the grid.
        rel_w: (B, heads, H * W, W), the same for columns.
        grid: (H, W).
        scale: d**-0.5 if None.
        backend: not used.

    Returns:
        (B, heads, H * W, d).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (q * scale) @ k.transpose(-2, -1)  # (B, heads, H * W, H * W)
    logits = logits.unflatten(-1, grid) + rel_h[..., :, None] + rel_w[..., None, :]
    return torch.softmax(logits.flatten(-2), -1).to(v.dtype) @ v
