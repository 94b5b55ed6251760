"""The adapter layer: ``pytest bench/test_layer.py --benchmark-enable``."""

import pytest

from bench import cases
from bench.conftest import parameters

CANDIDATES = ["cpp", "reference", "reference compiled", "PEFT LoRA", "frozen linear"]


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize(("case", "candidate"), parameters(cases.CASES, CANDIDATES))
def test_layer(measure, case, candidate, direction):
    work = cases.layer_bytes(*case, direction), cases.layer_operations(*case, direction)
    measure(cases.layer_works(*case), candidate, direction, *work)
