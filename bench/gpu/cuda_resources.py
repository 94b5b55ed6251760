"""Compiles the CUDA kernels, and says what each takes: ``make nvcc-check``.

Prints registers, memory and spills of every kernel, as ptxas reports them, for the architectures on
the command line. The default is all that nvcc knows. Fails on a warning, on a register spill, and
on a generic access in the machine code of the architectures in ``NAMED``.
"""

import concurrent.futures
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.gpu.resources import Usage, problems, summary

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NAMED = (75, 80, 90, 100)  # the oldest, and one of each generation of data-centre cards


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
    found = str(beside) if beside.exists() else shutil.which("cuobjdump")
    if found is None and importlib.util.find_spec("triton"):
        from bench.gpu import triton_resources

        found = triton_resources.cuobjdump()
    if found is None or not Path(found).exists():
        raise FileNotFoundError("no cuobjdump beside nvcc, on the PATH or in Triton")
    return found


def compile_for(nvcc: str, source: Path, architecture: int) -> tuple[dict[str, Usage], int]:
    """Compiles one file for one architecture: what its kernels take, and its generic accesses.

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
        command = [cuobjdump(nvcc), "-sass", f"{folder}/object"]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(result.stderr), generic_accesses(code)


def generic_accesses(code: str) -> int:
    """Loads and stores in a listing of machine code whose address may be of any memory."""
    return len(re.findall(r"/\s+(?:@!?\w+\s+)?(?:LD|ST|ATOM|RED)\b", code))


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


def check(nvcc: str, architectures: list[int]) -> tuple[list[Usage], list[str]]:
    """Compiles every kernel for every architecture, with one compiler per processor.

    Returns:
        What each kernel takes, and a line for every problem.
    """
    jobs = [(source, architecture) for architecture in architectures for source in SOURCES]
    usages, found = [], []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda job: compile_for(nvcc, *job), jobs)
        for (source, architecture), (of_file, generic) in zip(jobs, compiled, strict=True):
            usages += of_file.values()
            if generic and architecture in NAMED:
                where = f"{source.name}, sm_{architecture}"
                found.append(f"{where}: {generic} loads and stores of unknown memory")
    return usages, found + problems(usages)


def main() -> None:
    setup = load_setup()
    nvcc = setup.find_nvcc()
    if nvcc is None:
        sys.exit("no nvcc below CUDA_HOME, on the PATH or in /usr/local/cuda")
    architectures = [int(a) for a in sys.argv[1:]] or setup.known_architectures(nvcc)
    usages, found = check(nvcc, architectures)
    print(f"{summary(usages)}\n")
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
