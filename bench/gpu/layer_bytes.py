"""Counts the bytes that every GPU kernel moves, and the least time that moving them takes.

    python -m bench.gpu.layer_bytes

Counts the tensors that each launch of a layer and a cell reads and writes, each once: weights and
neighbouring pixels are read again from a cache. Prints Markdown. Exits with status 1 if a layer
launches more kernels than its budget allows.
"""

import inspect
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench import cases
from bench.gpu import launches
from naslora_kernels import cuda
from naslora_kernels.launches import Primitives
from naslora_kernels.triton.primitives import TritonPrimitives

BANDWIDTH = 3.0e12  # bytes per second that copies reach on an H100 with HBM3
CASES = ((cases.HUGE_BATCH, 3), (cases.HUGE_BATCH, 24), (cases.HUGE_GLOBAL, 3), (cases.TINY, 3))
DTYPE = torch.bfloat16
# Launches beside the frozen product, at most.
BUDGETS = {
    "layer, forward": 3,
    "layer, backward, weight step": 6,
    "layer, backward, architecture step": 6,
    "folded layer, forward": 3,
}


class Launch(NamedTuple):
    """One launch, and the bytes that it reads and writes."""

    kernel: str
    read: int
    written: int


class CUDASizes(TritonPrimitives):
    """Into how many groups the CUDA kernels divide their sums."""

    def row_groups(self, tokens: int) -> int:
        return cuda._CUDA.groups(tokens, 1, 1, 1, 1)[0]

    def cell_groups(self, batch: int, height: int, width: int, c: int) -> int:
        return cuda._CUDA.groups(1, batch, height, width, c)[1]

    def cell_partial_size(self, c: int) -> int:
        return cuda._CUDA.groups(1, 1, 1, 1, c)[2]


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
            written = [named.pop(name) for name in WRITTEN & named.keys()]
            self.launches.append(
                Launch(primitive, bytes_of(list(named.values())), bytes_of(written))
            )

        return count

    def reduce_gradients(self, cell, sums, A, B) -> None:
        all_sums = [some for some in (sums, A, B) if some is not None]
        read = bytes_of([cell.parameters, *(partials for partials, _ in all_sums)])
        written = bytes_of([gradients for _, gradients in all_sums])
        self.launches.append(Launch("reduce_gradients", read, written))


# The arguments that the primitives other than ``reduce_gradients`` write to.
WRITTEN = {"product", "partials", "y", "grad_z", "out"}


def bytes_of(value: object) -> int:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count(work: launches.Work, operands: launches.Operands, sizes: Primitives) -> list[Launch]:
    """The launches of one work, by the grouping of a backend."""
    counter = Counter(sizes)
    work(counter, operands)
    return counter.launches


def backends() -> dict[str, Primitives]:
    """The backends whose grouping is known here; ``cuda`` only if its extension was built."""
    of_triton: tuple[Any, ...] = (None, lambda device: (9, 0))
    known = {"triton": TritonPrimitives(*of_triton)}
    return known | ({"cuda": CUDASizes(*of_triton)} if cuda.build_info() else {})


def rows(backend: str, case: tuple[cases.Shape, int]) -> list[str]:
    """The table's rows of one case."""
    operands = launches.Operands(*case, DTYPE)
    lines = []
    for name, work in launches.WORKS.items():
        counted = count(work, operands, backends()[backend])
        moved = sum(launch.read + launch.written for launch in counted)
        kernels = " · ".join(
            f"{launch.kernel} {_megabytes(launch.read + launch.written)}" for launch in counted
        )
        budget = BUDGETS.get(name)
        floor = 1e6 * moved / BANDWIDTH
        lines.append(
            f"| {cases.case_name(case)} | {name} | {len(counted)}"
            f"{f' of {budget}' if budget else ''} | {kernels} | {_megabytes(moved)} "
            f"| {_megabytes(least_bytes(name, case))} | {floor:.2f} | {2 * floor:.2f} |"
        )
    return lines


def least_bytes(name: str, case: tuple[cases.Shape, int]) -> int:
    """Bytes of maps and rows that the work cannot do without: ``bench/cases.py``."""
    setting = cases.Setting("cuda", DTYPE)
    direction = "backward" if "backward" in name else "forward"
    least = cases.cell_bytes if name.startswith("cell") else cases.layer_bytes
    bytes_ = least(*case, direction, setting)
    if "architecture" in name:  # has no use for x
        shape = case[0]
        bytes_ -= torch.Size(shape.grid).numel() * shape.c_in * DTYPE.itemsize
    return bytes_


def _megabytes(number: int) -> str:
    return f"{number / 1e6:.2f}"


def main() -> int:
    """Prints a table for every backend; returns 1 if a layer launches too often."""
    for backend in backends():
        print(f"### {backend}, bfloat16 maps, float32 adapter, at {BANDWIDTH / 1e12:.1f} TB/s\n")
        print(
            "| case | work | launches | MB by launch | MB | at the least | floor µs | budget µs |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for case in CASES:
            print("\n".join(rows(backend, case)))
        print()
    return 0 if within_budget() else 1


def within_budget() -> bool:
    """Whether no work launches more often than it may."""
    operands = launches.Operands(*CASES[0], DTYPE)
    return all(
        len(count(launches.WORKS[name], operands, sizes)) <= budget
        for name, budget in BUDGETS.items()
        for sizes in backends().values()
    )


if __name__ == "__main__":
    sys.exit(main())
