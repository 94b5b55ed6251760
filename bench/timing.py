"""Timing of interleaved candidates, and the machine's copy bandwidth."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Times(NamedTuple):
    """Percentiles of one candidate's seconds per call, or of a ratio of two candidates'."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        cuts = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(cuts[1], cuts[4], cuts[7])

    @classmethod
    def ratio(cls, one: Sequence[float], other: Sequence[float]) -> "Times":
        """Of one / other, both of the same round."""
        return cls.of([a / b for a, b in zip(one, other, strict=True)])


def interleave(
    functions: Mapping[Any, Callable[[], object]],
    rounds: int,
    target: float = 0.02,
    device: str = "cpu",
) -> dict[Any, list[float]]:
    """Seconds per call of each function, one after the other in every round.

    What else the machine does then falls on all of them alike. Short functions are repeated
    within a round until it takes about ``target`` seconds.

    Args:
        functions: what to time, by name.
        rounds: measurements of each.
        target: seconds that a measurement should take at least; 0 repeats nothing.
        device: where they compute; a GPU has its own clock.
    """

    def measured(function: Callable[[], object], repeats: int) -> float:
        """Mean seconds of so many calls."""
        if device != "cpu":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
        started = time.perf_counter()
        for _ in range(repeats):
            function()
        if device == "cpu":
            return (time.perf_counter() - started) / repeats
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    repeats = dict.fromkeys(functions, 1)
    for name, function in functions.items():
        function()  # compiles, allocates
        if target:
            repeats[name] = max(1, round(target / measured(function, 1)))
    seconds: dict[Any, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(measured(function, repeats[name]))
    return seconds


@functools.cache
def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes per second that a copy of a large tensor reads and writes: what memory allows."""
    source = torch.ones(2**25 if device == "cpu" else 2**28, device=device)  # of 4 bytes
    target = torch.empty_like(source)
    copies = {"copy": lambda: target.copy_(source)}
    return 2 * 4 * source.numel() / Times.of(interleave(copies, 15, device=device)["copy"]).p50
