"""Compiles every Triton kernel for real cards, without one, and says what each takes.

    python -m bench.gpu.triton_resources 75 80 90 100        # or: make triton-check
    python -m bench.gpu.triton_resources --only attention

Everything that training, search and inference launch, at the shapes of ``bench.gpu.kernels``, is
compiled for the compute capabilities named. Prints registers by kernel and card; ends
with status 1 if a register spills to memory, or if a kernel wants more than a processor has.
"""

import argparse
import concurrent.futures
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from bench import cases
from bench.gpu import launches
from bench.gpu.kernels import CASES
from bench.gpu.resources import Usage, products, summary
from naslora_kernels.triton.attention import TritonAttention
from naslora_kernels.triton.primitives import TritonPrimitives

# The oldest card, and one of each generation of data-centre cards: bytes of shared memory that one
# block may have (CUDA C++ Programming Guide, technical specifications per compute capability).
SHARED_LIMITS = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTER_LIMIT = 255  # a thread's
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
            **resources(compiled.asm["cubin"]),
        )


def product(ptx: str) -> str:
    """The instruction by which tensor cores multiply, in a kernel's PTX; empty without."""
    found = re.search(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)
    return found.group() if found else ""


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and local memory of the one kernel in a cubin, as cuobjdump reports them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(cuobjdump()), "--dump-resource-usage", str(file)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(report)


def parse(report: str) -> dict[str, int]:
    """The numbers of the one kernel in a report.

    Raises:
        ValueError: the report has none, or several.
    """
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if len(found) != 1:
        raise ValueError(
            f"cuobjdump reports {len(found)} kernels where one was expected:\n{report}"
        )
    registers, stack, local = map(int, found[0])
    # The kernels have no arrays of their own in local memory: what lies there was spilled.
    return {"registers": registers, "stack": stack, "spilled": stack + local}


def cuobjdump() -> Path:
    """The one that comes with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


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
        compiler.label = f"d={attention[-1]} {str(dtype).removeprefix('torch.')}"
        launches.attention(compiler.attention, attention, dtype)
    return list(compiler.usages.values())


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
    return lines


def refusal() -> str | None:
    """Why nothing can be compiled here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, under which Triton compiles nothing: unset it"
    if not cuobjdump().exists():
        return f"this build of Triton brings no cuobjdump: {cuobjdump()} is missing"
    return None


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
    reason = refusal()
    if reason is not None:
        print(f"triton_resources: {reason}", file=sys.stderr)
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
    found = problems(usages)
    print(f"{len(usages)} kernels compiled, {len(found)} problems")
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
