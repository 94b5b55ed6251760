"""Bytes of a training step: ``pytest bench/test_memory.py --benchmark-only``.

They stand in the entry's ``extra_info``; its seconds are those of one step that was counted.
"""

import pytest


@pytest.mark.benchmark(group="memory")
def test_memory(entry):
    entry()
