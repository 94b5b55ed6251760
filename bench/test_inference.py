"""A batch through whole models: ``pytest bench/test_inference.py --benchmark-only``."""

import pytest


@pytest.mark.benchmark(group="inference")
def test_inference(entry):
    entry()
