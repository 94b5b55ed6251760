"""The ratio table: ``python -m bench.ratios``, on an otherwise idle machine.

Every candidate of a case is timed in turn, round after round, in this one process. A ratio is the
median over rounds of (candidate's seconds / fused seconds), both of the same round. Cases whose
kernels fail the correctness gate are refused, and the exit status is 1.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from bench import attention, cases, timing

# Ratios that the design asks for: {(kind, shape, rank or heads, direction): {name: ratio}}. "frozen
# linear" is the other way round: the fused layer takes at most 1.06 x its time.
TARGETS = {
    ("cell", cases.WINDOWS, 3, "both"): {"reference": 6.0, "reference compiled": 4.0},
    ("cell", cases.GLOBAL, 3, "both"): {"reference": 6.0, "reference compiled": 4.0},
    ("cell", cases.WINDOWS, 24, "both"): {"reference": 3.0, "reference compiled": 3.0},
    ("layer", cases.WINDOWS, 3, "both"): {"frozen linear": 1 / 1.06},
    ("attention", cases.GLOBAL, attention.HEADS, "both"): {attention.STOCK: 2.2},
    ("attention", cases.GLOBAL, attention.HEADS, "forward"): {attention.STOCK: 2.0},
    ("attention", cases.WINDOWS, attention.HEADS, "both"): {attention.STOCK: 1.15},
    ("attention", cases.WINDOWS, attention.HEADS, "forward"): {attention.STOCK: 1.2},
}


class Kind(NamedTuple):
    """One kind of work: its cases, and functions of a case."""

    cases: Sequence[tuple]
    name: Callable[[tuple], str]
    works: Callable[..., Mapping[str, cases.Work]]
    least_bytes: Callable[..., int]
    operations: Callable[..., int]
    judge: str = "reference"


KINDS = {
    "cell": Kind(
        cases.CELL_CASES, cases.case_name, cases.cell_works, cases.cell_bytes, cases.cell_operations
    ),
    "layer": Kind(
        cases.CASES, cases.case_name, cases.layer_works, cases.layer_bytes, cases.layer_operations
    ),
    "attention": Kind(
        attention.CASES,
        attention.case_name,
        attention.works,
        attention.least_bytes,
        attention.operations,
        attention.STOCK,
    ),
}


def main() -> int:
    """Prints the table; returns 1 if a case was refused or a target missed."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    bandwidth = timing.copy_bandwidth()
    for name, value in cases.environment().items():
        print(f"{name}: {value}")
    print(f"copy bandwidth: {bandwidth / 1e9:.1f} GB/s\n")
    print(
        "| work | direction | candidate | p20 ms | p50 ms | p80 ms | x fused (p20, p80) | target "
        "| MB | Mop | of copy bandwidth |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    good = True
    for kind in arguments.kinds:
        for case in KINDS[kind].cases:
            if arguments.only in f"{kind} {KINDS[kind].name(case)}":
                for direction in arguments.directions:
                    good &= report(kind, case, direction, arguments.rounds, bandwidth)
    return 0 if good else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--directions", nargs="+", choices=cases.DIRECTIONS, default=["both"])
    parser.add_argument("--only", default="", help="part of a case's name, e.g. 'windows r=3'")
    parser.add_argument("--rounds", type=int, default=25, help="measurements of each candidate")
    parser.add_argument("--threads", type=int, help="default: as many as torch chooses")
    return parser.parse_args()


def report(kind: str, case: tuple, direction: str, rounds: int, bandwidth: float) -> bool:
    """Times one case and prints its rows; whether it passed the gate and met its targets."""
    about = KINDS[kind]
    name = f"{kind} {about.name(case)}"
    works = about.works(*case)
    refusal = cases.gate(works, judge=about.judge)
    if refusal is not None:
        print(f"| {name} | {direction} | refused: {refusal} |" + " |" * 8)
        return False
    functions = {candidate: work.function(direction) for candidate, work in works.items()}
    seconds = timing.interleave(functions, rounds)
    targets = TARGETS.get((kind, *case, direction), {})
    good = True
    for candidate, own in seconds.items():
        times = timing.Times.of(own)
        row = [name, direction, candidate]
        row += [f"{1e3 * t:.3f}" for t in (times.p20, times.p50, times.p80)]
        if candidate == "cpp":
            moved = about.least_bytes(*case, direction)
            reached = moved / times.p50 / bandwidth
            operations = about.operations(*case, direction)
            row += ["", "", f"{moved / 1e6:.2f}", f"{operations / 1e6:.1f}", f"{reached:.2f}"]
        else:
            ratios = timing.Times.of(
                [other / fused for other, fused in zip(own, seconds["cpp"], strict=True)]
            )
            target = targets.get(candidate)
            good &= target is None or ratios.p50 >= target
            row.append(f"{ratios.p50:.3f} ({ratios.p20:.3f}, {ratios.p80:.3f})")
            row += ["" if target is None else f"{target:.3f}", "", "", ""]
        print("| " + " | ".join(row) + " |", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
