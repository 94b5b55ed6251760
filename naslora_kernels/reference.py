"""The definition of correct: cell, adapter layer and attention in readable PyTorch.

Every other backend is tested against these functions. They run on any device, in any float dtype,
under autograd and torch.compile. They trust their arguments: ``functional.py`` has checked them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from naslora_kernels.cell import AttentionOperands, Cell, LoRALinear
from naslora_kernels.operations import AVG_POOL, CONVOLUTIONS, MAX_POOL, SKIP
from naslora_kernels.tensors import ACCUMULATORS


def unavailable_reason() -> str | None:
    """Returns None: the reference can always be used."""
    return None


def unsupported_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Returns None: the reference serves every device and floating dtype."""
    return None


def mixed_cell(z: Tensor, cell: Cell) -> Tensor:
    """Eq. 2-3: y_S = sum_i softmax(alpha)_i O_i(z_S); channels outside S pass unchanged.

    16-bit inputs are computed in float32 and rounded once, at the end.
    """
    alpha, *depthwise, pw, channels = cell
    if pw.shape[-1] == 0:  # S is empty: plain LoRA
        return z.clone()
    compute = ACCUMULATORS[z.dtype]
    with torch.autocast(z.device.type, enabled=False):
        selected = z if channels is None else z.index_select(-1, channels)  # (B, H, W, c)
        maps = selected.to(compute).permute(0, 3, 1, 2)  # (B, c, H, W)
        mixture = alpha.to(compute).softmax(0)
        mixed = mixture[SKIP] * maps
        for i, conv in enumerate(CONVOLUTIONS):
            mixed = mixed + mixture[i] * _separable(maps, depthwise[i], pw[i], conv.dilation)
        mixed = mixed + mixture[AVG_POOL] * F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
        mixed = mixed + mixture[MAX_POOL] * F.max_pool2d(maps, 3, 1, 1)
        y = mixed.permute(0, 2, 3, 1).to(z.dtype)  # (B, H, W, c)
    return y if channels is None else z.index_copy(-1, channels, y)


def _separable(maps: Tensor, dw: Tensor, pw: Tensor, dilation: int) -> Tensor:
    """Depthwise k x k, then pointwise, zero-padded to the same size; (B, c, H, W) to the same."""
    c, kernel = maps.shape[1], dw.shape[-1]
    reach = dilation * (kernel // 2)
    depthwise = F.conv2d(
        maps, dw.to(maps.dtype).unsqueeze(1), padding=reach, dilation=dilation, groups=c
    )
    return F.conv2d(depthwise, pw.to(maps.dtype)[:, :, None, None])


def nas_lora_linear(x: Tensor, linear: LoRALinear, cell: Cell, scaling: float) -> Tensor:
    """Eq. 3: h = W0 x + b0 + s W_d y with y the mixed cell of z = W_e x."""
    weight, bias, lora_A, lora_B = linear
    with torch.autocast(x.device.type, enabled=False):
        h = F.linear(x, weight, bias)  # (B, H, W, C_out)
        z = F.linear(x, lora_A.to(x.dtype))  # (B, H, W, r)
        y = mixed_cell(z, cell)  # (B, H, W, r)
        return h + scaling * F.linear(y, lora_B.to(x.dtype))


def folded_cell(z: Tensor, kernel: Tensor, avg_weight: float, max_weight: float) -> Tensor:
    """y = K * z + avg_weight avg_pool(z) + max_weight max_pool(z); 16-bit as in ``mixed_cell``."""
    compute = ACCUMULATORS[z.dtype]
    with torch.autocast(z.device.type, enabled=False):
        maps = z.to(compute).permute(0, 3, 1, 2)  # (B, c, H, W)
        y = F.conv2d(maps, kernel.to(compute), padding=kernel.shape[-1] // 2)
        if avg_weight:
            y = y + avg_weight * F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
        if max_weight:
            y = y + max_weight * F.max_pool2d(maps, 3, 1, 1)
        return y.permute(0, 2, 3, 1).to(z.dtype)


def folded_linear(
    x: Tensor, linear: LoRALinear, kernel: Tensor, avg_weight: float, max_weight: float
) -> Tensor:
    """h = W x + b + W_d y with y the folded cell of z = W_e x."""
    weight, bias, lora_A, lora_B = linear
    with torch.autocast(x.device.type, enabled=False):
        z = F.linear(x, lora_A.to(x.dtype))  # (B, H, W, c)
        y = folded_cell(z, kernel, avg_weight, max_weight)
        return F.linear(x, weight, bias) + F.linear(y, lora_B.to(x.dtype))


def rel_pos_attention(operands: AttentionOperands, scale: float) -> Tensor:
    """o = softmax(S) v with S[n, kl] = scale q_n k_kl + rel_h[n, k] + rel_w[n, l].

    16-bit inputs are computed in float32 and rounded once, at the end.
    """
    dtype = operands.q.dtype
    q, k, v, rel_h, rel_w = (tensor.to(ACCUMULATORS[dtype]) for tensor in operands)
    with torch.autocast(q.device.type, enabled=False):
        scores = (q * scale) @ k.transpose(-2, -1)  # (B, heads, N, N)
        bias = rel_h[..., :, None] + rel_w[..., None, :]  # (B, heads, N, H, W)
        return ((scores + bias.flatten(-2)).softmax(-1) @ v).to(dtype)
