"""Builds the C++ and CUDA extensions. The rest of the package is configured in pyproject.toml.

On Windows Zig compiles the C++ extension, a Clang that ``pip install ziglang`` brings, because
Microsoft's compiler lacks the vectors of GCC and Clang.

The CUDA extension is built for the cards of this machine, if it has any, and an nvcc: below
CUDA_HOME or CUDA_PATH, on the PATH, or in /usr/local/cuda. The driver names the cards, because the
torch that the build sees, if it sees one, may be a CPU build. Neither extension needs torch to
build.

Environment variables:
    TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX": builds for these compute capabilities, with or without a
        card.
    NASLORA_FORCE_CUDA=1: builds for every capability from 7.5 on that nvcc knows, unless
        TORCH_CUDA_ARCH_LIST names some. Fails if the CUDA extension cannot be built.
    NASLORA_SKIP_EXT=1: builds no extension.
    NASLORA_SKIP_CUDA=1: builds no CUDA extension.
    MAX_JOBS=2: compiles at most so many files at a time. The default is one for each processor.
    NASLORA_SANITIZE=1: builds the C++ extension with AddressSanitizer and
        UndefinedBehaviorSanitizer, for ``make sanitize``.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Name, base, vector sizes in bytes by source, flags. All are compiled into one binary, best last.
# At run time the processor's features decide which one is used. With AVX-512 kernels.cpp keeps 32
# bytes: its 32 registers help, but vectors of 64 bytes measured slower on maps that are 14 pixels
# wide. Attention consists of matrix products, which wider vectors make faster. A set with a base
# has attention in bfloat16 of its own and takes the rest from the base. It is left out if the
# compiler lacks its flags. The baseline is linked first (csrc/cpu/vector.h says why).
INSTRUCTION_SETS = [  # the first is SSE2 on x86-64, NEON on AArch64
    ("baseline", None, {"kernels.cpp": 16, "attention.cpp": 16}, []),
]
if platform.machine().lower() in ("x86_64", "amd64"):
    AVX2 = ["-mavx2", "-mfma"]
    AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    AVX512 += ["-mprefer-vector-width=256"]
    BF16 = [*AVX512, "-mavx512bf16"]
    AMX = [*BF16, "-mamx-tile", "-mamx-bf16"]
    INSTRUCTION_SETS += [
        ("avx2", None, {"kernels.cpp": 32, "attention.cpp": 32}, AVX2),
        ("avx512", None, {"kernels.cpp": 32, "attention.cpp": 64}, AVX512),
        ("avx512_bf16", "avx512", {"attention.cpp": 64}, BF16),
        ("amx", "avx512", {"attention.cpp": 64}, AMX),
    ]

FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]
WINDOWS = os.name == "nt"
ZIG_TARGETS = {"amd64": "x86_64-windows-gnu", "arm64": "aarch64-windows-gnu"}
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
OLDEST_ARCHITECTURE = 75

Result = TypeVar("Result")


class BuildError(Exception):
    """The reason why an extension cannot be built, in one line."""


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() not in ("", "0", "false", "no", "off")


def processors() -> int:
    """How many compilers run at a time: MAX_JOBS, as for torch's own extensions, or all."""
    jobs = os.environ.get("MAX_JOBS", "")
    return max(1, int(jobs)) if jobs.isdecimal() else os.cpu_count() or 1


def in_parallel(jobs: list[Callable[[], Result]]) -> list[Result]:
    """Runs compilers side by side. The results keep their order."""
    with ThreadPoolExecutor(processors()) as pool:
        return list(pool.map(lambda job: job(), jobs))


def find_nvcc() -> str | None:
    roots = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.path.join(root, "bin", "nvcc") for root in roots if root]
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((nvcc for nvcc in candidates if nvcc and os.path.exists(nvcc)), None)


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise BuildError(f"{command[0]}: {next((x for x in lines if 'error' in x), lines[-1])}")
    return result.stdout


def cards() -> list[int]:
    """Compute capabilities of this machine's NVIDIA cards, without repetition; 90 means 9.0.

    nvidia-smi also lists cards that CUDA_VISIBLE_DEVICES hides. Some containers and boards lack
    it, so the driver's library is asked next.
    """
    return sorted(set(cards_of_nvidia_smi() or cards_of_libcuda()))


def cards_of_nvidia_smi() -> list[int]:
    """What nvidia-smi lists; empty without it, without a driver, or if it is too old to tell."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", listed.stdout, re.MULTILINE)
    return [int(major + minor) for major, minor in found] if listed.returncode == 0 else []


def cards_of_libcuda() -> list[int]:
    """What the driver's library lists; empty without it, or if it finds no card."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return []
    count, device, number = ctypes.c_int(0), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for index in range(count.value):
        driver.cuDeviceGet(ctypes.byref(device), index)
        capability = 0
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
            capability = 10 * capability + number.value
        found.append(capability)
    return found


