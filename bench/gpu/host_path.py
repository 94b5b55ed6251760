"""Times what a layer costs the processor of the host: everything but the kernels themselves.

    python -m bench.gpu.host_path

Runs the layer of the ``cuda`` backend, forward and backward, on a map so small that nothing else
counts. The launches do nothing. Beside it run the operators of plain LoRA on the same map. They
take turns. The clock is the process's own, which stands while another process runs. Prints
Markdown. Exits with status 1 if ours takes more than ``MOST`` times as long.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench import cases, timing

SHAPE = cases.Shape("one window of 2 x 2", (1, 2, 2), 8, 8)
RANK = 3
ROUNDS = 60
MOST = 1.15  # times the operators of plain LoRA


def works() -> dict[str, Callable[[], object]]:
    """The forward and the backward of both, by name."""
    # The extension that the emulation builds has the same code around its kernels.
    build = [sys.executable, "tests/cuda_emulation.py"]
    emulation = subprocess.run(build, capture_output=True, text=True, check=True).stdout.strip()
    os.environ["NASLORA_CUDA_EMULATION"] = emulation
    from naslora_kernels import checks, cuda

    cuda._CUDA.idle(True)
    checks._stalls_when_read = lambda tensor: True  # as on a GPU, where channels are read once
    torch.manual_seed(0)
    setting = cases.Setting(kernels=("cuda",))
    ours = cases.layer_works(SHAPE, RANK, setting)["cuda"]
    x, A, B = ours.leaves[:3]
    linear = torch.nn.Linear(SHAPE.c_in, SHAPE.c_out).requires_grad_(False)

    def lora() -> torch.Tensor:
        return F.linear(x, linear.weight, linear.bias) + F.linear(F.linear(x, A), B) * cases.SCALING

    plain = cases.Work(lora, [x, A, B], ours.gradient)
    return {"ours": ours.both, "plain LoRA": plain.both, "ours, again": ours.both}


def main() -> int:
    """Prints the medians and their ratio; returns 1 if ours takes longer than it may."""
    torch.set_num_threads(1)
    seconds = timing.interleave(works(), ROUNDS, target=5e-3, clock=time.process_time)
    print("| forward + backward | p20 µs | p50 µs | p80 µs | × plain LoRA |\n|---|---|---|---|---|")
    plain = seconds["plain LoRA"]
    for name, samples in seconds.items():
        cuts = " | ".join(f"{1e6 * cut:.1f}" for cut in timing.Times.of(samples))
        print(f"| {name} | {cuts} | {timing.Times.ratio(samples, plain).p50:.3f} |")
    return 0 if timing.Times.ratio(seconds["ours"], plain).p50 <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
