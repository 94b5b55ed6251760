"""The adapter layer: ``pytest bench/test_layer.py --benchmark-enable``."""

import pytest

from bench import cases
from bench.conftest import parameters

COMPETITORS = ["cpp", "reference", "reference compiled", "PEFT LoRA", "frozen linear"]


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize(("case", "competitor"), parameters(cases.CASES, COMPETITORS))
def test_layer(measure, case, competitor, direction):
    work = cases.layer_bytes(*case, direction), cases.layer_operations(*case, direction)
    measure(cases.layer_works(*case), competitor, direction, *work)
