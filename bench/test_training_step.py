"""Steps of whole models: ``pytest bench/test_training_step.py --benchmark-only``."""

import pytest


@pytest.mark.benchmark(group="training_step")
def test_training_step(entry):
    entry()
