"""Counts the launches and the bytes of attention on a GPU, without one.

    python -m bench.gpu.attention_bytes

Runs segment_anything's operations and the ``triton`` backend's launches, forward and backward, on
tensors that have only shapes. Each operation of PyTorch counts as one launch. Every tensor that a
launch reads or writes counts once. Programs fetch more than that: each program of a kernel reads
the tensors of its head again, from a cache if that holds them. Prints Markdown.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import attention, cases
from naslora_kernels import triton
from naslora_kernels.cell import AttentionOperands
from naslora_kernels.triton.attention import TritonAttention

Case = tuple[cases.Shape, int]  # and the number of heads
CASES: tuple[Case, ...] = ((cases.HUGE_GLOBAL, 16), (cases.HUGE, 16))
DTYPE = torch.bfloat16
CAPABILITY = (9, 0)
# What ours may move at most, as multiples of the floor: ``attention.least_bytes``.
FACTORS = {"forward": 1.05, "backward": 1.7}
WRITTEN = {
    "attention_forward": ("o", "softmax"),
    "attention_delta": ("delta",),
    "attention_keys": ("grad_k", "grad_v"),
    "attention_queries": ("grad_q", "grad_h", "grad_w"),
}
WITHOUT_A_KERNEL = ("_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided")


class Launch(NamedTuple):
    """One launch, and the bytes of the tensors that it reads and writes."""

    kernel: str
    read: int
    written: int
    fetched: int
    """Bytes that all programs read, if each reads each number once. As ``read`` for PyTorch."""


class Recorder(TorchDispatchMode):
    """Records the launches of PyTorch's operations and of the ``triton`` backend's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "naslora_triton":
            kernels = TritonAttention(self._launch, lambda device: CAPABILITY)
            with self:  # copies that the backend makes are launches, too
                return getattr(kernels, func._opname)(*args)
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        on_device = any(leaf.is_meta for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if on_device and not is_view and func._opname not in WITHOUT_A_KERNEL:
            read = bytes_of([args, kwargs])
            self.launches.append(Launch(func._opname, read, bytes_of(result), read))
        return result

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any):
        self.launches.append(launch_of(kernel, grid, *arguments, **constants))


def launch_of(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Launch:
    """What one of our kernels moves. A program reads its queries' numbers once and all keys, or
    its keys once, all queries, and its own rows and columns of the biases."""
    name = kernel.fn.__name__.removesuffix("_kernel")
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    tensors = {n.removesuffix("_ptr"): t for n, t in named.items() if isinstance(t, Tensor)}
    written = bytes_of([tensors.pop(n) for n in WRITTEN[name] if n in tensors])
    of_keys = bytes_of([tensors.get("k"), tensors.get("v")])
    of_queries = bytes_of(tensors) - of_keys
    heads = next(t.shape[0] * t.shape[1] for n, t in tensors.items() if n != "softmax")
    programs = grid[0] // heads  # of a head
    if name == "attention_keys":
        pieces = -(-tensors["rel_w"].shape[-1] // constants["COLUMNS"])
        rel_h, rel_w = bytes_of(tensors["rel_h"]), bytes_of(tensors["rel_w"])
        biases = pieces * rel_h + programs // pieces * rel_w
        fetched = of_keys + programs * (of_queries - rel_h - rel_w) + biases
    else:
        fetched = of_queries + programs * of_keys
    return Launch(name, of_keys + of_queries, written, fetched)


def bytes_of(value: object) -> int:
    """The bytes of all tensors in ``value``; what an expanded tensor repeats counts once."""
    tensors = {id(leaf): leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}
    return sum(
        min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        for tensor in tensors.values()
    )


def stock(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, grid: Any) -> Tensor:
    """What segment_anything does with q, k, v (B heads, N, d), once rel_h and rel_w are known."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B heads, N, N)
    height, width = grid
    by_place = scores.view(-1, *grid, *grid)
    rel_h, rel_w = rel_h.view(-1, *grid, height), rel_w.view(-1, *grid, width)
    scores = (by_place + rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]).view_as(scores)
    return scores.softmax(dim=-1) @ v


def ours(*arguments: Any) -> Tensor:
    """The ``triton`` backend's attention of the operands (B, heads, N, ...)."""
    *operands, _ = arguments
    return triton.rel_pos_attention(AttentionOperands(*operands), operands[0].shape[-1] ** -0.5)


def record(attend: Callable[..., Tensor], case: Case) -> dict[str, Sequence[Launch]]:
    """The launches of a forward, and of a backward with all five gradients."""
    shape, heads = case
    batch, height, width = shape.grid
    tokens, features = height * width, shape.c_in // heads
    rows = (batch, heads) if attend is ours else (batch * heads,)
    maps = partial(torch.empty, device="meta", dtype=DTYPE)
    sizes = (features, features, features, height, width)
    operands = [maps(*rows, tokens, size).requires_grad_() for size in sizes]
    with Recorder() as forward:
        o = attend(*operands, (height, width))
    with Recorder() as backward:
        torch.autograd.grad(o, operands, torch.empty_like(o))
    return {"forward": forward.launches, "backward": backward.launches}


def moved(launches: Sequence[Launch]) -> int:
    """Bytes read and written."""
    return sum(launch.read + launch.written for launch in launches)


def rows(case: Case) -> list[str]:
    """The table's rows of one case."""
    recorded = {attend.__name__: record(attend, case) for attend in (stock, ours)}
    lines = []
    for direction in FACTORS:
        floor = attention.least_bytes(*case, direction, cases.Setting("cuda", DTYPE))
        name = attention.case_name(case)
        lines.append(f"| {name} | {direction} | floor | | {_mega(floor)} | 1 | |")
        for code, launches in recorded.items():
            of_case = launches[direction]
            fetched = sum(launch.fetched + launch.written for launch in of_case)
            lines.append(
                f"| | | {code} | {len(of_case)} | {_mega(moved(of_case))} "
                f"| {moved(of_case) / floor:.2f} | {_mega(fetched) if code == 'ours' else ''} |"
            )
    return lines


def _mega(number: int) -> str:
    return f"{number / 1e6:.1f}"


def main() -> int:
    """Prints the table."""
    if importlib.util.find_spec("triton") is None:
        print("attention_bytes: Triton is not installed: pip install triton", file=sys.stderr)
        return 2
    print("| case | direction | code | launches | MB | × floor | MB that programs fetch |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        print("\n".join(rows(case)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
