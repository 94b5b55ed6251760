"""The operators of attention with relative positions, and the autograd function around them.

Every backend that serves ``rel_pos_attention`` has two operators in its namespace. This module
states their schemas and their shapes once, as ``ops.py`` does for the cell. The forward keeps its
operands, o and two numbers for each query. The matrix of scores is not kept.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from naslora_kernels.cell import AttentionOperands
from naslora_kernels.ops import define, differentiable_once, only, operator
from naslora_kernels.tensors import ACCUMULATORS

_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor rel_h, Tensor rel_w"
_SCHEMAS = {
    "rel_pos_attention": f"({_OPERANDS}, float scale) -> (Tensor o, Tensor softmax)",
    "rel_pos_attention_backward": (
        f"(Tensor grad_o, {_OPERANDS}, Tensor o, Tensor softmax, float scale, bool need_q, "
        "bool need_k, bool need_v, bool need_rel_h, bool need_rel_w) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}


class AttentionNeed(NamedTuple):
    """Which gradients are needed."""

    q: bool
    k: bool
    v: bool
    rel_h: bool
    rel_w: bool


class SavedAttention(NamedTuple):
    """What the forward keeps for its backward."""

    operands: AttentionOperands
    o: Tensor
    """(B, heads, N, d)."""
    softmax: Tensor
    """(2, B, heads, N), in the dtype of sums: two numbers of each query, of which the backend that
    wrote them makes P again. ``cpp`` keeps the largest score and the sum of exp(score - largest).
    ``triton`` keeps a shift and a factor: P = exp2(score log2(e) - shift) factor. In 16 bits the
    factor is 1. One number for both, the logarithm of the sum, would cost a digit of float32."""
    scale: float


def empty_results(operands: AttentionOperands) -> tuple[Tensor, Tensor]:
    """Returns uninitialised o (B, heads, N, d) and softmax (2, B, heads, N).

    o lies in memory as (B, N, heads, d), so that the projection behind it copies nothing.
    """
    q = operands.q
    return _tokens_first(q), q.new_empty((2, *q.shape[:-1]), dtype=ACCUMULATORS[q.dtype])


def empty_gradients(operands: AttentionOperands, need: AttentionNeed) -> tuple[Tensor, ...]:
    """Returns uninitialised gradients, of size 0 where not needed.

    Those of q, k and v lie in memory as o. Those of rel_h and rel_w are contiguous.
    """
    tokens, biases = operands[:3], operands[3:]
    makers = [(t, _tokens_first) for t in tokens] + [(t, _contiguous) for t in biases]
    return tuple(
        make(tensor) if needed else tensor.new_empty((0,))
        for (tensor, make), needed in zip(makers, need, strict=True)
    )


def with_contiguous_features(tensor: Tensor) -> Tensor:
    """Returns the tensor, or a copy if the features of a token are not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _tokens_first(like: Tensor) -> Tensor:
    batch, heads, tokens, features = like.shape
    return like.new_empty((batch, tokens, heads, features)).transpose(1, 2)


def _contiguous(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


def _shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    return empty_results(AttentionOperands(*arguments[:5]))


def _backward_shapes(grad_o: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return empty_gradients(AttentionOperands(*arguments[:5]), AttentionNeed(*arguments[8:]))


_SHAPES: dict[str, Callable[..., Any]] = {
    "rel_pos_attention": _shapes,
    "rel_pos_attention_backward": _backward_shapes,
}


def define_attention(
    backend: str, implementations: Mapping[str, Callable[..., Any]] | None = None
) -> torch.library.Library:
    """Defines the operators of a backend, as ``ops.define`` does."""
    return define(backend, implementations, _SCHEMAS, _SHAPES)


class RelPosAttention(torch.autograd.Function):
    """o = softmax(scale q k^T + rel_h + rel_w) v. Arguments: a backend, scale, the operands."""

    @staticmethod
    def forward(ctx: Any, backend: str, scale: float, *operands: Tensor) -> Tensor:  # type: ignore[override]
        o, softmax = operator(backend, "rel_pos_attention")(*operands, scale)
        ctx.save_for_backward(*operands, o, softmax)
        ctx.backend, ctx.scale = backend, scale
        return o

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        compute = operator(ctx.backend, "rel_pos_attention_backward")
        gradients = compute(grad_o, *ctx.saved_tensors, ctx.scale, *needed)
        return (None, None, *only(gradients, needed))


def attend(backend: str, operands: AttentionOperands, scale: float) -> Tensor:
    """Computes attention on checked arguments; ``reference.py`` has ``rel_pos_attention``."""
    return RelPosAttention.apply(backend, scale, *operands)
