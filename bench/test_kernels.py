"""The kernels beside other code: ``pytest bench/test_kernels.py --benchmark-only``.

``-k "layer and both"`` chooses. ``python -m bench.report`` prints the ratios.
"""

import pytest


def test_kernels(benchmark, record, measured, work):
    *kind_case_direction, candidate = work
    samples, about = measured("kernels", tuple(kind_case_direction))
    if candidate not in samples:
        pytest.skip(f"{candidate} is not installed")
    benchmark.group = kind_case_direction[0].name
    record(samples[candidate], **about, candidate=candidate)
