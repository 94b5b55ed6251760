"""Fixtures of the benchmarks: the correctness gate, and what stands beside every number."""

import functools

import pytest

from bench import cases, timing

copy_bandwidth = functools.cache(timing.copy_bandwidth)
environment = functools.cache(cases.environment)


@pytest.fixture
def measure(benchmark):
    """Times one competitor, after the fused kernels have passed the gate on the same inputs.

    With --benchmark-disable, as in CI, everything runs once, untimed.
    """

    def run(works, competitor, direction, moved_bytes, operations):
        refusal = cases.gate(works)
        assert refusal is None, f"not timed, the kernels are wrong: {refusal}"
        benchmark(works[competitor].function(direction))
        benchmark.extra_info.update(environment(), bytes=moved_bytes, operations=operations)
        if benchmark.stats is not None:
            reached = moved_bytes / benchmark.stats.stats.median
            benchmark.extra_info["fraction_of_copy_bandwidth"] = reached / copy_bandwidth()

    return run


def parameters(all_cases, competitors):
    """(case, competitor) pairs; compiled ones only where ``cases`` has them."""
    return [
        pytest.param(case, competitor, id=f"{cases.case_name(case)}-{competitor}")
        for case in all_cases
        for competitor in competitors
        if "compiled" not in competitor or case in cases.COMPILED_CASES
    ]
