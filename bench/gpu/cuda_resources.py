"""Compiles the CUDA kernels, and says what each takes and does: ``make nvcc-check``.

Prints registers, memory and spills of every kernel, as ptxas reports them, for the architectures on
the command line. The default is all that nvcc knows. Then it reads the machine code of the
architectures in ``NAMED``: generic accesses, loads in flight, instructions of the inner loops.
Fails on a warning, on a register spill, and on machine code beyond the limits below.
"""

import concurrent.futures
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from bench.gpu import sass
from bench.gpu.resources import Usage, family, spread, summary, table

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NAMED = (75, 80, 90, 100)  # the oldest, and one of each generation of data-centre cards
# What the machine code may do on a card that has 16-byte loads in flight at all.
FEWEST_IN_FLIGHT = 4  # of a loop that reads memory sixteen bytes at a time
MOST_INSTRUCTIONS_STAGED = 20  # for an element that a loop brings to shared memory
REGISTERS = 64 * 1024  # of a multiprocessor


class Kernel(NamedTuple):
    """One kernel on one architecture."""

    usage: Usage
    code: sass.Code

    @property
    def streaming(self) -> list[sass.Loop]:
        """The loops that read memory sixteen bytes at a time."""
        return [loop for loop in self.code.loops if loop.wide_loads]

    @property
    def staging(self) -> list[float]:
        """Instructions for an element, of the loops that bring maps and factors to shared memory.

        They store four numbers a round and more. Loops over a cell's weights do not: they store
        fewer, or load each number twice, as either dtype, and run a few rounds a block.
        """
        words = 2 if "double" in self.usage.kernel else 1
        found = [
            (loop.instructions, loop.staged // words)
            for loop in self.code.loops
            if 0 < loop.loads <= loop.staged // words and not loop.wide_loads
        ]
        return [instructions / staged for instructions, staged in found if staged >= 4]

    @property
    def warps(self) -> int:
        """How many warps of 32 threads the registers of a multiprocessor hold."""
        return REGISTERS // (32 * -(-self.usage.registers // 8) * 8)


def load_setup():
    """setup.py as a module, for its functions that find nvcc and name architectures."""
    spec = importlib.util.spec_from_file_location("naslora_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuobjdump(nvcc: str) -> str:
    """The program that prints machine code: beside nvcc, on the PATH, or the one of Triton.

    Raises:
        FileNotFoundError: there is none.
    """
    beside = Path(nvcc).with_name("cuobjdump")
    if beside.exists():
        return str(beside)
    found = shutil.which("cuobjdump")
    if found is None and importlib.util.find_spec("triton"):
        from bench.gpu import triton_resources

        found = str(triton_resources.cuobjdump())
    if found is None or not Path(found).exists():
        raise FileNotFoundError("no cuobjdump beside nvcc, on the PATH or in Triton")
    return found


def compile_for(nvcc: str, source: Path, architecture: int) -> list[Kernel]:
    """Compiles one file for one architecture, and reads its machine code.

    Raises:
        RuntimeError: the compiler reports an error or a warning; the message holds its output.
    """
    setup = load_setup()
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [
                nvcc, *setup.NVCC_FLAGS, *setup.code_flags([f"sm_{architecture}"]),
                "-Xptxas=-v", "-Xptxas=-warn-spills", "-Werror=all-warnings",
                "-Xcompiler=-Wextra,-Werror", "-c", str(source), "-o", f"{folder}/object",
            ],
            capture_output=True,
            text=True,
        )  # fmt: skip
        if result.returncode:
            raise RuntimeError(f"{source.name}, sm_{architecture}:\n{result.stderr}")
        usages = parse(result.stderr)
        codes = sass.kernels(sass.listing(cuobjdump(nvcc), Path(folder) / "object"))
    of_symbol = {code.symbol: code for code in codes}
    return [Kernel(usage, of_symbol[symbol]) for symbol, usage in usages.items()]


def parse(report: str) -> dict[str, Usage]:
    """Reads the usage of every kernel from the output of ``ptxas -v``, by its symbol."""
    usages = {}
    for entry in report.split("Compiling entry function ")[1:]:
        symbol, architecture = re.match(r"'(\S+)' for '(\w+)'", entry).groups()
        numbers = {
            name: int(match[1]) if (match := re.search(pattern, entry)) else 0
            for name, pattern in (
                ("registers", r"Used (\d+) registers"),
                ("shared", r"(\d+) bytes smem"),
                ("stack", r"(\d+) bytes stack frame"),
                ("spilled", r"(\d+) bytes spill stores"),
            )
        }
        usages[symbol] = Usage(kernel_name(symbol), architecture, **numbers)
    return usages


def kernel_name(symbol: str) -> str:
    """The demangled name without namespaces and arguments: ``cell_forward<float, 2, ...>``."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"naslora::|\(anonymous namespace\)::", "", name.strip())
    kernel, arguments = re.match(r"(?:void )?(\w+?)_kernel<(.*)>\(", name).groups()
    return f"{kernel}<{re.sub(r'<[^<>]*>', '', arguments).strip()}>".replace("(bool)", "")


def check(nvcc: str, architectures: list[int]) -> list[Kernel]:
    """Compiles every kernel for every architecture, with one compiler per processor."""
    jobs = [(source, architecture) for architecture in architectures for source in SOURCES]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = pool.map(lambda job: compile_for(nvcc, *job), jobs)
        return [kernel for report in reports for kernel in report]


def problems(kernels: Iterable[Kernel]) -> list[str]:
    """A line for every limit that a kernel's machine code does not keep."""
    lines = []
    for kernel in kernels:
        where = f"{kernel.usage.kernel}, {kernel.usage.architecture}"
        if kernel.usage.spilled:
            lines.append(f"{where}: {kernel.usage.spilled} bytes of a thread's registers spill")
        if kernel.code.generic:
            lines.append(f"{where}: {kernel.code.generic} loads and stores of unknown memory")
        for loop in kernel.streaming:
            if loop.in_flight < FEWEST_IN_FLIGHT:
                lines.append(
                    f"{where}: {loop.in_flight} loads of 16 bytes in flight, of a loop with "
                    f"{loop.wide_loads} and {loop.instructions} instructions"
                )
        for instructions in kernel.staging:
            if instructions > MOST_INSTRUCTIONS_STAGED:
                lines.append(f"{where}: {instructions:.1f} instructions a staged element")
    return lines


def machine_code(kernels: Iterable[Kernel]) -> str:
    """What the machine code does, over all variants of each kernel, as Markdown."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((family(kernel.usage), kernel.usage.architecture), []).append(kernel)
    lines = [
        "| kernel | architecture | generic | 16-byte loads in flight | instructions a 16-byte load "
        "| instructions a staged element | warps by registers |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, architecture), members in sorted(groups.items()):
        streaming = [loop for kernel in members for loop in kernel.streaming]
        cells = [
            str(sum(kernel.code.generic for kernel in members)),
            spread([loop.in_flight for loop in streaming]),
            spread([round(loop.instructions / loop.wide_loads) for loop in streaming]),
            spread([round(n, 1) for kernel in members for n in kernel.staging]),
            spread([kernel.warps for kernel in members]),
        ]
        lines.append(f"| {name} | {architecture} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    setup = load_setup()
    nvcc = setup.find_nvcc()
    if nvcc is None:
        sys.exit("no nvcc below CUDA_HOME, on the PATH or in /usr/local/cuda")
    architectures = [int(a) for a in sys.argv[1:]] or setup.known_architectures(nvcc)
    kernels = check(nvcc, architectures)
    usages = [kernel.usage for kernel in kernels]
    named = {f"sm_{number}" for number in NAMED}
    read = [kernel for kernel in kernels if kernel.usage.architecture in named]
    print(table(usages))
    print(f"\n{summary(usages)}\n\n{machine_code(read)}\n")
    found = problems(kernel for kernel in kernels if kernel in read or kernel.usage.spilled)
    print(
        f"{len(usages)} kernels: {sum(usage.spilled for usage in usages)} bytes spilled, "
        f"{sum(usage.stack for usage in usages)} bytes of stack, "
        f"{sum(usage.shared for usage in usages)} bytes of static shared memory, "
        f"{len(found)} problems"
    )
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
