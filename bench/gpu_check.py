"""Everything that needs a GPU, in one command: ``make gpu-check``, in twelve minutes at most.

It needs torch and pytest, and Triton for that backend. What needs another package is left out, and
the report says so. The steps, in this order:

    build       builds the extensions in place, CUDA for this card alone
    contact     driver, clocks, power limit, MIG, compilers; one launch of each backend on each GPU
    cuda        the tests of the CUDA kernels on the device
    triton      the tests of the Triton kernels on the device
    sanitizer   tests of both under compute-sanitizer
    behaviour   equal bits over repeats, streams, CUDA graphs and devices; errors beside SDPA's
    kernels     the time of each launch; of the layer, the cell and attention, eager and as a
                CUDA graph, beside PEFT's LoRA, the frozen linear and torch's own attention
    sweep       each launch of attention, with what it takes of the card, for other tiles

A test that fails is named with its first error, and run again by itself with CUDA_LAUNCH_BLOCKING.
It writes ``gpu_check.json`` and ``gpu_check.md`` after every result, and an archive of them and the
logs at the end. A step that runs out of time has failed only if a test has: the first run compiles.
It exits with status 1 if a step failed.

``--rehearse`` runs all of that without a GPU: CUDA emulated, Triton interpreted, on tiny maps.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

import naslora_kernels
from bench import cases
from bench.gpu import behaviour, kernels, sweep
from bench.gpu.kernels import Result, Save
from bench.gpu.resources import markdown
from naslora_kernels.cuda import EMULATION_VARIABLE

ROUNDS = 40
# Seconds that each step may take: twelve minutes in all.
LIMITS = {"build": 60, "contact": 60, "cuda": 45, "triton": 120, "sanitizer": 120, "behaviour": 60}
LIMITS |= {"kernels": kernels.SECONDS, "sweep": sweep.SECONDS}
RERUN = 5  # tests that are run again by themselves
# A line for each test, so that a step that ran out of time says what had passed.
PYTEST = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider"]
PRIMITIVES = "tests/test_cuda_primitives.py"
KERNELS = [f"tests/test_kernels_{of}.py" for of in ("functions", "cell", "layer", "folded", "ops")]
TESTS = {"cuda": [PRIMITIVES, *KERNELS], "triton": [*KERNELS, "tests/test_kernels_attention.py"]}
FEW = "not random and not gradcheck and (float32 or bfloat16)"
WATCHED = (  # backend, tool, names of kernels, tests
    ("cuda", "memcheck", "kns=naslora", (PRIMITIVES, "-k", "float32 or bfloat16")),
    ("cuda", "racecheck", "kns=naslora", (PRIMITIVES, "-k", "float32 or bfloat16")),
    ("triton", "memcheck", "kns=_kernel", (*TESTS["triton"][2::3], "-k", f"triton and {FEW}")),
)


def main() -> int:
    """Runs the steps that were asked for; returns 1 if one failed."""
    arguments = parse_arguments()
    if arguments.rehearse:
        rehearse(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        arguments.steps = ["contact"]  # says why, and what else there is
    record: dict[str, Result] = {}
    steps = {
        "build": build,
        "contact": make_contact,
        "cuda": partial(run_tests, backend="cuda"),
        "triton": partial(run_tests, backend="triton"),
        "sanitizer": run_sanitizer,
        "behaviour": behaviour.check_behaviour,
        "kernels": kernels.measure_kernels,
        "sweep": sweep.measure_sweep,
    }
    for name in arguments.steps:
        started = time.perf_counter()
        print(f"gpu-check: {name}", flush=True)

        def save(result: Result, name: str = name, started: float = started) -> None:
            record[name] = {**result, "seconds": round(time.perf_counter() - started, 1)}
            write(arguments.output, record)

        if name not in ("build", "contact") and "environment" not in record:
            record["environment"] = cases.environment(arguments.device)  # of what was built
        save({"passed": False, "summary": "it did not end"})
        save(steps[name](arguments, save))
    print(table(record))
    archive = shutil.make_archive(str(arguments.output), "gztar", arguments.output)
    print(f"gpu-check: {archive} holds the report and the logs, to be sent as it is")
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


def build(arguments: argparse.Namespace, save: Save) -> Result:
    """Builds the extensions. A rehearsal has built the emulation."""
    if arguments.device == "cpu":
        return {"passed": True, "summary": "left out: there is no GPU"}
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", capability)
    # Any version of setuptools serves, because pyproject.toml is not read.
    program = """
