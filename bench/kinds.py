"""The kinds of work of the kernels: their cases, candidates, and least bytes and operations."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench import attention, cases
from bench.cases import Shape, Work

Case = tuple[Shape, int]  # and the rank, or the number of heads


class Kind(NamedTuple):
    """One kind of work, and functions of a case and a direction."""

    name: str
    cases: Sequence[Case]
    works: Callable[..., dict[str, Work]]
    least_bytes: Callable[..., int]
    operations: Callable[..., int]
    others: tuple[str, ...]
    """The candidates beside the kernels; of a case some may be missing."""
    number: str = "r"
    """What the number of a case is."""
    judge: str = "reference"
    """The work that the kernels are held against."""

    def title(self, case: Case) -> str:
        """The name of a case, such as ``cell vit_b windows r=3``."""
        return f"{self.name} {case[0].name} {self.number}={case[1]}"


REFERENCES = ("reference", "reference compiled")
# Of each kind: its works, the bytes they move at least, and their operations.
CELL = cases.cell_works, cases.cell_bytes, cases.cell_operations
LAYER = cases.layer_works, cases.layer_bytes, cases.layer_operations
ATTENTION = attention.works, attention.least_bytes, attention.operations
BESIDE = (attention.STOCK, attention.SDPA)
KINDS = {
    "cell": Kind("cell", cases.CELL_CASES, *CELL, REFERENCES),
    "layer": Kind("layer", cases.CASES, *LAYER, (*REFERENCES, "PEFT LoRA", "frozen linear")),
    "attention": Kind(
        "attention", attention.CASES, *ATTENTION, BESIDE, "heads", judge=attention.STOCK
    ),
}
