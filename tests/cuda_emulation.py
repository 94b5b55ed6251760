"""Builds the CUDA kernels for the CPU with a plain C++ compiler and csrc/cuda/emulation.h.

``python tests/cuda_emulation.py [--sanitize]`` prints the path of the extension.
"""

import concurrent.futures
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = (
    *("cell_forward.cu", "cell_backward.cu", "low_rank_pass.cu", "low_rank_expand.cu"),
    *("reduce.cu", "python_module.cpp"),
)
FLAGS = (
    *("-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-DNASLORA_EMULATION", "-DPy_LIMITED_API=0x030A0000"),
)
INFO = ('-DNASLORA_NVCC_VERSION="emulation"', '-DNASLORA_CUDA_ARCHITECTURES=""')
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")


def compiler() -> str | None:
    """The path of a C++ compiler, or None. On Windows the emulation was never built."""
    if os.name == "nt":
        return None
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "c++"))), None)


def build(sanitize: bool = False) -> Path:
    """Builds the extension, unless these sources and flags were built before; returns its path.

    Raises:
        subprocess.CalledProcessError: the compiler fails.
    """
    flags = (compiler(), *FLAGS, *INFO, *(SANITIZE if sanitize else ()))
    flags += (f"-I{sysconfig.get_paths()['include']}",)
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / f"cuda-emulation-{digest.hexdigest()[:16]}"
    binary = folder / "_CUDA.abi3.so"
    if binary.exists():
        return binary
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str) -> str:
        target = str(folder / f"{source}.o")
        subprocess.run(
            [*flags, "-x", "c++", "-c", str(ROOT / "csrc/cuda" / source), "-o", target], check=True
        )
        return target

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    # Renamed when it is complete, as another process may build the same binary.
    unfinished = folder / f"{os.getpid()}.so"
    subprocess.run([*flags, "-shared", *objects, "-o", str(unfinished)], check=True)
    os.replace(unfinished, binary)
    return binary


if __name__ == "__main__":
    print(build("--sanitize" in sys.argv))
