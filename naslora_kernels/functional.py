"""The public functions. Each one checks its arguments, chooses a backend and computes.

The tensors of the cell and of the linear layer become ``Cell`` and ``LoRALinear`` here.
"""

import torch
from torch import Tensor

from naslora_kernels.backends import select_backend
from naslora_kernels.cell import AttentionOperands, Cell, LoRALinear
from naslora_kernels.checks import (
    check_attention,
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
    """Mixes the eight candidate operations on some channels of a map (paper, Eq. 2-3).

    y_S = sum_i softmax(alpha)_i O_i(z_S), and y = z on the channels outside S. The result is
    differentiable in every floating argument. 16-bit maps are accumulated in float32.

    Args:
        z: (B, H, W, r) maps in float32, float64, bfloat16 or float16, channels last. Any strides.
            B may be 0.
        alpha: (8,) architecture logits, in the order of ``OPERATIONS``.
        dw_sep3: (c, 3, 3) depthwise kernel of ``sep_conv_3x3``.
        dw_sep5: (c, 5, 5) depthwise kernel of ``sep_conv_5x5``.
        dw_dil3: (c, 3, 3) depthwise kernel of ``dil_conv_3x3``, dilation 2.
        dw_dil5: (c, 5, 5) depthwise kernel of ``dil_conv_5x5``, dilation 2.
        pw: (4, c, c) pointwise kernels of the four convolutions as [operation, output, input].
        channels: (c,) int64, the distinct channels S. None selects all channels, so c = r. If S is
            empty, y = z.
        backend: the name of the backend that computes. None takes NASLORA_BACKEND if it is set,
            else the best backend that serves these tensors. Inside a transform of torch.func
            (vmap, grad, jvp, ...) and with forward-mode derivatives the reference computes.

    alpha, the depthwise kernels and pw have the dtype of z, or float32 if z has 16 bits.

    Infinity and NaN: with finite parameters, the same elements of y and of dL/dz are finite as in
    the reference. Where the reference is not finite, no backend is, but it may return NaN for an
    infinity. A parameter or an incoming gradient that is not finite may spread further than in the
    reference: the zeros around a map are multiplied too. Triton may leave out a tap that reaches no
    pixel, whatever it holds. Sums run in another order, so near the
    largest number of the dtype they may overflow where the reference does not, and the reverse. If
    B is 0, gradients are 0, whatever the parameters hold.

    float16 has steps of 6e-8 below 6e-5. Smaller results and gradients have errors of some percent;
    scale the loss, as ``torch.amp.GradScaler`` does.

    ``channels`` may change between calls, also through ``.data``. On a CPU every pass checks its
    values. On a GPU they are read again when the tensor's version changes; those of an inference
    tensor, which has no version, are read once. Values that are out of range without that give a
    wrong y, but no access outside the map.

    Returns:
        y (B, H, W, r) in the dtype of ``z``.

    Raises:
        TypeError: an argument is not a tensor or has a wrong dtype.
        ValueError: an argument has a wrong shape, device or channel, or the backend is unknown.
        RuntimeError: the named backend cannot serve this call. Raised by the backward: a saved
            tensor's shape, dtype or storage has changed since the forward, or a second derivative
            is asked of a backend that is not the reference.
    """
    cell = Cell(alpha, dw_sep3, dw_sep5, dw_dil3, dw_dil5, pw, channels)
    check_cell("z", z, cell)
    return select_backend(z, backend, "mixed_cell").mixed_cell(z, cell)


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
    """Computes a linear layer with a NAS-LoRA adapter (paper, Eq. 3).

    h = W0 x + b0 + s W_d y with y the mixed cell of z = W_e x. The result is differentiable in
    every floating argument. Under autocast, ``x``, ``weight`` and ``bias`` are cast to its dtype
    unless they are float64. A float32 adapter is not cast, and its gradients are float32. z and
    dL/dy are rounded to the dtype of ``x``. Infinity, NaN and small numbers are as in
    ``mixed_cell``.

    Args:
        x: (B, H, W, C_in) token grid, in one of the dtypes of ``mixed_cell``. Any strides. B may
            be 0.
        weight: (C_out, C_in) the linear layer's weight W0, in the dtype of ``x``.
        bias: (C_out,) its bias b0, in the dtype of ``x``, or None.
        lora_A: (r, C_in) the encoder W_e.
        lora_B: (C_out, r) the decoder W_d.
        alpha, dw_sep3, dw_sep5, dw_dil3, dw_dil5, pw, channels: the cell, as in ``mixed_cell``.
            If ``channels`` is empty (c = 0), this is plain LoRA.
        scaling: s, usually lora_alpha / rank.
        backend: as in ``mixed_cell``.

    Returns:
        h (B, H, W, C_out) in the dtype of ``x``, or of autocast if it is enabled.

    Raises:
        TypeError, ValueError, RuntimeError: as ``mixed_cell``.
    """
    x, weight, bias = _autocast(x, weight, bias)
    linear = LoRALinear(weight, bias, lora_A, lora_B)
    cell = Cell(alpha, dw_sep3, dw_sep5, dw_dil3, dw_dil5, pw, channels)
    check_layer(x, linear, cell, scaling)
    serving = select_backend(x, backend, "nas_lora_linear")
    return serving.nas_lora_linear(x, linear, cell, float(scaling))


def folded_cell(
    z: Tensor,
    kernel: Tensor,
    average: float = 0.0,
    maximum: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Computes a cell after the search, for inference: one convolution and the two poolings.

    y = K * z + average * avg_pool_3x3(z) + maximum * max_pool_3x3(z). This equals ``mixed_cell`` on
    all channels if K is the cell's ``folded_convolution`` and the other two weights are those of
    its mixture. A pooling whose weight is zero is not computed. If a gradient is needed, or
    torch.export traces, the PyTorch reference computes.

    Args:
        z: (B, H, W, c) maps, as in ``mixed_cell``.
        kernel: (c, c, k, k) K as [output, input, row, column], as ``conv2d`` takes it. k is 1, 3,
            5, 7 or 9. Padding is zero. Its dtype is that of z, or float32 if z has 16 bits.
        average: the weight of the average pooling, which divides by the number of valid pixels.
        maximum: the weight of the max-pooling.
        backend: as in ``mixed_cell``.

    Returns:
        y (B, H, W, c) in the dtype of ``z``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``mixed_cell``.
    """
    check_folded_cell("z", z, kernel, average, maximum)
    backend = "reference" if _needs_reference(z, kernel) else backend
    return select_backend(z, backend, "folded_cell").folded_cell(
        z, kernel, float(average), float(maximum)
    )


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
    """Computes a linear layer with a folded cell, for inference: h = W x + b + W_d y(W_e x).

    This is ``nas_lora_linear`` after the search. Autocast works as there. Gradients work as in
    ``folded_cell``.

    Args:
        x: (B, H, W, C_in) token grid, as in ``nas_lora_linear``.
        weight: (C_out, C_in), in the dtype of ``x``. Contains the channels that bypass the cell.
        bias: (C_out,), in the dtype of ``x``, or None.
        lora_A: (c, C_in) the rows of the encoder that feed the cell.
        lora_B: (C_out, c) the columns of the decoder that read the cell, times the scaling s.
        kernel, average, maximum: the cell, as in ``folded_cell``.
        backend: as in ``mixed_cell``.

    Returns:
        h (B, H, W, C_out) in the dtype of ``x``, or of autocast if it is enabled.

    Raises:
        TypeError, ValueError, RuntimeError: as ``mixed_cell``.
    """
    x, weight, bias = _autocast(x, weight, bias)
    linear = LoRALinear(weight, bias, lora_A, lora_B)
    check_folded_linear(x, linear, kernel, average, maximum)
    backend = "reference" if _needs_reference(x, *linear, kernel) else backend
    serving = select_backend(x, backend, "folded_linear")
    return serving.folded_linear(x, linear, kernel, float(average), float(maximum))


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
    """Computes SAM's attention with decomposed relative positions.

    For N queries n and keys kl of an (H, W) grid in row-major order:

        S[n, kl] = scale q_n k_kl + rel_h[n, k] + rel_w[n, l]
        o = softmax(S) v

    The result is differentiable in q, k, v, rel_h and rel_w. S is not kept: the backward recomputes
    it, tile by tile. 16-bit operands are accumulated in float32. Under autocast, the operands are
    cast to its dtype unless they are float64. NaN and infinity make the same elements of o NaN or
    infinite as in the reference.

    Args:
        q: (B, heads, N, d) queries in float32, float64, bfloat16 or float16. Any strides. B may be
            0. Nothing is copied if the features are contiguous, as those of a joint projection are.
            SAM's are all tokens of the grid, N = H W; they may be fewer.
        k, v: (B, heads, H W, d) keys and values, in the dtype of q.
        rel_h: (B, heads, N, H) what a query adds to its scores for each row of keys, in the dtype
            of q. SAM's is q R_h[i - k] for a query in row i, q not scaled.
        rel_w: (B, heads, N, W) the same for each column of keys.
        grid: (H, W).
        scale: the factor of q k^T. None takes d ** -0.5.
        backend: as in ``mixed_cell``. On GPUs ``triton`` computes this function; ``cuda`` does not.
            ``triton`` leaves heads of more than 128 features, in float64 of more than 64, to the
            PyTorch reference, which keeps S.

    Returns:
        o (B, heads, N, d) in the dtype of q, or of autocast if it is enabled. Its memory may be
        laid out as (B, N, heads, d), so that joining the heads copies nothing.

    Raises:
        TypeError: an argument is not a tensor or has a wrong dtype, or grid is no pair of integers.
        ValueError: an argument has a wrong shape or device, or the backend is unknown.
        RuntimeError: as ``mixed_cell``.
    """
    operands = AttentionOperands(q, k, v, rel_h, rel_w)
    dtype = _autocast_dtype(q)
    if dtype is not None:
        operands = AttentionOperands(*(_cast(tensor, dtype) for tensor in operands))
    check_attention(operands, grid, scale)
    scale = operands.q.shape[-1] ** -0.5 if scale is None else float(scale)
    serving = select_backend(operands.q, backend, "rel_pos_attention")
    most_features = getattr(serving, "most_features", None)
    if most_features is not None and operands.q.shape[-1] > most_features(operands.q.dtype):
        serving = select_backend(operands.q, "reference", "rel_pos_attention")
    return serving.rel_pos_attention(operands, scale)


def _needs_reference(*tensors: Tensor | None) -> bool:
    """Returns whether a folded cell needs gradients, or plain operators for another runtime."""
    if torch.compiler.is_exporting():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts the arguments of a linear layer as autocast does. float64 is not cast."""
    dtype = _autocast_dtype(x)
    if dtype is None:
        return x, weight, bias
    return _cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)


def _autocast_dtype(like: Tensor) -> torch.dtype | None:
    """Returns the dtype to which autocast casts on a tensor's device; None if it is disabled."""
    device = like.device.type if isinstance(like, Tensor) else "cpu"  # not checked yet
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    given = isinstance(tensor, Tensor) and tensor.is_floating_point()  # the checks refuse others
    return tensor.to(dtype) if given and tensor.dtype != torch.float64 else tensor