def known_architectures(nvcc: str) -> list[int]:
    """Capabilities that nvcc and the kernels support, in ascending order; 90 means 9.0."""
    found = {int(number) for number in re.findall(r"compute_(\d+)\b", run(nvcc, "--list-gpu-arch"))}
    return sorted(number for number in found if number >= OLDEST_ARCHITECTURE)


def architectures(nvcc: str) -> list[str]:
    """What to compile: ``sm_*`` is machine code, ``compute_*`` is PTX, which serves later devices.

    Raises:
        BuildError: TORCH_CUDA_ARCH_LIST has an entry, or this machine has no card, that nvcc and
            the kernels support.
    """
    known = known_architectures(nvcc)
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not wanted and enabled("NASLORA_FORCE_CUDA"):
        return [*(f"sm_{number}" for number in known), f"compute_{known[-1]}"]
    if not wanted:
        return architectures_of(cards(), known)
    chosen = []
    for entry in re.split(r"[;,\s]+", wanted.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match or int(match[1] + match[2]) not in known:
            names = ", ".join(f"{number // 10}.{number % 10}" for number in known)
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is not one of {names}, with or without +PTX"
            )
        name = match[1] + match[2] + match[3]
        chosen += [f"sm_{name}"] + ([f"compute_{name}"] if match[4] else [])
    return chosen


def architectures_of(found: list[int], known: list[int]) -> list[str]:
    """The newest code that each card runs and nvcc makes; PTX for a card later than nvcc knows.

    Raises:
        BuildError: every card is too old.
    """
    chosen = []
    for card in found:
        older = [number for number in known if number <= card]
        if older:
            kind = "sm" if older[-1] // 10 == card // 10 else "compute"
            chosen.append(f"{kind}_{older[-1]}")
    if not chosen:
        names = ", ".join(f"{card // 10}.{card % 10}" for card in found) or "none"
        least = f"{known[0] // 10}.{known[0] % 10}"
        raise BuildError(f"the cards' compute capabilities, {names}, are below {least}")
    return list(dict.fromkeys(chosen))


def code_flags(chosen: list[str]) -> list[str]:
    """The flags of nvcc for the architectures, one flag for each capability."""
    code = {}
    for name in chosen:
        code.setdefault(f"compute_{name.split('_')[1]}", []).append(name)
    return [f"-gencode=arch={arch},code=[{','.join(names)}]" for arch, names in code.items()]


def zig(*arguments: str) -> None:
    """Runs Zig's C++ compiler for Windows on this processor."""
    target = ZIG_TARGETS[platform.machine().lower()]
    run(sys.executable, "-m", "ziglang", "c++", "-target", target, *arguments)


def compile_set(
    compile: Callable[[list[str]], list[str]], flags: list[str], name: str, base: str | None
) -> tuple[str, list[str]]:
    """Returns an entry of NASLORA_FOR_EACH_ISA and the objects; none for a set with a base if the
    compiler lacks it."""
    try:
        return f"X({name}, {base or name})", compile(flags)
    except (BuildError, CompileError):
        if base is None:
            raise
        return "", []


