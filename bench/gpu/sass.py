"""What the machine code of a kernel does: its loops, its loads in flight, its generic accesses.

Reads the listing that ``cuobjdump -sass`` prints. A loop is the code between a branch that goes
back and its target. Only innermost loops are looked at.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
_REGISTER = re.compile(r"\bR(\d+)\b")
_ENDS_A_RUN = ("BRA", "BRX", "JMP", "CALL", "RET", "EXIT", "BAR", "BSYNC", "WARPSYNC")


class Instruction(NamedTuple):
    """One instruction, without its guard."""

    address: int
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def words(self) -> int:
        """The registers of 32 bits that a load or a store moves."""
        width = re.search(r"\.(64|128)\b", self.opcode)
        return int(width[1]) // 32 if width else 1

    @property
    def target(self) -> int | None:
        """Where a branch goes; None if it goes nowhere else or depends on a register."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if self.base == "BRA" and found else None


class Loop(NamedTuple):
    """An innermost loop: how many instructions it has, and of which kinds."""

    instructions: int
    wide_loads: int
    """Loads of 16 bytes from global memory."""
    in_flight: int
    """The most of them that are under way together, before a branch or a use of one."""
    loads: int
    """Other loads from global memory."""
    staged: int
    """32-bit words that are stored to shared memory."""
    arithmetic: int
    """Floating-point multiplications and additions."""
    products: int
    """Instructions of tensor cores."""


class Code(NamedTuple):
    """The machine code of one kernel."""

    symbol: str
    instructions: int
    generic: int
    """Loads and stores whose address may be of any memory."""
    loops: tuple[Loop, ...]


def listing(tool: Path | str, binary: Path) -> str:
    """The machine code in a file, as text."""
    command = [str(tool), "-sass", str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernels(text: str) -> list[Code]:
    """The kernels of a listing."""
    parts = _FUNCTION.split(text)[1:]
    return [_code(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]


def _code(symbol: str, text: str) -> Code:
    found = [
        Instruction(int(match["address"], 16), match["opcode"], match["operands"].strip())
        for match in _INSTRUCTION.finditer(text)
    ]
    return Code(
        symbol,
        sum(instruction.base != "NOP" for instruction in found),
        sum(instruction.base in ("LD", "ST", "ATOM", "RED") for instruction in found),
        tuple(_loop(body) for body in _loops(found)),
    )


def _loops(instructions: list[Instruction]) -> Iterator[list[Instruction]]:
    # A kernel ends with a branch to itself.
    ranges = {
        (i.target, i.address) for i in instructions if i.target is not None and i.target < i.address
    }
    for first, last in sorted(ranges):
        inner = any(first <= a and b <= last and (a, b) != (first, last) for a, b in ranges)
        if not inner:
            yield [i for i in instructions if first <= i.address <= last]


def _loop(body: list[Instruction]) -> Loop:
    wide = [i for i in body if i.base == "LDG" and i.words == 4]
    return Loop(
        len(body),
        len(wide),
        _in_flight(body),
        sum(i.base == "LDG" for i in body) - len(wide),
        sum(i.words for i in body if i.base == "STS"),
        sum(i.base in ("FFMA", "FADD", "FMUL", "FFMA2", "DFMA", "DADD", "DMUL") for i in body),
        sum(i.base in ("HMMA", "HGMMA", "DMMA") or i.base.startswith("UTC") for i in body),
    )


def _in_flight(body: list[Instruction]) -> int:
    """The most loads of 16 bytes between which no branch lies and none of which has been used."""
    targets = {i.target for i in body}
    most, under_way = 0, []  # the registers of each load that has not been used
    for instruction in body:
        if instruction.address in targets or instruction.base.startswith(_ENDS_A_RUN):
            under_way = []
        used = {int(number) for number in _REGISTER.findall(instruction.operands)}
        under_way = [registers for registers in under_way if not registers & used]
        if instruction.base == "LDG" and instruction.words == 4:
            first = int(_REGISTER.search(instruction.operands)[1])
            under_way.append(set(range(first, first + 4)))
            most = max(most, len(under_way))
    return most