from setuptools import Distribution
from bench.gpu.cuda_resources import load_setup
setup = load_setup()
builder = setup.BuildKernels(Distribution({"ext_modules": setup.extensions()}))
builder.inplace = True
builder.ensure_finalized()
builder.run()
"""
    return _run([sys.executable, "-c", program], LIMITS["build"], arguments.output, "build")


def make_contact(arguments: argparse.Namespace, save: Save) -> Result:
    """Probes every backend on every device, in a process of its own."""
    result = _run([sys.executable, "-m", "bench.gpu.contact"], LIMITS["contact"], arguments.output)
    if not result["passed"]:
        return result
    found = json.loads(result["summary"])
    if arguments.rehearse:  # there is none
        found["notes"] += found.pop("problems")
    return {"passed": not found.get("problems"), "summary": "", **found}


# ---- Tests -----------------------------------------------------------------------------------


def run_tests(arguments: argparse.Namespace, save: Save, backend: str) -> Result:
    """The tests of a backend's kernels on the device; files side by side, because Triton compiles.

    A note gives the first error of each test that fails, and what it does by itself.
    """
    if unusable := _unusable(backend):
        return unusable
    selection = backend
    if arguments.rehearse:
        selection += " and not random and not gradcheck and (float32 or partial or infinity)"
    run = partial(_run, limit=LIMITS[backend], folder=arguments.output)
    with ThreadPoolExecutor(1 if arguments.rehearse else None) as pool:
        jobs = {
            file: pool.submit(run, [*PYTEST, "-k", selection, file], name=f"{backend}-{i}")
            for i, file in enumerate(TESTS[backend])
        }
    joined = _joined({file: job.result() for file, job in jobs.items()})
    logs = sorted(arguments.output.glob(f"{backend}-*.log"))
    failed = failures("".join(log.read_text(errors="replace") for log in logs))
    for number, (test, error) in enumerate(failed.items()):
        joined["notes"].append(f"{test}: {error}")
        if number < RERUN:
            log = f"alone-{backend}-{number}"
            alone = run([*PYTEST, test], limit=60, name=log, CUDA_LAUNCH_BLOCKING="1")
            joined["notes"][-1] += f"; by itself, with launches waited for: {alone['summary']}"
    return joined


def failures(printed: str) -> dict[str, str]:
    """The first error of each test that failed, by pytest's output, which may have been cut."""
    names = re.findall(r"^(\S+::\S+) (?:FAILED|ERROR)\b", printed, re.MULTILINE)
    errors = re.findall(r"^(?:FAILED|ERROR) (\S+::\S+) - (.*)$", printed, re.MULTILINE)
    return {**dict.fromkeys(names, "stopped before its error was printed"), **dict(errors)}


def _unusable(backend: str) -> Result | None:
    """The result of a step whose backend cannot be used, or None. The first steps say what of that
    is a failure."""
    reason = naslora_kernels.available_backends()[backend]
    return {"passed": True, "summary": f"left out: {reason}"} if reason else None


def _joined(results: Mapping[str, Result]) -> Result:
    problems = [f"{name}: {result['summary']}" for name, result in results.items()]
    return {"passed": all(r["passed"] for r in results.values()), "summary": "", "notes": problems}


def run_sanitizer(arguments: argparse.Namespace, save: Save) -> Result:
    """Tests under compute-sanitizer, which watches our kernels alone: the CUDA primitives by two
    tools, Triton's kernels by memcheck.

    Without a cache each tensor is an allocation of its own, so that reads beyond it are found.
    """
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not arguments.rehearse and not Path(program).exists():
        return {"passed": True, "summary": "left out: compute-sanitizer was not found"}
    results: dict[str, Result] = {}
    limit = LIMITS["sanitizer"] // len(WATCHED)
    for backend, tool, kernel, chosen in WATCHED[:: 2 if arguments.rehearse else 1]:
        watch = [program, "--tool", tool, "--kernel-regex", kernel, "--error-exitcode", "9"]
        command = [*([] if arguments.rehearse else watch), *PYTEST, "-x", *chosen]
        name, memory = f"{tool}-{backend}", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run = partial(_run, command, limit, arguments.output, name, **memory)
        results[name] = _unusable(backend) or run()
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
            "passed": passed > 0 and not failed,  # the first run compiles
            "summary": f"stopped after {limit} s, its time: {passed} passed, {failed} failed; "
            f"last: {lines[-1]}",
        }
    if status:
        print("\n".join(lines[-40:]), file=sys.stderr)
    return {"passed": status == 0, "summary": lines[-1].strip("= ")}


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
    order = ("work", "direction", "mode", "p20_us", "p50_us", "p80_us", "of_copy_bandwidth")
    order += ("TFLOP_per_s", "regs", "spills", "shared")
    keys = [key for key in order if any(row.get(key) is not None for row in rows)]
    cells = [["" if row.get(key) is None else row[key] for key in keys] for row in rows]
    return ["", markdown([key.replace("_", " ") for key in keys], cells)]


if __name__ == "__main__":
    sys.exit(main())
