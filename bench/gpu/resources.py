"""What compiled GPU kernels take of a processor: registers, shared memory, spills."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Multiprocessors and clock of an A100 and an H100 with SXM. Seven tenths of their cycles issue.
SPEEDS = {"sm_80": (108, 1.41e9), "sm_90": (132, 1.755e9)}
ISSUING = 0.7
# The oldest card, and one of each generation and kind since: bytes of shared memory that one block
# may have (CUDA C++ Programming Guide, technical specifications per compute capability).
KIBIBYTES = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_LIMITS = {capability: 1024 * size for capability, size in KIBIBYTES.items()}
REGISTER_LIMIT = 255  # a thread's


class Work(NamedTuple):
    """What a kernel of attention takes for 64 queries and 64 keys of a head."""

    issued: float
    """Cycles in which one of a processor's four schedulers issues."""
    exponentials: float
    """Cycles of the unit of exponentials."""
    repeated: float
    """Products that tensor cores compute, of those that there are; 0 if it is not known."""
    tiles: int
    """Of 64 x 64, in the whole launch."""


class Usage(NamedTuple):
    """What one kernel takes on one architecture; memory in bytes, a thread's but for ``shared``."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spilled: int
    product: str = ""
    """The instruction by which tensor cores multiply, if the kernel has one."""
    serialized: bool = False
    """Whether ptxas says that it serialises wgmma (C7515)."""
    work: Work | None = None
    """What attention takes for its tiles."""


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; naslora's own needs packages that a machine with a GPU may lack."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def summary(usages: Sequence[Usage]) -> str:
    """The ranges over all variants of each kernel, as Markdown; – where a card lacks the kernel."""
    architectures = list(dict.fromkeys(usage.architecture for usage in usages))
    head = ["kernel", "variants", *architectures, "shared, KiB", "spilled"]
    head[2] = f"registers: {head[2]}"
    rows = []
    for name, members in _by_kernel(usages):
        registers = [
            spread([u.registers for u in members if u.architecture == a]) for a in architectures
        ]
        shared = spread([round(usage.shared / 1024, 1) for usage in members])
        spilled = sum(usage.spilled for usage in members)
        variants = len({usage.kernel for usage in members})
        rows.append([name, variants, *registers, shared, spilled])
    return markdown(head, rows)


def products(usages: Sequence[Usage]) -> str:
    """The tensor-core instructions over all variants of each kernel that has any, as Markdown."""
    architectures = list(dict.fromkeys(usage.architecture for usage in usages))
    rows = []
    for name, members in _by_kernel(usages):
        found = [
            ", ".join(sorted({u.product or "–" for u in members if u.architecture == a}))
            for a in architectures
        ]
        if any(usage.product for usage in members):
            rows.append([name, *found])
    return markdown(["kernel", *architectures], rows)


def _by_kernel(usages: Sequence[Usage]) -> list[tuple[str, list[Usage]]]:
    """All variants of each kernel. ``a<float, 2>`` is an ``a``."""
    found: dict[str, list[Usage]] = {}
    for usage in usages:
        found.setdefault(re.split("[< ]", usage.kernel)[0], []).append(usage)
    return sorted(found.items())


def estimates(usages: Sequence[Usage]) -> str:
    """What attention's kernels take by count, as Markdown; no GPU has measured the times."""
    rows = []
    for usage in usages:
        if usage.work and usage.work.repeated:
            issued, exponentials, repeated, tiles = usage.work
            processors, clock = SPEEDS.get(usage.architecture, (0, 1.0))
            cycles = tiles * max(issued / ISSUING, exponentials)
            ms = f"{1e3 * cycles / processors / clock:.3f}" if processors else ""
            found = f"{issued:.0f}", f"{exponentials:.0f}", f"{repeated:.2f}", ms
            rows.append([usage.architecture, usage.kernel, *found])
    head = ["card", "kernel", "cycles: issued", "exponentials", "products, of those needed", "ms"]
    return markdown(head, rows)


def spread(numbers: Sequence[float]) -> str:
    """The smallest and the largest of the numbers; – if there are none."""
    if not numbers:
        return "–"
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def problems(usages: Iterable[Usage]) -> list[str]:
    """A line for every kernel that spills or that a card cannot hold."""
    lines = []
    for usage in usages:
        limit = SHARED_LIMITS.get(int(usage.architecture.removeprefix("sm_")), SHARED_LIMITS[75])
        where = f"{usage.kernel}, {usage.architecture}"
        if usage.spilled:
            lines.append(f"{where}: {usage.spilled} bytes of a thread's registers spill")
        if usage.shared > limit:
            lines.append(f"{where}: {usage.shared} bytes of shared memory, of {limit}")
        if usage.registers > REGISTER_LIMIT:
            lines.append(f"{where}: {usage.registers} registers, of {REGISTER_LIMIT}")
        if usage.serialized:
            lines.append(f"{where}: ptxas serialises wgmma (C7515)")
        if usage.work and usage.work.repeated > 1:
            lines.append(f"{where}: {usage.work.repeated:.2f} times the products of its tiles")
    return lines
