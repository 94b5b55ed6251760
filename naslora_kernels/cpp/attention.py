"""The C++ kernels of attention, as ``naslora_kernels/attention.py`` documents them."""

from collections.abc import Iterable

from torch import Tensor

from naslora_kernels.attention import (
    AttentionNeed,
    SavedAttention,
    empty_gradients,
    empty_results,
    with_contiguous_features,
)
from naslora_kernels.cell import AttentionOperands
from naslora_kernels.checks import check_attention
from naslora_kernels.cpp.extension import _C
from naslora_kernels.saved import check_saved_attention
from naslora_kernels.tensors import DTYPE_CODES


class CPUAttention:
    """The operators of attention over the C++ kernels."""

    def rel_pos_attention(self, operands: AttentionOperands, scale: float) -> tuple[Tensor, Tensor]:
        grid = (operands.rel_h.shape[-1], operands.rel_w.shape[-1])
        check_attention(operands, grid, scale)  # anyone can call the operator
        o, softmax = empty_results(operands)
        operands = _readable(operands)
        _C.attention_forward(*_arguments(operands, scale), o.data_ptr(), softmax.data_ptr())
        return o, softmax

    def rel_pos_attention_backward(
        self, grad_o: Tensor, saved: SavedAttention, need: AttentionNeed
    ) -> tuple[Tensor, ...]:
        check_saved_attention(grad_o, saved)
        gradients = empty_gradients(saved.operands, need)
        operands = _readable(saved.operands)
        grad_o, o = (with_contiguous_features(t) for t in (grad_o, saved.o))
        softmax = saved.softmax.contiguous()
        outputs = [t.data_ptr() if needed else 0 for t, needed in zip(gradients, need, strict=True)]
        _C.attention_backward(
            *_arguments(operands, saved.scale),
            *_tokens((grad_o, o)),
            softmax.data_ptr(),
            *outputs,
        )
        return gradients


def _readable(operands: AttentionOperands) -> AttentionOperands:
    return AttentionOperands(*map(with_contiguous_features, operands))


def _arguments(operands: AttentionOperands, scale: float) -> tuple[int | float, ...]:
    """Returns the arguments that describe attention on readable operands."""
    q, _, _, rel_h, rel_w = operands
    batch, heads, _, features = q.shape
    grid = (rel_h.shape[-1], rel_w.shape[-1])
    return (DTYPE_CODES[q.dtype], batch, heads, *grid, features, scale, *_tokens(operands))


def _tokens(tensors: Iterable[Tensor]) -> list[int]:
    """Returns the address and the first three strides of each tensor (B, heads, N, features)."""
    return [n for tensor in tensors for n in (tensor.data_ptr(), *tensor.stride()[:3])]
