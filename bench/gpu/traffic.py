"""Counts the launches of layers and attention on a GPU and the bytes that they move, without one.

    python -m bench.gpu.traffic

Every tensor that a launch reads or writes counts once: what is read again comes from a cache. Our
launches, and those of PyTorch, one for each operation, run on tensors that have only shapes. The
tables: the launches of a layer and a cell, with the least time that moving the bytes takes; whole
layers of several methods with the frozen product; attention. Prints Markdown. Exits with status 1
if a layer launches more kernels than its budget allows.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import attention, cases
from bench.gpu import launches
from bench.kinds import KINDS, Case
from naslora_kernels import cuda, triton
from naslora_kernels.cell import AttentionOperands
from naslora_kernels.launches import Primitives
from naslora_kernels.triton.attention import TritonAttention
from naslora_kernels.triton.primitives import TritonPrimitives

BANDWIDTH = 3.0e12  # bytes per second that copies reach on an H100 with HBM3
CASES = ((cases.HUGE_BATCH, 3), (cases.HUGE_BATCH, 24), (cases.HUGE_GLOBAL, 3), (cases.TINY, 3))
ATTENTION_CASES = ((cases.HUGE_GLOBAL, 16), (cases.HUGE, 16))  # and the number of heads
SETTING = cases.Setting("cuda", torch.bfloat16)
# Launches beside the frozen product, at most.
BUDGETS = {
    "layer, forward": 3,
    "layer, backward, weight step": 6,
    "layer, backward, architecture step": 6,
    "folded layer, forward": 3,
}
# What our attention may move at most, as multiples of the floor: ``attention.least_bytes``.
FACTORS = {"forward": 1.05, "backward": 1.7}
# The arguments that the primitives other than ``reduce_gradients`` write to.
WRITTEN = ("product", "partials", "y", "grad_z", "out")
WRITTEN_BY = {
    "attention_forward": ("o", "softmax"),
    "attention_delta": ("delta",),
    "attention_keys": ("grad_k", "grad_v"),
    "attention_queries": ("grad_q", "grad_h", "grad_w"),
}
WITHOUT_A_KERNEL = ("_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided")


class Launch(NamedTuple):
    """One launch, and the bytes that it reads and writes."""

    kernel: str
    read: int
    written: int


def bytes_of(value: object) -> int:
    """The bytes of all tensors in ``value``; what an expanded tensor repeats counts once."""
    tensors = {id(leaf): leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}
    return sum(
        min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        for tensor in tensors.values()
    )


def moved(launched: Sequence[Launch]) -> int:
    """Bytes read and written."""
    return sum(launch.read + launch.written for launch in launched)


def launch_of(kernel: str, tensors: dict[str, Any], names: Sequence[str]) -> Launch:
    """A launch that writes to the arguments of the names and reads all others."""
    written = [tensors.pop(name) for name in names if name in tensors]
    return Launch(kernel, bytes_of(tensors), bytes_of(written))


# ---- Our layers and cells ------------------------------------------------------------------------


class Counter:
    """Primitives that compute nothing and record which bytes each would read and write."""

    def __init__(self, sizes: Primitives) -> None:
        self.launches: list[Launch] = []
        # The backend chooses into how many groups sums are divided.
        self.factor_partials, self.cell_partials = sizes.factor_partials, sizes.cell_partials

    def __getattr__(self, primitive: str):
        signature = inspect.signature(getattr(Primitives, primitive))

        def count(*arguments) -> None:
            named = signature.bind(self, *arguments).arguments
            del named["self"]
            self.launches.append(launch_of(primitive, named, WRITTEN))

        return count

    def reduce_gradients(self, cell, sums, A, B) -> None:
        found = [some for some in (sums, A, B) if some is not None]
        read = bytes_of([cell.parameters, *(partials for partials, _ in found)])
        written = bytes_of([gradients for _, gradients in found])
        self.launches.append(Launch("reduce_gradients", read, written))


class CUDASizes(TritonPrimitives):
    """Into how many groups the CUDA kernels divide their sums."""

    def row_groups(self, tokens: int) -> int:
        return cuda._CUDA.groups(tokens, 1, 1, 1, 1)[0]

    def cell_groups(self, batch: int, height: int, width: int, c: int) -> int:
        return cuda._CUDA.groups(1, batch, height, width, c)[1]

    def cell_partial_size(self, c: int) -> int:
        return cuda._CUDA.groups(1, 1, 1, 1, c)[2]


def backends() -> dict[str, Primitives]:
    """The backends whose grouping is known here; ``cuda`` only if its extension was built."""
    of_triton: tuple[Any, ...] = (None, lambda device: (9, 0))
    known = {"triton": TritonPrimitives(*of_triton)}
    return known | ({"cuda": CUDASizes(*of_triton)} if cuda.build_info() else {})


def count(work: launches.Work, operands: launches.Operands, sizes: Primitives) -> list[Launch]:
    """The launches of one work, by the grouping of a backend."""
    counter = Counter(sizes)
    work(counter, operands)
    return counter.launches


def least_bytes(name: str, case: Case) -> int:
    """Bytes of maps and rows that the work cannot do without: ``bench/cases.py``."""
    kind = KINDS["cell" if name.startswith("cell") else "layer"]
    least = kind.least_bytes(*case, "backward" if "backward" in name else "forward", SETTING)
    if "architecture" in name:  # has no use for x
        least -= torch.Size(case[0].grid).numel() * case[0].c_in * SETTING.dtype.itemsize
    return least


def layer_rows(sizes: Primitives, case: Case) -> list[list[object]]:
    """A row for each work of a case."""
    operands, rows = launches.Operands(*case, SETTING.dtype), []
    for name, work in launches.WORKS.items():
        launched = count(work, operands, sizes)
        kernels = " · ".join(f"{one.kernel} {_mega(moved([one]), 2)}" for one in launched)
        budget = f" of {BUDGETS[name]}" if name in BUDGETS else ""
        floor = 1e6 * moved(launched) / BANDWIDTH
        numbers = _mega(moved(launched), 2), _mega(least_bytes(name, case), 2)
        row = [f"{case[0].name} r={case[1]}", name, f"{len(launched)}{budget}", kernels, *numbers]
        rows.append([*row, f"{floor:.2f}", f"{2 * floor:.2f}"])
    return rows


def within_budget() -> bool:
    """Whether no work launches more often than it may."""
    operands = launches.Operands(*CASES[0], SETTING.dtype)
    return all(
        len(count(launches.WORKS[name], operands, sizes)) <= budget
        for name, budget in BUDGETS.items()
        for sizes in backends().values()
    )


# ---- PyTorch's operations, and attention ---------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Records the launches of PyTorch's operations and of the ``triton`` backend's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "naslora_triton":
            kernels = TritonAttention(self._launch, lambda device: (9, 0))
            with self:  # copies that the backend makes are launches, too
                return getattr(kernels, func._opname)(*args)
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        on_device = any(leaf.is_meta for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if on_device and not is_view and func._opname not in WITHOUT_A_KERNEL:
            read = bytes_of([args, kwargs])
            self.launches.append(Launch(func._opname, read, bytes_of(result)))
        return result

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any):
        name = kernel.fn.__name__.removesuffix("_kernel")
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        tensors = {n.removesuffix("_ptr"): t for n, t in named.items() if isinstance(t, Tensor)}
        self.launches.append(launch_of(name, tensors, WRITTEN_BY[name]))


def record(compute: Callable[[], Tensor], leaves: list[Tensor]) -> dict[str, list[Launch]]:
    """The launches of a forward, and of a backward with the gradients of ``leaves``."""
    with Recorder() as forward:
        output = compute()
    with Recorder() as backward:
        torch.autograd.grad(output, leaves, torch.empty_like(output), allow_unused=True)
    return {"forward": forward.launches, "backward": backward.launches}


def attend_stock(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, grid: Any):
    """What segment_anything does with q, k, v (B heads, N, d), once rel_h and rel_w are known."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B heads, N, N)
    height, width = grid
    by_place = scores.view(-1, *grid, *grid)
    rel_h, rel_w = rel_h.view(-1, *grid, height), rel_w.view(-1, *grid, width)
    scores = (by_place + rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]).view_as(scores)
    return scores.softmax(dim=-1) @ v


