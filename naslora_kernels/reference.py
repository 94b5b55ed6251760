"""The definition of right: the mixed cell and the adapter layer in readable PyTorch.

Every other backend is held against these functions. They run on any device, in any float dtype,
under autograd and torch.compile. Arguments are trusted; ``functional.py`` has checked them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from naslora_kernels.operations import AVG_POOL, CONVOLUTIONS, MAX_POOL, SKIP


def unavailable_reason() -> str | None:
    """The reference can always be used."""
    return None


def unsupported_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """The reference serves every device and floating dtype."""
    return None


def mixed_cell(
    z: Tensor, alpha: Tensor, depthwise: tuple[Tensor, ...], pw: Tensor, channels: Tensor | None
) -> Tensor:
    """Eq. 2-3: y_S = sum_i softmax(alpha)_i O_i(z_S); channels outside S pass unchanged.

    16-bit inputs are computed in float32 and rounded once, at the end.
    """
    if pw.shape[-1] == 0:  # S is empty: plain LoRA
        return z.clone()
    compute = torch.float32 if z.dtype in (torch.float16, torch.bfloat16) else z.dtype
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


def nas_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    alpha: Tensor,
    depthwise: tuple[Tensor, ...],
    pw: Tensor,
    channels: Tensor | None,
    scaling: float,
) -> Tensor:
    """Eq. 3: h = W0 x + b0 + s W_d y with y the mixed cell of z = W_e x."""
    with torch.autocast(x.device.type, enabled=False):
        h = F.linear(x, weight, bias)  # (B, H, W, C_out)
        z = F.linear(x, lora_A.to(x.dtype))  # (B, H, W, r)
        y = mixed_cell(z, alpha, depthwise, pw, channels)  # (B, H, W, r)
        return h + scaling * F.linear(y, lora_B.to(x.dtype))


def folded_cell(z: Tensor, kernel: Tensor, average: float, maximum: float) -> Tensor:
    """y = K * z + average * avg_pool(z) + maximum * max_pool(z); 16-bit as in ``mixed_cell``."""
    compute = torch.float32 if z.dtype in (torch.float16, torch.bfloat16) else z.dtype
    with torch.autocast(z.device.type, enabled=False):
        maps = z.to(compute).permute(0, 3, 1, 2)  # (B, c, H, W)
        y = F.conv2d(maps, kernel.to(compute), padding=kernel.shape[-1] // 2)
        if average:
            y = y + average * F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
        if maximum:
            y = y + maximum * F.max_pool2d(maps, 3, 1, 1)
        return y.permute(0, 2, 3, 1).to(z.dtype)


def folded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    kernel: Tensor,
    average: float,
    maximum: float,
) -> Tensor:
    """h = W x + b + W_d y with y the folded cell of z = W_e x."""
    with torch.autocast(x.device.type, enabled=False):
        z = F.linear(x, lora_A.to(x.dtype))  # (B, H, W, c)
        y = folded_cell(z, kernel, average, maximum)
        return F.linear(x, weight, bias) + F.linear(y, lora_B.to(x.dtype))