class BuildKernels(build_ext):
    """Builds the extensions that can be built. An install succeeds without the others."""

    def build_extension(self, ext):
        cuda = ext.name.endswith("_CUDA")
        try:
            (self.build_cuda if cuda else self.build_cpu)(ext)
        except Exception as error:  # for example no compiler, or one that is too old
            if cuda and enabled("NASLORA_FORCE_CUDA"):
                raise SystemExit(f"naslora: the CUDA extension was not built: {error}") from None
            print(
                f"naslora: the {'CUDA' if cuda else 'C++'} extension was not built "
                f"({str(error)[:200]}); everything will run on "
                + ("the other backends" if cuda else "the PyTorch reference, which is slower")
            )

    def compile(self, ext, source, name, macros, flags):
        if WINDOWS:
            return [self.compile_with_zig(ext, source, name, macros, flags)]
        return self.compiler.compile(
            [source],
            output_dir=str(Path(self.build_temp) / name),
            macros=ext.define_macros + macros,
            include_dirs=ext.include_dirs,
            extra_postargs=flags,
            depends=ext.depends,
        )

    def compile_with_zig(self, ext, source, name, macros, flags) -> str:
        path = Path(self.build_temp) / name / f"{Path(source).stem}.o"
        path.parent.mkdir(parents=True, exist_ok=True)
        defined = [
            f"-D{macro}" if value is None else f"-D{macro}={value}"
            for macro, value in ext.define_macros + macros
        ]
        headers = f"-I{sysconfig.get_path('include')}"
        zig(*flags, *defined, headers, "-c", source, "-o", str(path))
        return str(path)

    def link(self, ext, objects, flags) -> None:
        if WINDOWS:
            python = Path(sys.base_exec_prefix) / "libs" / "python3.lib"
            # The library for linking with this one, which nobody needs, must not be installed.
            unused = f"-Wl,--out-implib={self.build_temp}/unused.lib"
            return zig("-shared", "-s", unused, *objects, str(python), "-o", self.output(ext))
        self.compiler.link_shared_object(
            objects, self.output(ext), extra_postargs=flags, target_lang="c++"
        )

    def output(self, ext) -> str:
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def build_cpu(self, ext):
        """Compiles the kernels once per instruction set."""
        sanitize = enabled("NASLORA_SANITIZE")
        flags = FLAGS + (SANITIZE if sanitize else [])
        names = ("NASLORA_POISON", "NASLORA_EMULATE_AMX") if sanitize else ()
        macros = [(name, None) for name in names]
        jobs = []
        for name, base, vector_sizes, isa_flags in INSTRUCTION_SETS:
            for source, size in vector_sizes.items():
                isa = [("NASLORA_ISA", name), ("NASLORA_VECTOR_BYTES", str(size))]
                compile = partial(self.compile, ext, f"csrc/cpu/{source}", name, macros + isa)
                jobs.append(partial(compile_set, compile, flags + isa_flags, name, base))
        compiled = in_parallel(jobs)
        isas = " ".join(dict.fromkeys(entry for entry, _ in compiled))
        macros.append(("NASLORA_FOR_EACH_ISA(X)", isas))
        objects = [path for _, paths in compiled for path in paths]
        objects += self.compile(ext, "csrc/cpu/python_module.cpp", "module", macros, flags)
        self.link(ext, objects, SANITIZE if sanitize else [])

    def build_cuda(self, ext):
        """Compiles the kernels with nvcc, and the Python module with the host's compiler."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise BuildError("no nvcc below CUDA_HOME, on the PATH or in /usr/local/cuda")
        chosen = architectures(nvcc)
        version = re.search(r"release ([\d.]+)", run(nvcc, "--version"))[1]
        *kernels, module = ext.sources
        info = [
            ("NASLORA_NVCC_VERSION", f'"nvcc {version}"'),
            ("NASLORA_CUDA_ARCHITECTURES", f'"{" ".join(chosen)}"'),
        ]
        objects = self.compile(ext, module, "cuda", info, FLAGS)
        # Processors that are left over when each file has one serve the architectures of a file.
        threads = f"--threads={max(1, processors() // len(kernels))}"
        jobs = []
        for source in kernels:
            objects.append(str(Path(self.build_temp) / f"{Path(source).stem}.cu.o"))
            command = [nvcc, *NVCC_FLAGS, threads, *code_flags(chosen), "-c", source]
            jobs.append(partial(run, *command, "-o", objects[-1]))
        in_parallel(jobs)
        run(nvcc, "-shared", "--cudart=static", *objects, "-o", self.output(ext))


def extension(name: str, folder: str, sources: list[str]) -> Extension:
    headers = [path for part in ("shared", folder) for path in Path("csrc", part).glob("*.*h")]
    return Extension(
        f"naslora_kernels.{name}",
        sources=[f"csrc/{folder}/{source}" for source in sources],
        depends=[str(path) for path in sorted(headers)],  # also what an sdist includes
        define_macros=[("Py_LIMITED_API", "0x030A0000")],
        py_limited_api=True,
        optional=True,
        language="c++",
    )


def wants_cuda() -> bool:
    """Whether to build the CUDA extension: on request, or for the cards of this machine."""
    if enabled("NASLORA_SKIP_CUDA") or enabled("NASLORA_SANITIZE"):
        return False
    if enabled("NASLORA_FORCE_CUDA"):
        return True
    return find_nvcc() is not None and bool(os.environ.get("TORCH_CUDA_ARCH_LIST") or cards())


def extensions() -> list[Extension]:
    if enabled("NASLORA_SKIP_EXT"):
        return []
    found = [extension("_C", "cpu", ["kernels.cpp", "attention.cpp", "python_module.cpp"])]
    if wants_cuda():
        sources = ["cell_forward.cu", "cell_backward.cu", "low_rank_pass.cu", "low_rank_expand.cu"]
        found.append(extension("_CUDA", "cuda", [*sources, "reduce.cu", "python_module.cpp"]))
    return found


if __name__ == "__main__":  # tests import the functions above
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
