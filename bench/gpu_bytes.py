"""Bytes that every GPU kernel moves, and the time below which they cannot be moved.

    python -m bench.gpu_bytes

Counts the tensors that each launch of a layer and a cell reads and writes, each once: weights and
neighbouring pixels are read again from a cache. Prints Markdown; ends with status 1 where a layer
launches more often than its budget allows.
"""

import inspect
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench import cases, launches
from bench.gpu_check import BATCH, GLOBAL
from naslora_kernels import cuda, gpu, triton

BANDWIDTH = 3.0e12  # bytes per second that copies reach on an H100 with HBM3
CASES = ((BATCH, 3), (BATCH, 24), (GLOBAL, 3), (cases.TINY, 3))
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


class Counter:
    """Primitives that compute nothing, and note which tensors each would read and write."""

    def __init__(self, sizes: gpu.Primitives) -> None:
        self.launches: list[Launch] = []
        # Into how many groups sums are cut is the backend's choice.
        self.row_groups, self.cell_groups = sizes.row_groups, sizes.cell_groups
        self.cell_partial_size = sizes.cell_partial_size

    def __getattr__(self, primitive: str):
        signature = inspect.signature(getattr(gpu.Primitives, primitive))

        def count(*arguments) -> None:
            read = written = 0
            for name, value in signature.bind(self, *arguments).arguments.items():
                if writes(primitive, name):
                    written += _bytes(value)
                else:
                    read += _bytes(value)
            self.launches.append(Launch(primitive, read, written))

        return count


def writes(primitive: str, name: str) -> bool:
    """Whether a primitive writes to the argument, as the names in ``gpu.Primitives`` say."""
    if primitive == "reduce_gradients":
        return name.startswith("grad_")
    return name in ("product", "partials", "y", "grad_z", "out")


def _bytes(value: object) -> int:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count(work: launches.Work, operands: launches.Operands, sizes: gpu.Primitives) -> list[Launch]:
    """The launches of one work, by the grouping of a backend."""
    counter = Counter(sizes)
    work(counter, operands)
    return counter.launches


def backends() -> dict[str, gpu.Primitives]:
    """The backends whose grouping is known here: ``cuda`` where its extension was built."""
    known = {"triton": triton.Primitives(None, lambda device: (9, 0))}
    return known | ({"cuda": cuda} if hasattr(cuda, "row_groups") else {})


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
