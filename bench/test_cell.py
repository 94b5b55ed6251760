"""The mixed cell: ``pytest bench/test_cell.py --benchmark-enable``."""

import pytest

from bench import cases
from bench.conftest import parameters


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize(
    ("case", "candidate"), parameters(cases.CELL_CASES, ["cpp", "reference", "reference compiled"])
)
def test_cell(measure, case, candidate, direction):
    work = cases.cell_bytes(*case, direction), cases.cell_operations(*case, direction)
    measure(cases.cell_works(*case), candidate, direction, *work)
