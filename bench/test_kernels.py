"""The kernels beside other code: ``pytest bench/test_kernels.py --benchmark-only``.

``-k "layer and both"`` chooses. ``python -m bench.report`` prints the ratios.
"""

import pytest


@pytest.mark.benchmark(group="kernels")
def test_kernels(entry):
    entry()
