"""Builds the CUDA kernels for the CPU, as csrc/cuda/emulation.h lets a plain C++ compiler do.

``python tests/cuda_emulation.py [--sanitize]`` prints where the extension lies.
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
    """The C++ compiler, if there is one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "c++"))), None)


def build(sanitize: bool = False) -> Path:
    """Builds what these sources and flags do not have a binary of yet; returns the binary."""
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
    # Renamed when it is whole: another process may be building the same.
    unfinished = folder / f"{os.getpid()}.so"
    subprocess.run([*flags, "-shared", *objects, "-o", str(unfinished)], check=True)
    os.replace(unfinished, binary)
    return binary


if __name__ == "__main__":
    print(build("--sanitize" in sys.argv))
