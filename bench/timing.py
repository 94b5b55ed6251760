"""Timing of interleaved candidates, and the machine's copy bandwidth."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Percentiles of one candidate's seconds per call."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Times":
        cuts = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(cuts[1], cuts[4], cuts[7])


def interleave(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    target: float = 0.02,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds per call of each function, one after the other in every round.

    What else the machine does then falls on all of them alike. Short functions are repeated
    within a round until it takes about ``target`` seconds.

    Args:
        functions: what to time, by name.
        rounds: measurements of each.
        target: seconds that a measurement should take at least; 0 repeats nothing.
        warm: every function has been called before.
    """
    repeats = {}
    for name, function in functions.items():
        if not warm:
            function()  # compiles, allocates
        repeats[name] = max(1, round(target / _seconds(function, 1))) if target else 1
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(_seconds(function, repeats[name]))
    return seconds


def _seconds(function: Callable[[], object], repeats: int) -> float:
    """Mean seconds of so many calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def copy_bandwidth(megabytes: int = 128) -> float:
    """Bytes per second that a copy of a large tensor reads and writes: what memory allows."""
    source = torch.ones(megabytes * 2**18)  # of 4 bytes
    target = torch.empty_like(source)
    times = Times.of(interleave({"copy": lambda: target.copy_(source)}, rounds=15)["copy"])
    return 2 * 4 * source.numel() / times.p50
