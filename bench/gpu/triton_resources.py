"""Compiles every Triton kernel for real cards, without one, and says what each takes.

    python -m bench.gpu.triton_resources 75 80 90 100        # all cards: make triton-check
    python -m bench.gpu.triton_resources --only attention

Everything that training, search and inference launch, at the shapes of ``bench.gpu.kernels``, is
compiled for the compute capabilities named. Prints registers by kernel and card, and what
attention takes by count of its machine code. Ends with status 1 if a register spills to memory, if
a kernel wants more than a processor has, if warps repeat products of attention, or if ptxas
serialises wgmma.
"""

import argparse
import concurrent.futures
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import cases
from bench.gpu import launches
from bench.gpu.kernels import CASES
from bench.gpu.resources import SHARED_LIMITS, Usage, Work, estimates, problems, products, summary
from naslora_kernels.triton.attention import TritonAttention
from naslora_kernels.triton.primitives import TritonPrimitives

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class AbsentCard:
    """As much of a Triton driver as compiling for a card takes."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """A launcher that compiles, and keeps what each variant of a kernel takes."""

    def __init__(self, capability: int) -> None:
        import triton

        self._architecture = f"sm_{capability}"
        self.usages: dict[str, Usage] = {}  # by the hash of the compiled kernel
        self._numbers: dict[str, int] = {}  # of variants, by kernel
        triton.runtime.driver.set_active(AbsentCard(capability))
        self.primitives = TritonPrimitives(self._compile, lambda device: divmod(capability, 10))
        self.attention = TritonAttention(self._compile, lambda device: divmod(capability, 10))
        self.label = ""  # of what is being compiled, to tell variants apart

    def _compile(self, kernel, grid, *arguments, **constants) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **constants)
        if compiled.hash in self.usages:
            return
        name = kernel.fn.__name__.removesuffix("_kernel")
        key = f"{name} {self.label}"
        self._numbers[key] = number = self._numbers.get(key, 0) + 1
        self.usages[compiled.hash] = Usage(
            key + (f" #{number}" if number > 1 else ""),
            self._architecture,
            shared=compiled.metadata.shared,
            product=product(compiled.asm["ptx"]),
            serialized=serialized(compiled.asm["ptx"], self._architecture),
            work=attention_work(name, compiled.asm["cubin"], grid, constants, arguments),
            **parse(_about(compiled.asm["cubin"], cuobjdump(), "--dump-resource-usage").stdout),
        )


def product(ptx: str) -> str:
    """The instruction by which tensor cores multiply, in a kernel's PTX; empty without."""
    found = re.search(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)
    return found.group() if found else ""