def attend_ours(*arguments: Any) -> Tensor:
    """The ``triton`` backend's attention of the operands (B, heads, N, ...)."""
    *operands, _ = arguments
    return triton.rel_pos_attention(AttentionOperands(*operands), operands[0].shape[-1] ** -0.5)


def attention_launches(attend: Callable[..., Tensor], case: Case) -> dict[str, list[Launch]]:
    """The launches of a forward, and of a backward with all five gradients."""
    shape, heads = case
    batch, *grid = shape.grid
    tokens, features = grid[0] * grid[1], shape.c_in // heads
    rows = (batch, heads) if attend is attend_ours else (batch * heads,)
    maps = partial(torch.empty, device="meta", dtype=SETTING.dtype)
    sizes = (features, features, features, *grid)
    operands = [maps(*rows, tokens, size).requires_grad_() for size in sizes]
    return record(lambda: attend(*operands, tuple(grid)), operands)


def attention_rows(case: Case) -> list[list[object]]:
    """The rows of one case of attention."""
    codes = {"stock": attend_stock, "ours": attend_ours}
    launched = {code: attention_launches(attend, case) for code, attend in codes.items()}
    rows: list[list[object]] = []
    for direction in FACTORS:
        floor = attention.least_bytes(*case, direction, SETTING)
        rows.append([KINDS["attention"].title(case), direction, "floor", "", _mega(floor), 1])
        for code, of_code in launched.items():
            number, size = len(of_code[direction]), moved(of_code[direction])
            rows.append(["", "", code, number, _mega(size), f"{size / floor:.2f}"])
    return rows


