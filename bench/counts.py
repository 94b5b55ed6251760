"""What one call does, counted: numbers that no load on the machine changes."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from naslora_kernels import available_backends
from naslora_kernels.operations import CONVOLUTIONS

TAPS = 41  # of the folded convolution; see docs/cpu_kernels.md
FOLDED_UP_TO = 3  # channels; more are convolved one operation after the other


@dataclass(frozen=True)
class Counts:
    """Of one call."""

    operations: int
    """Multiplications and additions of products and convolutions, forward and backward."""
    calls: int
    """Operators that compute something; views are free."""
    peak: int
    """Bytes of tensors that were made in the call and lived at the same time, at the most."""


def count(function: Callable[[], object]) -> Counts:
    """Runs ``function`` and counts."""
    available_backends()  # loads them, and so defines their operators
    mapping = {
        getattr(operators, name): formula
        for operators in (torch.ops.naslora_cpp, torch.ops.naslora_cuda, torch.ops.naslora_triton)
        for name, formula in FORMULAS.items()
        if hasattr(operators, name)
    }
    flops = FlopCounterMode(display=False, custom_mapping=mapping)
    with flops, _Calls() as calls:
        function()
    return Counts(flops.get_total_flops(), calls.calls, calls.peak)


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that ``forward`` keeps for the backward beside the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # kept alive, or a later tensor could have an earlier one's address
    del kept
    return sum(saved.values())


class _Calls(TorchDispatchMode):
    """Counts calls, and follows the memory of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._note(args, mine=False)
        result = func(*args, **(kwargs or {}))
        if not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            self.calls += 1
        self._note(result, mine=True)
        return result

    def _note(self, values: object, mine: bool) -> None:
        """Adds the storages that are new; those that came from outside are not the call's."""
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.known:
                continue
            self.known.add(key)
            size = storage.nbytes() if mine else 0
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


# ---- Operations of the fused kernels -----------------------------------------------------------


def _cell(tokens: int, c: int, passes: int) -> int:
    """A cell's operations; a pass is one over its convolutions: forward, dz, or the kernels'."""
    separable = sum(conv.kernel**2 for conv in CONVOLUTIONS) * c + len(CONVOLUTIONS) * c * c
    return 2 * tokens * passes * (TAPS * c * c if c <= FOLDED_UP_TO else separable)


def _linear(x, weight, bias, lora_A, lora_B, alpha, sep3, sep5, dil3, dil5, pw, *_, **__) -> int:
    tokens, c_in = x[:-1].numel(), x[-1]
    c_out, rank = lora_B
    return 2 * tokens * (c_in * c_out + rank * (c_in + c_out)) + _cell(tokens, pw[-1], passes=1)


def _linear_backward(
    grad_h, x, z, weight, lora_A, lora_B, alpha, sep3, sep5, dil3, dil5, pw, channels, scaling,
    need_x, need_lora_A, need_lora_B, need_alpha, need_weights, **_,
) -> int:  # fmt: skip
    tokens = z[:-1].numel()
    c_out, rank = lora_B
    c_in = lora_A[1]
    need_z = need_x or need_lora_A
    need_y = need_z or need_alpha or need_weights
    frozen = c_in * c_out * need_x
    low_rank = rank * (c_in * (need_x + need_lora_A) + c_out * (need_y + need_lora_B))
    passes = need_lora_B + need_z + (need_alpha or need_weights)  # y anew, dz, the kernels
    return 2 * tokens * (frozen + low_rank) + _cell(tokens, pw[-1], passes)


def _cell_backward(
    grad_y, z, alpha, sep3, sep5, dil3, dil5, pw, channels, need_z, need_alpha, need_weights, **_
) -> int:
    return _cell(z[:-1].numel(), pw[-1], need_z + (need_alpha or need_weights))


def _folded_linear(x, weight, bias, lora_A, lora_B, kernel, *_, **__) -> int:
    c_out, c_in = weight
    return 2 * x[:-1].numel() * (c_in * c_out + lora_A[0] * (c_in + c_out) + kernel.numel())


def _attention_backward(
    grad_o, q, k, v, rel_h, rel_w, o, softmax, scale,
    need_q, need_k, need_v, need_rel_h, need_rel_w, **_,
) -> int:  # fmt: skip
    of_logits = need_q or need_k or need_rel_h or need_rel_w
    return (1 + of_logits + need_q + need_k + need_v) * _logits(q)  # the first computes them anew


def _logits(q) -> int:
    """Operations of a product with N x N numbers in each head."""
    batch, heads, tokens, features = q
    return 2 * batch * heads * tokens**2 * features


FORMULAS = {
    "mixed_cell": lambda z, *cell, **_: _cell(z[:-1].numel(), cell[5][-1], passes=1),
    "mixed_cell_backward": _cell_backward,
    "nas_lora_linear": _linear,
    "nas_lora_linear_backward": _linear_backward,
    "folded_cell": lambda z, kernel, *_, **__: 2 * z[:-1].numel() * kernel.numel(),
    "folded_linear": _folded_linear,
    "rel_pos_attention": lambda q, *_, **__: 2 * _logits(q),
    "rel_pos_attention_backward": _attention_backward,
}
