"""Steps that train with prompts: ``pytest bench/test_promptable_step.py --benchmark-only``."""

import pytest


@pytest.mark.benchmark(group="promptable_step")
def test_promptable_step(entry):
    entry()
