"""The public functions: check the arguments once, choose a backend, compute."""

import torch
from torch import Tensor

from naslora_kernels.backends import select_backend
from naslora_kernels.checks import (
    check_cell,
    check_folded_cell,
    check_folded_linear,
    check_layer,
)


def mixed_cell(
    z: Tensor,
    alpha: Tensor,
    dw_sep3: Tensor,
    dw_sep5: Tensor,
    dw_dil3: Tensor,
    dw_dil5: Tensor,
    pw: Tensor,
    channels: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Mixes the eight candidate operations on some of a map's channels (paper, Eq. 2-3).

    y_S = sum_i softmax(alpha)_i O_i(z_S), and y = z on the other channels. Differentiable in every
    floating argument. 16-bit maps are accumulated in float32.

    Args:
        z: (B, H, W, r) floating maps, channels last; any strides; B may be 0.
        alpha: (8,) architecture logits, in the order of ``OPERATIONS``.
        dw_sep3: (c, 3, 3) depthwise kernel of ``sep_conv_3x3``.
        dw_sep5: (c, 5, 5) depthwise kernel of ``sep_conv_5x5``.
        dw_dil3: (c, 3, 3) depthwise kernel of ``dil_conv_3x3``, dilation 2.
        dw_dil5: (c, 5, 5) depthwise kernel of ``dil_conv_5x5``, dilation 2.
        pw: (4, c, c) pointwise kernels of the four convolutions as [operation, output, input].
        channels: (c,) int64, the distinct channels S; None means all, and then c = r. An empty S
            makes the cell the identity.
        backend: which backend computes; None picks the best that serves these tensors.

    Returns:
        y of the shape and dtype of ``z``.

    Raises:
        TypeError: an argument is no tensor, or has a wrong dtype.
        ValueError: a wrong shape, device or channel, or an unknown backend.
        RuntimeError: the named backend cannot serve this call.
    """
    depthwise = (dw_sep3, dw_sep5, dw_dil3, dw_dil5)
    check_cell("z", z, alpha, depthwise, pw, channels)
    return select_backend(z, backend).mixed_cell(z, alpha, depthwise, pw, channels)


def nas_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    alpha: Tensor,
    dw_sep3: Tensor,
    dw_sep5: Tensor,
    dw_dil3: Tensor,
    dw_dil5: Tensor,
    pw: Tensor,
    channels: Tensor | None = None,
    scaling: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with a NAS-LoRA adapter: h = W0 x + b0 + s W_d y(W_e x) (paper, Eq. 3).

    Differentiable in every floating argument. Under autocast, ``x``, ``weight`` and ``bias`` are
    cast as for ``torch.nn.functional.linear``; the adapter may stay float32 and then gets float32
    gradients.

    Args:
        x: (B, H, W, C_in) floating token grid; any strides; B may be 0.
        weight: (C_out, C_in) the linear layer's weight W0, in the dtype of ``x``.
        bias: (C_out,) its bias b0, or None.
        lora_A: (r, C_in) the encoder W_e.
        lora_B: (C_out, r) the decoder W_d.
        alpha, dw_sep3, dw_sep5, dw_dil3, dw_dil5, pw, channels: the cell, as in ``mixed_cell``.
            With ``channels`` empty (c = 0) this is plain LoRA.
        scaling: s, usually lora_alpha / rank.
        backend: as in ``mixed_cell``.

    Returns:
        h of shape (B, H, W, C_out) in the dtype of ``x`` (of autocast, where it is on).

    Raises:
        TypeError, ValueError, RuntimeError: as ``mixed_cell``.
    """
    x, weight, bias = _autocast(x, weight, bias)
    depthwise = (dw_sep3, dw_sep5, dw_dil3, dw_dil5)
    check_layer(x, weight, bias, lora_A, lora_B, alpha, depthwise, pw, channels, scaling)
    return select_backend(x, backend).nas_lora_linear(
        x, weight, bias, lora_A, lora_B, alpha, depthwise, pw, channels, float(scaling)
    )


def folded_cell(
    z: Tensor,
    kernel: Tensor,
    average: float = 0.0,
    maximum: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """A cell after the search, for inference: one convolution, and what pooling remains.

    y = K * z + average * avg_pool_3x3(z) + maximum * max_pool_3x3(z), the result of ``mixed_cell``
    on all channels where K is its ``folded_convolution`` and the poolings' weights are those of
    the mixture. A pooling whose weight is zero is not computed. Where a gradient is due, and in
    what torch.export traces, the PyTorch reference computes.

    Args:
        z: (B, H, W, c) floating maps, channels last; any strides; B may be 0.
        kernel: (c, c, k, k) as ``conv2d`` takes it, k = 1, 3, 5, 7 or 9; zero padding.
        average: weight of the average pooling, which divides by the number of valid pixels.
        maximum: weight of the max-pooling.
        backend: as in ``mixed_cell``.

    Returns:
        y of the shape and dtype of ``z``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``mixed_cell``.
    """
    check_folded_cell("z", z, z.shape[-1], kernel, average=average, maximum=maximum)
    backend = "reference" if _needs_reference(z, kernel) else backend
    return select_backend(z, backend).folded_cell(z, kernel, float(average), float(maximum))


def folded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    kernel: Tensor,
    average: float = 0.0,
    maximum: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """A linear layer with a folded cell beside it, for inference: h = W x + b + W_d y(W_e x).

    What ``nas_lora_linear`` is after the search. Autocast as there, gradients as in
    ``folded_cell``.

    Args:
        x: (B, H, W, C_in) floating token grid; any strides; B may be 0.
        weight: (C_out, C_in), in the dtype of ``x``; channels that bypass the cell are folded in.
        bias: (C_out,), or None.
        lora_A: (c, C_in) the encoder's rows that feed the cell.
        lora_B: (C_out, c) the decoder's columns behind it, scaling included.
        kernel, average, maximum: the cell, as in ``folded_cell``.
        backend: as in ``mixed_cell``.

    Returns:
        h of shape (B, H, W, C_out) in the dtype of ``x`` (of autocast, where it is on).

    Raises:
        TypeError, ValueError, RuntimeError: as ``mixed_cell``.
    """
    x, weight, bias = _autocast(x, weight, bias)
    check_folded_linear(x, weight, bias, lora_A, lora_B, kernel, average=average, maximum=maximum)
    tensors = (x, weight, bias, lora_A, lora_B, kernel)
    backend = "reference" if _needs_reference(*tensors) else backend
    return select_backend(x, backend).folded_linear(*tensors, float(average), float(maximum))


def _needs_reference(*tensors: Tensor | None) -> bool:
    """Whether a folded cell has to be differentiable, or plain operators for other runtimes."""
    if torch.compiler.is_exporting():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Casts as autocast would cast the arguments of a linear layer; float64 it leaves alone."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    ]
