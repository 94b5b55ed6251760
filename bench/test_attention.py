"""SAM's attention blocks: ``pytest bench/test_attention.py --benchmark-enable``."""

import pytest

from bench import attention, cases

CANDIDATES = ["cpp", attention.STOCK, "scaled_dot_product_attention"]


@pytest.mark.benchmark(group="attention")
@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_attention(measure, attention_case, candidate, direction):
    bytes_moved = attention.least_bytes(*attention_case, direction)
    work = bytes_moved, attention.operations(*attention_case, direction)
    measure(attention.works(*attention_case), candidate, direction, *work, judge=attention.STOCK)