def _about(code: bytes, *command: str) -> subprocess.CompletedProcess[str]:
    """What a program prints about code in a file. It writes into a folder that is then removed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "code").write_bytes(code)
        return subprocess.run(
            [*command, "code"], capture_output=True, text=True, check=True, cwd=folder
        )


def serialized(ptx: str, architecture: str) -> bool:
    """Whether ptxas, which Triton silences, warns that it serialises wgmma."""
    if "wgmma.mma_async" not in ptx:
        return False
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = get_ptxas(int(architecture.removeprefix("sm_"))).path
    result = _about(ptx.encode(), ptxas, "-v", f"--gpu-name={architecture}a")
    return "C7515" in result.stderr


def attention_work(
    name: str,
    cubin: bytes,
    grid: tuple[int, ...],
    constants: dict[str, Any],
    arguments: tuple[Any, ...],
) -> Work | None:
    """What a kernel of attention takes for 64 x 64 scores; None for other kernels."""
    if name not in launches.PRODUCTS:
        return None
    found = costliest_round(_about(cubin, cuobjdump(), "-sass").stdout, constants["num_warps"])
    rows, columns, queries = (constants[key] for key in ("ROWS", "COLUMNS", "QUERIES"))
    scores = queries * rows * columns
    needed = launches.PRODUCTS[name] * scores * (constants["LANES"] + constants["REST"])
    needed *= 3 if constants["PRECISION"] == "tf32x3" else 1
    q = arguments[1 if name != "attention_forward" else 0]
    rel_h, rel_w = (arguments[i + 4 - (name == "attention_forward")] for i in (0, 1))
    if name == "attention_keys":
        inner = -(-q.shape[2] // queries)
    else:
        inner = -(-rel_h.shape[-1] // rows) * -(-rel_w.shape[-1] // columns)
    tiles = grid[0] * inner * scores // 4096
    share = 4096 / scores
    return Work(found.issued * share, found.exponentials * share, found.products / needed, tiles)


def parse(report: str) -> dict[str, int]:
    """Registers and local memory of the one kernel that cuobjdump reports."""
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    registers, stack, local = map(int, found)
    # The kernels have no arrays of their own in local memory: what lies there was spilled.
    return {"registers": registers, "stack": stack, "spilled": stack + local}


def cuobjdump() -> str:
    """The one that comes with Triton."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def compile_for(
    capability: int,
    dtype: torch.dtype,
    shapes: Sequence[tuple[cases.Shape, int]],
    attention_shapes: Sequence[launches.AttentionShape],
) -> list[Usage]:
    """What every kernel takes that the shapes launch in one dtype of maps on one card."""
    compiler = Compiler(capability)
    for shape, rank in shapes:
        compiler.label = f"r={rank} {str(dtype).removeprefix('torch.')}"
        operands = launches.Operands(shape, rank, dtype)
        for work in (*launches.WORKS.values(), *launches.OTHER_WORKS.values()):
            work(compiler.primitives, operands)
    for attention in attention_shapes:
        sides = "x".join(map(str, attention[2]))
        compiler.label = f"{sides} d={attention[-1]} {str(dtype).removeprefix('torch.')}"
        launches.attention(compiler.attention, attention, dtype)
    return list(compiler.usages.values())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", nargs="*", type=int, default=list(SHARED_LIMITS))
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--dtypes", nargs="+", choices=names, default=names)
    parser.add_argument("--quick", action="store_true", help="the first shape alone")
    parser.add_argument("--only", choices=("layers", "attention"), help="a part of the kernels")
    return parser.parse_args()


def main() -> int:
    """Prints the tables; returns 1 with a line for every problem."""
    arguments = parse_arguments()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("triton_resources: TRITON_INTERPRET=1 is set: unset it", file=sys.stderr)
        return 2
    # Triton asks a card whether to fuse multiplications and additions; there is none.
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    first = slice(1 if arguments.quick else None)
    shapes = () if arguments.only == "attention" else CASES[first]
    attention_shapes = () if arguments.only == "layers" else launches.ATTENTION_SHAPES[first]
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    jobs = list(itertools.product(arguments.capabilities, dtypes))
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        repeated = map(itertools.repeat, (shapes, attention_shapes))
        compiled = pool.map(compile_for, *zip(*jobs, strict=True), *repeated)
        usages = []
        for (capability, dtype), of_job in zip(jobs, compiled, strict=True):
            print(f"sm_{capability} {dtype}: {len(of_job)} kernels", file=sys.stderr)
            usages += of_job
    print(f"{summary(usages)}\n\nProducts on tensor cores:\n\n{products(usages)}\n")
    print(f"Attention by count; no GPU has measured it:\n\n{estimates(usages)}\n")
    found = problems(usages)
    print(f"{len(usages)} kernels compiled, {len(found)} problems")
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


# ---- Machine code --------------------------------------------------------------------------------

# A loop is the code between a branch that goes back and its target. Counts are those of one of the
# four schedulers of a processor, which share the warps of a program.
_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?(?P<opcode>[A-Z][\w.]*)"
    r"(?P<operands>[^;?&]*)"  # some versions of cuobjdump add &wr=0x1 and ?trans1
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


if __name__ == "__main__":
    sys.exit(main())
