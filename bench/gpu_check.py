"""Everything that needs a GPU, in one command: ``make gpu-check``, in eight minutes at most.

It needs torch and pytest, and Triton for that backend. What needs another package is left out, and
the report says so. The steps, in this order:

    build       builds the extensions in place, CUDA for this card alone
    cuda        the tests of the CUDA kernels on the device
    triton      the tests of the Triton kernels on the device
    sanitizer   the tests of the CUDA primitives under compute-sanitizer
    kernels     the time of each launch; of the layer, the cell and attention, eager, compiled and
                as a CUDA graph, beside PEFT's LoRA, the frozen linear and torch's own attention
    models      a training step and inference of whole models

It writes ``gpu_check.json`` and ``gpu_check.md`` after every result. A step that runs out of time
keeps its results and is reported as such. It exits with status 1 if a test, the sanitizer or the
correctness gate failed, or if a step ran out of time.

``--rehearse`` runs all of that without a GPU: CUDA emulated, Triton interpreted, on tiny maps.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

import naslora_kernels
from bench import cases, timing
from bench.gpu import kernels
from bench.gpu.cuda_resources import load_setup
from bench.gpu.kernels import Result, Save
from naslora_kernels.cuda import EMULATION_VARIABLE

ROUNDS = 40
# Seconds that each step may take: eight minutes in all.
LIMITS = {"build": 60, "cuda": 45, "triton": 120, "sanitizer": 90}
LIMITS |= {"kernels": kernels.SECONDS, "models": 60}
# A line for each test, so that a step that ran out of time says what had passed.
PYTEST = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider"]
PRIMITIVE_TESTS = "tests/test_cuda_primitives.py"
KERNEL_TESTS = [
    f"tests/test_kernels_{of}.py" for of in ("functions", "cell", "layer", "folded", "ops")
]
TRITON_TESTS = [*KERNEL_TESTS, "tests/test_kernels_attention.py"]
SANITIZER_TOOLS = ("memcheck", "racecheck")
MODEL_BENCHMARKS = ("bench/test_training_step.py", "bench/test_inference.py")
MODEL_METHODS = "nas-pc-lora,lora"
MODEL_PACKAGES = (
    *("segment_anything", "peft", "safetensors", "accelerate", "msgspec", "torchmetrics"),
    "pytest_benchmark",
)


def main() -> int:
    """Runs the steps that were asked for; returns 1 if one failed."""
    arguments = parse_arguments()
    if arguments.rehearse:
        rehearse(arguments)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here", file=sys.stderr)
        return 1
    arguments.output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Result] = {}
    steps = {
        "build": build,
        "cuda": run_cuda_tests,
        "triton": run_triton_tests,
        "sanitizer": run_sanitizer,
        "kernels": kernels.measure_kernels,
        "models": measure_models,
    }
    for name in arguments.steps:
        started = time.perf_counter()
        print(f"gpu-check: {name}", flush=True)

        def save(result: Result, name: str = name, started: float = started) -> None:
            record[name] = {**result, "seconds": round(time.perf_counter() - started, 1)}
            write(arguments.output, record)

        if name != "build" and "environment" not in record:  # it depends on what was built
            record["environment"] = environment(arguments.device)
        save({"passed": False, "summary": "it did not end"})
        save(steps[name](arguments, save))
    print(table(record))
    return 0 if all(record[name]["passed"] for name in arguments.steps) else 1


def write(folder: Path, record: Mapping[str, Result]) -> None:
    """Replaces the report: a run that is cut short leaves the last one whole."""
    texts = {"gpu_check.json": json.dumps(record, indent=1) + "\n", "gpu_check.md": table(record)}
    for name, text in texts.items():
        unfinished = folder / f".{name}"
        unfinished.write_text(text)
        unfinished.replace(folder / name)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--output", type=Path, default=Path("build/gpu-check"))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measurements of each")
    parser.add_argument("--device", default="cuda", help="cpu: try the benchmarks without a GPU")
    parser.add_argument("--only", default="", help="part of a case's name, e.g. 'tiny_vit r=3'")
    parser.add_argument("--rehearse", action="store_true", help="every step, without a GPU")
    return parser.parse_args()


def rehearse(arguments: argparse.Namespace) -> None:
    """Prepares a run on simulated kernels: begins anew with the variables that choose them, which
    the backends read when they are imported."""
    if EMULATION_VARIABLE not in os.environ:
        build = [sys.executable, "tests/cuda_emulation.py"]
        built = subprocess.run(build, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        variables = {"TRITON_INTERPRET": "1", EMULATION_VARIABLE: built}
        command = [sys.executable, "-m", "bench.gpu_check", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **variables})
    arguments.device, arguments.rounds = "cpu", min(arguments.rounds, 2)


def environment(device: str) -> dict[str, object]:
    """The card and its measured copy bandwidth, versions, commit, and the usable backends."""
    triton = importlib.util.find_spec("triton")
    return {
        **cases.environment(device),
        "cuda": torch.version.cuda,
        "triton": None if triton is None else importlib.import_module("triton").__version__,
        "copy_bandwidth_GB_per_s": round(timing.copy_bandwidth(device) / 1e9, 1),
        "backends": naslora_kernels.available_backends(),
    }


def build(arguments: argparse.Namespace, save: Save) -> Result:
    """Builds the extensions. A rehearsal has built the emulation."""
    if arguments.device == "cpu":
        return {"passed": True, "summary": "left out: there is no GPU"}
    command = [sys.executable, "-m", "bench.gpu.build"]
    return _run(command, LIMITS["build"], arguments.output, "build")


# ---- Tests -----------------------------------------------------------------------------------


def run_cuda_tests(arguments: argparse.Namespace, save: Save) -> Result:
    """The tests of the CUDA kernels on the device."""
    return _tests(arguments, "cuda", [PRIMITIVE_TESTS, *KERNEL_TESTS])


def run_triton_tests(arguments: argparse.Namespace, save: Save) -> Result:
    """The tests of the Triton kernels on the device; side by side, because Triton compiles."""
    return _tests(arguments, "triton", TRITON_TESTS)


def _tests(arguments: argparse.Namespace, backend: str, files: Iterable[str]) -> Result:
    unusable = _unusable(backend)
    if unusable is not None:
        return unusable
    selection = backend
    if arguments.rehearse:
        selection += " and not random and not gradcheck and (float32 or partial or infinity)"
    command = [*PYTEST, "-k", selection]
    with ThreadPoolExecutor(1 if arguments.rehearse else None) as pool:
        run = partial(_run, limit=LIMITS[backend], folder=arguments.output)
        results = list(pool.map(lambda file: run([*command, file]), files))
    return _joined(dict(zip(files, results, strict=True)))


def _unusable(backend: str) -> Result | None:
    """The result of a step whose backend cannot be used, or None. It has failed, unless what the
    backend is built from is not installed."""
    reason = naslora_kernels.available_backends()[backend]
    if reason is None:
        return None
    if backend == "triton":
        needed, found = "Triton", importlib.util.find_spec("triton") is not None
    else:
        needed, found = "nvcc", _finds_nvcc()
    if not found:
        return {"passed": True, "summary": f"left out: there is no {needed}"}
    return {"passed": False, "summary": f"{backend} cannot be used: {reason}"}


def _finds_nvcc() -> bool:
    try:
        return load_setup().find_nvcc() is not None
    except ModuleNotFoundError:  # without setuptools nothing can be built
        return False


def _joined(results: Mapping[str, Result]) -> Result:
    problems = [f"{name}: {result['summary']}" for name, result in results.items()]
    return {"passed": all(r["passed"] for r in results.values()), "summary": "", "notes": problems}


def run_sanitizer(arguments: argparse.Namespace, save: Save) -> Result:
    """The tests of the CUDA primitives under compute-sanitizer, which watches our kernels alone.

    Without a cache each tensor is an allocation of its own, so that reads beyond it are found.
    """
    unusable = _unusable("cuda")
    if unusable is not None:
        return unusable
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not arguments.rehearse and not Path(program).exists():
        return {"passed": True, "summary": "left out: compute-sanitizer was not found"}
    limit = LIMITS["sanitizer"] // len(SANITIZER_TOOLS)
    tests = [*PYTEST, "-x", PRIMITIVE_TESTS, "-k", "float32 or bfloat16"]
    results: dict[str, Result] = {}
    for tool in SANITIZER_TOOLS[:1] if arguments.rehearse else SANITIZER_TOOLS:
        watch = [program, "--tool", tool, "--kernel-regex", "kns=naslora", "--error-exitcode", "9"]
        command = tests if arguments.rehearse else [*watch, *tests]
        results[tool] = _run(
            command, limit, arguments.output, tool, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
        save(_joined(results))
    return _joined(results)


def _run(command: list[str], limit: int, folder: Path, name: str = "", **variables: str) -> Result:
    """A command's success and the last line that it printed. Its output goes to a file."""
    log = folder / f"{name or Path(command[-1]).stem}.log"
    environment = {**os.environ, **variables}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)  # and all that it started
            process.wait()
    printed = log.read_text(errors="replace")
    lines = printed.strip().splitlines() or ["printed nothing"]
    if status is None:
        passed, failed = (len(re.findall(rf" {word}\b", printed)) for word in ("PASSED", "FAILED"))
        return {
            "passed": False,
            "summary": f"stopped after {limit} s, its time: {passed} passed, {failed} failed; "
            f"last: {lines[-1]}",
        }
    if status:
        print("\n".join(lines[-40:]), file=sys.stderr)
    return {"passed": status == 0, "summary": lines[-1].strip("= ")}


