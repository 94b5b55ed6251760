"""What a round of a kernel's innermost loop costs, read from machine code without a GPU.

A loop is the code between a branch that goes back and its target. Counts are those of one of the
four schedulers of a processor, which share the warps of a program.
"""

import re
from typing import NamedTuple

_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
# Multiply-additions of a warp's instruction of tensor cores. Four warps share one of HGMMA.
_PRODUCTS = {"HMMA.16816": 16 * 8 * 16, "HMMA.1688": 16 * 8 * 8, "HMMA.1684": 16 * 8 * 4}


class Round(NamedTuple):
    """One round of a loop."""

    issued: float
    """Cycles in which a scheduler issues an instruction."""
    exponentials: float
    """Cycles that exponentials, logarithms and reciprocals take, four lanes a cycle."""
    products: float
    """Multiply-additions of the program's tensor-core instructions, repeated ones included."""


def costliest_round(listing: str, warps: int) -> Round | None:
    """The round of the innermost loop with the most products, or without any the longest one.

    ``listing`` is what ``cuobjdump -sass`` prints of one kernel. None if it has no loop.
    """
    code = [
        (int(found["address"], 16), found["opcode"], found["operands"])
        for found in _INSTRUCTION.finditer(listing)
    ]
    ranges = set()
    for address, opcode, operands in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if opcode.startswith("BRA") and target and int(target[1], 16) < address:
            ranges.add((int(target[1], 16), address))
    rounds = [
        _round([opcode for address, opcode, _ in code if first <= address <= last], warps)
        for first, last in ranges
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in ranges)
    ]
    return max(rounds, key=lambda found: (found.products, found.issued), default=None)


def _round(opcodes: list[str], warps: int) -> Round:
    products = 0.0
    for opcode in opcodes:
        wide = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode)
        if wide:
            products += int(wide[1]) * int(wide[2]) * int(wide[3]) / 4
        products += next((n for name, n in _PRODUCTS.items() if opcode.startswith(name)), 0)
    issued = sum(opcode != "NOP" for opcode in opcodes)
    exponentials = 8 * sum(opcode.startswith("MUFU") for opcode in opcodes)
    return Round(issued * warps / 4, exponentials * warps / 4, products * warps)