# ---- Whole layers --------------------------------------------------------------------------------


def our_layer(case: Case) -> dict[str, list[Launch]]:
    """Our layer: its launches, and the frozen product that is added to the expansion.

    The other order moves the same bytes: the second of the two reads what the first has written.
    """
    operands = launches.Operands(*case, SETTING.dtype)
    x, h, weight = map(bytes_of, (operands.x, operands.grad_h, operands.linear[0]))
    works = {"forward": "layer, forward", "backward": "layer, backward, weight step"}
    products = {
        "forward": Launch("product", x + weight + h, h),
        "backward": Launch("product", h + weight + x, x),
    }
    sizes = backends()["triton"]
    return {
        direction: [*count(launches.WORKS[work], operands, sizes), products[direction]]
        for direction, work in works.items()
    }


def layer_launches(layer: nn.Module, case: Case) -> dict[str, list[Launch]]:
    """What PyTorch launches for a layer, forward and backward."""
    like = {"device": "meta", "dtype": SETTING.dtype}
    layer = layer.to(**like)
    x = torch.empty(*case[0].grid, case[0].c_in, **like).requires_grad_()
    return record(lambda: layer(x), [x, *(p for p in layer.parameters() if p.requires_grad)])


def conv_lora(base: nn.Linear, case: Case) -> nn.Module:
    """Conv-LoRA's layer, with its maps spread evenly over its experts; its gate is computed."""
    from naslora.methods.conv_lora import Balance, ConvLoRAConfig, ConvLoRALinear

    layer = ConvLoRALinear(base, ConvLoRAConfig(rank=case[1]), Balance(), torch.Generator())
    choose, experts, maps = layer.choose, len(layer.experts), case[0].grid[0]
    spread = [maps // experts + (i < maps % experts) for i in range(experts)]
    layer.choose = lambda pooled: (choose(pooled)[0], SimpleNamespace(tolist=lambda: spread))
    return layer


def whole_layers(case: Case) -> list[list[object]]:
    """A row for each kind of layer."""
    base = nn.Linear(case[0].c_in, case[0].c_out).requires_grad_(False)
    found = {
        "ours": our_layer(case),
        "PEFT LoRA": layer_launches(cases.peft_lora(base, case[1]), case),
        "Conv-LoRA": layer_launches(conv_lora(base, case), case),
    }
    return [
        [name, *(cell for of in launched.values() for cell in (len(of), _mega(moved(of))))]
        for name, launched in found.items()
    ]


def _mega(number: int, digits: int = 1) -> str:
    return f"{number / 1e6:.{digits}f}"


def _print(head: str, rows: Sequence[Sequence[object]]) -> None:
    """Prints a table in Markdown; ``head`` names its columns."""
    columns = head.split(", ")
    for row in (columns, ["--"] * len(columns), *rows):
        print(f"| {' | '.join(map(str, row))} |")
    print()


def main() -> int:
    """Prints the tables; returns 1 if a layer launches too often."""
    head = "case, work, launches, MB by launch, MB, at the least, floor µs, budget µs"
    for backend, sizes in backends().items():
        print(f"### {backend}, bfloat16 maps, float32 adapter, at {BANDWIDTH / 1e12:.1f} TB/s\n")
        _print(head, [row for case in CASES for row in layer_rows(sizes, case)])
    _print("layer, launches forward, MB, launches backward, MB", whole_layers(CASES[0]))
    head = "case, direction, code, launches, MB, × floor"
    _print(head, [row for case in ATTENTION_CASES for row in attention_rows(case)])
    return 0 if within_budget() else 1


if __name__ == "__main__":
    sys.exit(main())