# ---- Whole models ----------------------------------------------------------------------------


def measure_models(arguments: argparse.Namespace, save: Save) -> Result:
    """A training step, then inference, by the other benchmarks at their sizes for the device."""
    missing = [name for name in MODEL_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return {"passed": True, "summary": f"left out: {', '.join(missing)} is not installed"}
    results: dict[str, Result] = {}
    rows: list[Result] = []
    for file in MODEL_BENCHMARKS:
        written = arguments.output / f"{Path(file).stem}.json"
        options = ["--methods", MODEL_METHODS, "--stock", "lora", "--rounds", "5"]
        timed = ["--benchmark-disable"] if arguments.rehearse else ["--benchmark-only"]
        command = [*PYTEST, *options, *timed, f"--benchmark-json={written}", file]
        limit = LIMITS["models"] // len(MODEL_BENCHMARKS)
        results[file] = _run(command, limit, arguments.output)
        rows += _benchmark_rows(written)
        save({**_joined(results), "rows": rows})
    return {**_joined(results), "rows": rows}


def _benchmark_rows(written: Path) -> list[Result]:
    """The rows of a file that pytest-benchmark wrote, if it did."""
    rows = []
    if written.is_file() and written.stat().st_size:
        for benchmark in json.loads(written.read_text())["benchmarks"]:
            data = sorted(benchmark["stats"].get("data") or [benchmark["stats"]["median"]] * 2)
            times = timing.Times.of(data)
            cuts = {f"{cut}_us": round(1e6 * time, 1) for cut, time in times._asdict().items()}
            rows.append({"work": benchmark["group"], "mode": benchmark["name"], **cuts})
    return rows


# ---- The table -------------------------------------------------------------------------------


def table(record: Mapping[str, Result]) -> str:
    """The record as Markdown."""
    lines = ["# gpu-check", ""]
    lines += [f"- {name}: {value}" for name, value in record.get("environment", {}).items()]
    for name in LIMITS:
        if name in record:
            step = record[name]
            verdict = "passed" if step["passed"] else "FAILED"
            lines += ["", f"## {name}: {verdict} in {step['seconds']} s", ""]
            lines += [step.get("summary", ""), *step.get("problems", []), *step.get("notes", [])]
            lines += _table_of_rows(step.get("rows", []))
    return "\n".join(lines) + "\n"


def _table_of_rows(rows: list[dict]) -> list[str]:
    if not rows:
        return []
    head = ["work", "direction", "mode", "p20 us", "p50 us", "p80 us", "of copy bandwidth"]
    keys = ["work", "direction", "mode", "p20_us", "p50_us", "p80_us", "of_copy_bandwidth"]
    lines = ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = ["" if row.get(key) is None else str(row[key]) for key in keys]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
