"""The Triton kernels of attention, as ``naslora_kernels/attention.py`` documents them.

Triton is imported with the first launch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from naslora_kernels.attention import (
    AttentionNeed,
    SavedAttention,
    empty_gradients,
    empty_results,
    with_contiguous_features,
)
from naslora_kernels.cell import AttentionOperands
from naslora_kernels.saved import check_saved_attention
from naslora_kernels.tensors import ACCUMULATORS
from naslora_kernels.triton.primitives import in_two
from naslora_kernels.triton.tiles import ALL_REGISTERS, AttentionTiles, attention_tiles


class TritonAttention:
    """The operators of attention: one launch forward, at most three backward."""

    def __init__(
        self,
        launch: Callable[..., None],
        capability: Callable[[torch.device], tuple[int, int]],
    ) -> None:
        """Stores how kernels are launched and for what, as ``TritonPrimitives`` does."""
        self._launch = launch
        self._capability = capability

    def rel_pos_attention(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Computes the operator on the arguments of its schema."""
        from naslora_kernels.triton.attention_forward import attention_forward_kernel

        operands, scale = AttentionOperands(*arguments[:5]), arguments[5]
        o, softmax = empty_results(operands)
        operands = AttentionOperands(*map(_readable, operands))
        if o.numel():
            tiles = self._tiles(operands)
            self._launch(
                attention_forward_kernel,
                (_heads(o) * -(-o.shape[2] // tiles.forward["QUERIES"]),),
                *(*operands, o, softmax, *in_two(scale), *_sizes(operands)),
                *map(_strides, (*operands, o)),
                **tiles.forward,
            )
        return o, softmax

    def rel_pos_attention_backward(self, grad_o: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """Computes the operator on the arguments of its schema."""
        saved = SavedAttention(AttentionOperands(*arguments[:5]), *arguments[5:8])
        need = AttentionNeed(*arguments[8:])
        check_saved_attention(grad_o, saved)
        gradients = empty_gradients(saved.operands, need)
        if not grad_o.numel() or not any(need):
            return gradients
        operands = AttentionOperands(*map(_readable, saved.operands))
        grad_o, softmax = _readable(grad_o), saved.softmax.contiguous()
        tiles = self._tiles(operands)
        q, k, v, rel_h, rel_w = (
            gradient if needed else None for gradient, needed in zip(gradients, need, strict=True)
        )
        delta = None
        if need.q or need.k or need.rel_h or need.rel_w:
            delta = self._delta(grad_o, _readable(saved.o), tiles)
        inputs = (grad_o, *operands, softmax, delta)
        rest = (*in_two(saved.scale), *_sizes(operands), *map(_strides, (grad_o, *operands)))
        if need.k or need.v:
            self._keys(inputs, (k, v), rest, tiles)
        if need.q or need.rel_h or need.rel_w:
            row_sums = None
            if rel_h is not None and not tiles.queries_pass["ONE_PIECE"]:
                row_sums = torch.empty_like(rel_h, dtype=ACCUMULATORS[rel_h.dtype])
            self._queries(inputs, (q, rel_h, rel_w, row_sums), rest, tiles)
        return gradients

    def _tiles(self, operands: AttentionOperands) -> AttentionTiles:
        q, grid = operands.q, (operands.rel_h.shape[-1], operands.rel_w.shape[-1])
        return attention_tiles(q.shape[2], grid, q.shape[-1], q.dtype, self._capability(q.device))

    def _delta(self, grad_o: Tensor, o: Tensor, tiles: AttentionTiles) -> Tensor:
        """Returns the sums of dO O over the features, (B, heads, N) in the dtype of sums."""
        from naslora_kernels.triton.attention_backward import attention_delta_kernel

        delta = o.new_empty(o.shape[:-1], dtype=ACCUMULATORS[o.dtype])
        names = ("FEATURES", "LANES", "REST", "QUERIES")
        constants = {name: tiles.forward[name] for name in names}
        self._launch(
            attention_delta_kernel,
            (_heads(o) * -(-o.shape[2] // constants["QUERIES"]),),
            *(grad_o, o, delta, o.shape[1], o.shape[2], _strides(grad_o), _strides(o)),
            **constants,
            num_warps=4,
            **ALL_REGISTERS,
        )
        return delta

    def _keys(
        self,
        inputs: tuple[Tensor | None, ...],
        gradients: tuple[Tensor | None, Tensor | None],
        rest: tuple[object, ...],
        tiles: AttentionTiles,
    ) -> None:
        from naslora_kernels.triton.attention_backward import attention_keys_kernel

        like = next(gradient for gradient in gradients if gradient is not None)
        height, width = rest[5:7]
        key_tiles = -(-height // tiles.keys_pass["ROWS"]) * -(-width // tiles.keys_pass["COLUMNS"])
        self._launch(
            attention_keys_kernel,
            (_heads(like) * key_tiles,),
            *(*inputs, *gradients, *rest, _strides(like)),
            **tiles.keys_pass,
        )

    def _queries(
        self,
        inputs: tuple[Tensor | None, ...],
        gradients: tuple[Tensor | None, ...],
        rest: tuple[object, ...],
        tiles: AttentionTiles,
    ) -> None:
        from naslora_kernels.triton.attention_backward import attention_queries_kernel

        like = next(gradient for gradient in gradients if gradient is not None)
        blocks = -(-like.shape[2] // tiles.queries_pass["QUERIES"])
        self._launch(
            attention_queries_kernel,
            (_heads(like) * blocks,),
            *(*inputs, *gradients, *rest, _strides(like)),
            **tiles.queries_pass,
        )


def _heads(tensor: Tensor) -> int:
    return tensor.shape[0] * tensor.shape[1]


def _sizes(operands: AttentionOperands) -> tuple[int, ...]:
    """Returns B, heads, N, H, W."""
    return *operands.q.shape[:3], operands.rel_h.shape[-1], operands.rel_w.shape[-1]


def _readable(tensor: Tensor) -> Tensor:
    """Returns the tensor, or a copy if the kernels cannot address it.

    They want contiguous features, and offsets in a head that 32 bits hold.
    """
    far = tensor.shape[2] * tensor.stride(2) >= 2**31
    return tensor.contiguous() if far else with_contiguous_features(tensor)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride()[:3]
