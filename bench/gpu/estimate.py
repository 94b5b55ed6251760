"""Estimates the time of a layer's launches on an H100, from bytes and from machine code.

    python -m bench.gpu.estimate

No GPU has measured these numbers. The model, for each launch:

    time = max(bytes / BANDWIDTH, warp instructions / ISSUED) + LATENCY

Bytes are those of ``bench.gpu.layer_bytes``. Instructions come from the machine code for sm_90: the
innermost loops of the products times their trips, and all other code once for each step or program,
which is more than is executed. The launches of a cell and of the reduction move little; their
instructions are not estimated. The backend is the one that the automatic choice takes. Prints
Markdown. Exits with status 1 if the sum of a direction is beyond its budget, twice the time of its
bytes.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import cases
from bench.gpu import cuda_resources, launches, layer_bytes, sass, triton_resources
from naslora_kernels.backends import MANY_RANKS
from naslora_kernels.triton.primitives import TritonPrimitives

CAPABILITY = 90
BANDWIDTH = layer_bytes.BANDWIDTH
# 132 multiprocessors, four schedulers each, 1.755 GHz, of which seven tenths issue.
ISSUED = 0.7 * 132 * 4 * 1.755e9
LATENCY = 3e-6  # seconds from one launch to the next one's first loads
RANKS = (3, 6, 12, 24)
WORKS = ("layer, forward", "layer, backward, weight step", "layer, backward, architecture step")
THREAD_BYTES = 16 * 32  # of a warp's widest load


class Estimate(NamedTuple):
    """One launch."""

    kernel: str
    bytes: int
    instructions: float
    """Warp instructions; 0 if they are not estimated."""

    @property
    def seconds(self) -> float:
        return max(self.bytes / BANDWIDTH, self.instructions / ISSUED) + LATENCY


def cuda_codes() -> dict[str, sass.Code]:
    """The machine code of the products in bfloat16 on aligned rows, by the name of the kernel."""
    nvcc = cuda_resources.load_setup().find_nvcc()
    if nvcc is None:
        sys.exit("gpu_estimate: no nvcc below CUDA_HOME, on the PATH or in /usr/local/cuda")
    codes = {}
    for source in cuda_resources.SOURCES:
        if source.stem.startswith("low_rank"):
            for kernel in cuda_resources.compile_for(nvcc, source, CAPABILITY):
                if kernel.usage.kernel == f"{source.stem}<bfloat16, true>":
                    codes[source.stem] = kernel.code
    return codes


def cuda_instructions(codes: dict[str, sass.Code]) -> Callable[..., float]:
    """Returns what counts the instructions of a primitive of the ``cuda`` backend."""

    def count(primitive: str, arguments: tuple[Any, ...]) -> float:
        if primitive == "low_rank_pass":
            rows, _, u, _, product, _ = arguments
            rank = (u if product is None else product).shape[-1]
            code = codes[primitive]
            loop = max(code.loops, key=lambda loop: loop.wide_loads)
            groups = -(-rank // 3)  # of ranks; each reads the rows
            trips = groups * rows.numel() * rows.element_size() / (loop.wide_loads * THREAD_BYTES)
            return trips * loop.instructions
        if primitive == "low_rank_expand":
            u, *_, out = arguments
            code = codes[primitive]
            loop = max(code.loops, key=lambda loop: loop.arithmetic)
            others = code.instructions - sum(loop.instructions for loop in code.loops)
            steps = out.numel() / (4 * 256)  # tokens and features of a warp
            return steps * (u.shape[-1] * loop.instructions + others)
        return 0.0

    return count


class TritonInstructions:
    """Counts the instructions of the launches of the ``triton`` backend."""

    def __init__(self) -> None:
        import triton

        os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
        triton.runtime.driver.set_active(triton_resources.AbsentCard(CAPABILITY))
        capability = divmod(CAPABILITY, 10)
        self.primitives = TritonPrimitives(self._launch, lambda device: capability)
        self._last = 0.0

    def __call__(self, primitive: str, arguments: tuple[Any, ...]) -> float:
        if primitive not in ("low_rank_pass", "low_rank_expand"):
            return 0.0
        getattr(self.primitives, primitive)(*arguments)
        return self._last

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any):
        compiled = kernel.warmup(*arguments, grid=grid, **constants)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(compiled.asm["cubin"])
            (code,) = sass.kernels(sass.listing(triton_resources.cuobjdump(), file))
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        if "span" in named:
            trips = -(-named["span"] // named["COLUMNS"])
        else:
            trips = named["RANK"] // named.get("BLOCK", named["RANK"])
        in_loops = sum(loop.instructions for loop in code.loops)
        of_warp = code.instructions + (trips - 1) * in_loops
        programs = torch.Size(grid).numel()
        self._last = float(programs * constants["num_warps"] * of_warp)


class Estimator(layer_bytes.Counter):
    """Primitives that compute nothing and estimate each launch."""

    def __init__(self, sizes: Any, instructions: Callable[..., float]) -> None:
        super().__init__(sizes)
        self.estimates: list[Estimate] = []
        self._instructions = instructions

    def __getattr__(self, primitive: str):
        count = super().__getattr__(primitive)

        def estimate(*arguments: Any) -> None:
            count(*arguments)
            self._add(self._instructions(primitive, arguments))

        return estimate

    def reduce_gradients(self, *arguments: Any) -> None:
        super().reduce_gradients(*arguments)
        self._add(0.0)

    def _add(self, instructions: float) -> None:
        launch = self.launches[-1]
        self.estimates.append(Estimate(launch.kernel, launch.read + launch.written, instructions))


def main() -> int:
    """Prints the table; returns 1 if an estimate is beyond its budget."""
    of_cuda, of_triton = cuda_instructions(cuda_codes()), TritonInstructions()
    sizes = layer_bytes.backends()
    late = 0
    print("| r | work | backend | µs by launch: bytes, instructions | estimate µs | budget µs |")
    print("|---|---|---|---|---|---|")
    for rank in RANKS:
        operands = launches.Operands(cases.HUGE_BATCH, rank, torch.bfloat16)
        backend = "triton" if rank >= MANY_RANKS else "cuda"
        for work in WORKS:
            counted = of_triton if backend == "triton" else of_cuda
            estimator = Estimator(sizes.get(backend, sizes["triton"]), counted)
            launches.WORKS[work](estimator, operands)
            of_launches = " · ".join(
                f"{e.kernel} {1e6 * e.bytes / BANDWIDTH:.1f}, "
                f"{1e6 * e.instructions / ISSUED:.1f}" if e.instructions
                else f"{e.kernel} {1e6 * e.bytes / BANDWIDTH:.1f}"
                for e in estimator.estimates
            )  # fmt: skip
            estimate = sum(e.seconds for e in estimator.estimates)
            budget = 2 * sum(e.bytes for e in estimator.estimates) / BANDWIDTH
            late += estimate > budget
            print(
                f"| {rank} | {work} | {backend} | {of_launches} "
                f"| {1e6 * estimate:.1f} | {1e6 * budget:.1f} |"
            )
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
