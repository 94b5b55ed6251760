"""Builds the C++ extension; everything that does not need code stands in pyproject.toml.

NASLORA_SKIP_EXT=1 builds no extension at all. NASLORA_SANITIZE=1 builds it with AddressSanitizer
and UndefinedBehaviorSanitizer, for ``make sanitize``. There is no CUDA code yet: NASLORA_SKIP_CUDA
and TORCH_CUDA_ARCH_LIST change nothing, and NASLORA_FORCE_CUDA=1 fails.
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Name, vector size in bytes, flags. All go into one binary, the best last; which one runs is
# chosen at run time, from what the processor says it can do. With AVX-512 the vectors stay at 32
# bytes: its 32 registers help, 64-byte vectors measured slower on maps 14 pixels wide.
INSTRUCTION_SETS = [("baseline", 16, [])]  # SSE2 on x86-64, NEON on AArch64
if platform.machine().lower() in ("x86_64", "amd64"):
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    INSTRUCTION_SETS += [
        ("avx2", 32, ["-mavx2", "-mfma"]),
        ("avx512", 32, ["-mavx2", "-mfma", *AVX512, "-mprefer-vector-width=256"]),
    ]

FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() not in ("", "0", "false", "no", "off")


class BuildKernels(build_ext):
    """Compiles the kernels once per instruction set, and lets an install succeed without them."""

    def build_extension(self, ext):
        try:
            self.build_kernels(ext)
        except Exception as error:  # no compiler, or one that is too old
            print(
                f"naslora: the C++ extension was not built ({str(error)[:100]}); "
                "everything will run on the PyTorch reference, which is slower"
            )

    def build_kernels(self, ext):
        sanitize = enabled("NASLORA_SANITIZE")
        flags = FLAGS + (SANITIZE if sanitize else [])
        macros = ext.define_macros + ([("NASLORA_POISON", None)] if sanitize else [])
        objects = []

        def build(source, name, extra_macros, extra_flags=()):
            objects.extend(
                self.compiler.compile(
                    [source],
                    output_dir=str(Path(self.build_temp) / name),
                    macros=macros + extra_macros,
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*flags, *extra_flags],
                    depends=ext.depends,
                )
            )

        kernels, module = ext.sources
        for name, vector_bytes, isa_flags in INSTRUCTION_SETS:
            isa = [("NASLORA_ISA", name), ("NASLORA_VECTOR_BYTES", str(vector_bytes))]
            build(kernels, name, isa, isa_flags)
        names = " ".join(f"X({name})" for name, _, _ in INSTRUCTION_SETS)
        build(module, "module", [("NASLORA_FOR_EACH_ISA(X)", names)])

        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(output),
            extra_postargs=SANITIZE if sanitize else [],
            target_lang="c++",
        )


if enabled("NASLORA_FORCE_CUDA"):
    raise SystemExit("NASLORA_FORCE_CUDA is set, but this version of naslora has no CUDA kernels")

extension = Extension(
    "naslora_kernels._C",
    sources=["csrc/cpu_kernels.cpp", "csrc/python_module.cpp"],
    depends=[str(path) for path in sorted(Path("csrc").glob("*.h"))],
    define_macros=[("Py_LIMITED_API", "0x030A0000")],
    py_limited_api=True,
    optional=True,
    language="c++",
)

setup(
    ext_modules=[] if enabled("NASLORA_SKIP_EXT") else [extension],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
