"""Compiles the CUDA kernels and prints what each uses: ``make nvcc-check``.

Prints registers, memory and spills of every kernel, as ptxas reports them, for the architectures on
the command line. The default is all that nvcc knows. Fails on a warning and on a register spill.
"""

import concurrent.futures
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.resources import Usage, summary, table

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NAMED = (75, 80, 90, 100)  # the oldest, and one of each generation of data-centre cards


def load_setup():
    """setup.py as a module, for its functions that find nvcc and name architectures."""
    spec = importlib.util.spec_from_file_location("naslora_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_for(nvcc: str, source: Path, architecture: int) -> list[Usage]:
    """Compiles one file for one architecture.

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
    return parse(result.stderr)


def parse(report: str) -> list[Usage]:
    """Reads the usage of every kernel from the output of ``ptxas -v``."""
    usages = []
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
        usages.append(Usage(kernel_name(symbol), architecture, **numbers))
    return usages


def kernel_name(symbol: str) -> str:
    """The demangled name without namespaces and arguments: ``cell_forward<float, 2, ...>``."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"naslora::|\(anonymous namespace\)::", "", name.strip())
    kernel, arguments = re.match(r"(?:void )?(\w+?)_kernel<(.*)>\(", name).groups()
    return f"{kernel}<{re.sub(r'<[^<>]*>', '', arguments).strip()}>".replace("(bool)", "")


def check(nvcc: str, architectures: list[int]) -> list[Usage]:
    """Compiles every kernel for every architecture, with one compiler per processor."""
    jobs = [(source, architecture) for architecture in architectures for source in SOURCES]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = pool.map(lambda job: compile_for(nvcc, *job), jobs)
        return [usage for report in reports for usage in report]


def main() -> None:
    setup = load_setup()
    nvcc = setup.find_nvcc()
    if nvcc is None:
        sys.exit("no nvcc below CUDA_HOME, on the PATH or in /usr/local/cuda")
    architectures = [int(a) for a in sys.argv[1:]] or setup.known_architectures(nvcc)
    usages = check(nvcc, architectures)
    print(table(usages))
    print(f"\n{summary(usages)}\n")
    spilled = sum(usage.spilled for usage in usages)
    print(
        f"{len(usages)} kernels: {spilled} bytes spilled, "
        f"{sum(usage.stack for usage in usages)} bytes of stack, "
        f"{sum(usage.shared for usage in usages)} bytes of static shared memory"
    )
    if spilled:
        sys.exit("some kernels spill registers (marked *)")


if __name__ == "__main__":
    main()
