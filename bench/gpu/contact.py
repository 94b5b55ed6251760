"""What the GPUs of this machine say of themselves, and whether each backend can launch on each.

    python -m bench.gpu.contact

Prints JSON: lists of lines, ``problems`` and ``notes``. It is a process of its own because a launch
that fails may leave the device unusable.
"""

import importlib.util
import json
import re
import subprocess
import sysconfig
from pathlib import Path

import torch

from naslora_kernels import backends

SMI = "driver_version,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
LARGE = 24  # GiB, in which every case fits


def version(*command: str) -> str:
    """The first line with a version that a command prints, or why it cannot run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    found = re.search(r".*\d\.\d.*", result.stdout)
    return found.group() if found else (result.stdout + result.stderr).strip()


def environment() -> list[str]:
    """Driver, clocks, power limit, MIG, and what compiles kernels here."""
    triton = importlib.util.find_spec("triton")
    tools = Path(triton.origin).with_name("backends") / "nvidia" / "bin" if triton else Path("none")
    compilers = ["nvcc", "gcc", *map(str, sorted(tools.glob("ptxas*")))]
    header = Path(sysconfig.get_path("include"), "Python.h")
    return [
        f"torch {torch.__version__} for CUDA {torch.version.cuda}",
        f"{SMI}: {version('nvidia-smi', f'--query-gpu={SMI}', '--format=csv,noheader')}",
        *(f"{Path(name).name}: {version(name, '--version')}" for name in compilers),
        f"{header} is {'there' if header.exists() else 'missing'}",
    ]


def inspect() -> dict[str, list[str]]:
    """Probes every backend on every device."""
    problems: list[str] = []
    notes = environment()
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
            why = "it finds no device"
        except Exception as error:  # torch's and the driver's have no common class
            why = str(error).splitlines()[0]
        problems.append(f"torch sees no GPU: {why}")
    for index in range(torch.cuda.device_count() if not problems else 0):
        device, card = torch.device("cuda", index), torch.cuda.get_device_properties(index)
        memory = card.total_memory / 2**30
        about = f"capability {card.major}.{card.minor}, {card.multi_processor_count} processors"
        notes.append(f"{device}: {card.name}, {about}, {memory:.1f} GiB")
        if "MIG" in card.name:
            notes.append(f"{device} is a MIG slice: its times are not those of the whole card")
        elif memory < LARGE:
            notes.append(f"{device} is a small card: cases that do not fit are left out")
        for name in backends.GPU_BACKENDS:
            missing = backends._unavailable_reason(name)
            if failure := missing or backends.probe(name, device):
                lines = notes if missing else problems
                lines.append(f"{name} on {device}: {failure}; the next backend is used")
    return {"problems": problems, "notes": notes}


if __name__ == "__main__":
    print(json.dumps(inspect()))
