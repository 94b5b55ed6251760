"""Everything that needs a GPU, in one command: ``make gpu-check``, in eight minutes at most.

The test suite on the device, then the kernels' tests under compute-sanitizer, then the benchmarks:
the cell and the layer, eager, compiled and as a CUDA graph, against PEFT's LoRA and the frozen
linear; attention, against torch's own; a training step and inference of whole models. It leaves
``gpu_check.json`` and ``gpu_check.md``, and ends with status 1 if a test, the sanitizer or the
correctness gate failed. A step that runs out of time is reported as such.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import naslora_kernels
from bench import attention, cases, timing

ROUNDS = 40
# Seconds that each step may take: with a minute of building, eight minutes.
LIMITS = {"suite": 180, "sanitizer": 75, "kernels": 90, "models": 75}
DTYPES = (torch.bfloat16, torch.float32)
# A batch of one and of four images of 1024 x 1024 pixels; ViT-H is the paper's encoder.
BATCH = cases.Shape("vit_h windows, 4 images", (100, 14, 14), 1280, 3840)
GLOBAL = cases.Shape("vit_h global", (1, 64, 64), 1280, 3840)
CASES = ((cases.HUGE, 3), (cases.HUGE, 24), (BATCH, 3), (GLOBAL, 3), (cases.TINY, 3))
# Compiling takes some ten seconds a competitor, so it is measured here alone.
COMPILED = ((cases.HUGE, 3), torch.bfloat16)
ATTENTION_CASES = ((GLOBAL, 16), (cases.HUGE, 16), (cases.SMALL, 12))  # and heads
Case = tuple[cases.Shape, int]


class Kind(NamedTuple):
    """What is measured of one kind of work."""

    name: str
    cases: tuple[Case, ...]
    case_name: Callable[..., str]
    works: Callable[..., dict[str, cases.Work]]
    least_bytes: Callable[..., int]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    judge: str = "reference"
    """The work that the kernels are held against."""

    def setting(self, device: str, case: Case, dtype: torch.dtype) -> cases.Setting:
        """How a case is measured; flex_attention is compiled, so it takes part in one alone."""
        return cases.Setting(device, dtype, kernels(device, self.name), case == ATTENTION_CASES[0])


KINDS = (
    Kind("cell", CASES, cases.case_name, cases.cell_works, cases.cell_bytes),
    Kind("layer", CASES, cases.case_name, cases.layer_works, cases.layer_bytes),
    Kind(
        "attention",
        ATTENTION_CASES,
        attention.case_name,
        attention.operator_works,
        attention.least_bytes,
        dtypes=DTYPES[:1],
        judge=attention.EXACT,
    ),
)
KERNEL_TESTS = ["tests/test_kernels_cell.py", "tests/test_kernels_layer.py"]
SANITIZER_TOOLS = ("memcheck", "racecheck")
MODEL_BENCHMARKS = ("bench/test_training_step.py", "bench/test_inference.py")


def main() -> int:
    """Runs the steps that were asked for; returns 1 if one failed."""
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU here", file=sys.stderr)
        return 1
    record = {"environment": environment(arguments.device)}
    steps = {
        "suite": run_suite,
        "sanitizer": run_sanitizer,
        "kernels": measure_kernels,
        "models": measure_models,
    }
    for name in arguments.steps:
        started = time.perf_counter()
        print(f"gpu-check: {name}", flush=True)
        record[name] = steps[name](arguments)
        record[name]["seconds"] = round(time.perf_counter() - started, 1)
        # After every step, so that a run cut short leaves what it has.
        (arguments.output / "gpu_check.json").write_text(json.dumps(record, indent=1) + "\n")
        (arguments.output / "gpu_check.md").write_text(table(record))
    print(table(record))
    return 0 if all(record[name]["passed"] for name in arguments.steps) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--output", type=Path, default=Path("build/gpu-check"))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measurements of each")
    parser.add_argument("--device", default="cuda", help="cpu: try the benchmarks without a GPU")
    parser.add_argument("--only", default="", help="part of a case's name, e.g. 'tiny_vit r=3'")
    return parser.parse_args()


def environment(device: str) -> dict[str, object]:
    """The card and its measured copy bandwidth, versions, commit, and the usable backends."""
    bandwidth = copy_bandwidth(device)
    backends = naslora_kernels.available_backends()
    return {
        **cases.environment(device),
        "cuda": torch.version.cuda,
        "copy_bandwidth_GB_per_s": round(bandwidth / 1e9, 1),
        "backends": backends,
    }


def kernels(device: str, kind: str) -> tuple[str, ...]:
    """The fused backends that serve the device and the kind of work."""
    candidates = ("cpp",) if device == "cpu" else ("cuda", "triton")
    reasons = naslora_kernels.available_backends()
    usable = tuple(name for name in candidates if reasons[name] is None)
    return tuple(name for name in usable if (kind, name) != ("attention", "cuda"))


# ---- Tests -----------------------------------------------------------------------------------


def run_suite(arguments: argparse.Namespace) -> dict[str, object]:
    """The whole test suite; kernel tests run on the device."""
    return _run([sys.executable, "-m", "pytest", "-q", "tests"], LIMITS["suite"])


def run_sanitizer(arguments: argparse.Namespace) -> dict[str, object]:
    """The CUDA kernels' comparisons with the reference, under compute-sanitizer."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return {"passed": False, "summary": "compute-sanitizer was not found"}
    results = {}
    selection = ["-k", "test_matches_reference and cuda and float32"]
    for tool in SANITIZER_TOOLS:
        pytest = [sys.executable, "-m", "pytest", "-q", "-x", *KERNEL_TESTS, *selection]
        command = [program, "--tool", tool, "--error-exitcode", "9", *pytest]
        results[tool] = _run(command, LIMITS["sanitizer"] // len(SANITIZER_TOOLS))
    summary = "; ".join(f"{tool}: {result['summary']}" for tool, result in results.items())
    return {"passed": all(result["passed"] for result in results.values()), "summary": summary}


def _run(command: list[str], limit: int) -> dict[str, object]:
    """A command's success and the last line that it printed."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"stopped after {limit} s, its time"}
    lines = (result.stdout + result.stderr).strip().splitlines() or ["printed nothing"]
    if result.returncode:
        print("\n".join(lines[-40:]), file=sys.stderr)
    return {"passed": result.returncode == 0, "summary": lines[-1].strip("= ")}


# ---- Kernels ---------------------------------------------------------------------------------


def measure_kernels(arguments: argparse.Namespace) -> dict[str, object]:
    """Times every case, forward and forward + backward, in every mode that serves it."""
    rows, problems, notes = [], [], []
    bandwidth = copy_bandwidth(arguments.device)
    deadline = time.perf_counter() + LIMITS["kernels"]
    for kind in KINDS:
        for case, dtype in itertools.product(kind.cases, kind.dtypes):
            name = f"{kind.name} {kind.case_name(case)} {str(dtype).removeprefix('torch.')}"
            if arguments.only not in name:
                continue
            if time.perf_counter() > deadline:
                problems.append(f"{name}: not measured, the step's time was over")
                continue
            setting = kind.setting(arguments.device, case, dtype)
            works = kind.works(*case, setting)
            refusal = cases.gate(works, setting, kind.judge)
            if refusal is not None:
                problems.append(f"{name}: not timed, {refusal}")
                continue
            works.pop(attention.EXACT, None)
            notes += [f"{name}: {note}" for note in leave_out_failing(works, setting.kernels)]
            for direction in ("forward", "both"):
                compiled = (case, dtype) == COMPILED
                functions = modes(works, direction, arguments.device, compiled)
                seconds = interleave(functions, arguments.rounds, arguments.device)
                moved = kind.least_bytes(*case, direction, setting)
                rows += [_row(name, direction, m, seconds[m], moved, bandwidth) for m in functions]
    passed = not problems and bool(rows)
    return {"passed": passed, "problems": problems, "notes": notes, "rows": rows}


def leave_out_failing(works: dict[str, cases.Work], ours: tuple[str, ...]) -> list[str]:
    """Removes competitors that this version of torch cannot run here; a note on each."""
    notes = []
    for name in works.keys() - {*ours}:
        try:
            works[name].both()
        except Exception as error:  # the compiler's have no common class
            reason = (str(error).splitlines() or [""])[0]
            notes.append(f"{name} is left out, {type(error).__name__}: {reason}")
            del works[name]
    return notes


def modes(
    works: dict[str, cases.Work], direction: str, device: str, compiled: bool
) -> dict[str, Callable[[], object]]:
    """Each competitor eager, compiled where asked for, and on a GPU as a CUDA graph."""
    functions: dict[str, Callable[[], object]] = {}
    for competitor, work in works.items():
        functions[competitor] = work.function(direction)
        if compiled:
            compute = torch.compile(work.compute, dynamic=False)
            compiled_work = cases.Work(compute, work.leaves, work.gradient)
            functions[f"{competitor}, compiled"] = compiled_work.function(direction)
        if device != "cpu":
            functions[f"{competitor}, CUDA graph"] = graphed(work.function(direction))
    return functions


def graphed(function: Callable[[], object]) -> Callable[[], object]:
    """The launches of ``function`` as one CUDA graph; how to replay it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()

    def replay() -> object:
        graph.replay()
        return outputs  # the graph's own memory, which has to stay

    return replay


def interleave(
    functions: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds per call of each function, all in turn in every round; on a GPU by its own clock."""
    if device == "cpu":
        return timing.interleave(functions, rounds)
    repeats = 10
    for function in functions.values():
        for _ in range(3):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(repeats):
                function()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / repeats)
    return seconds


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a copy of a large tensor reads and writes."""
    if device == "cpu":
        return timing.copy_bandwidth()
    source = torch.ones(2**28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    copies = interleave({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    return 2 * 4 * source.numel() / timing.Times.of(copies).p50


def _row(
    name: str, direction: str, mode: str, seconds: list[float], moved: int, bandwidth: float
) -> dict[str, object]:
    times = timing.Times.of(seconds)
    fused = mode.split(",")[0] in naslora_kernels.available_backends() and "reference" not in mode
    return {
        "work": name,
        "direction": direction,
        "mode": mode,
        **{f"{cut}_us": round(1e6 * getattr(times, cut), 2) for cut in ("p20", "p50", "p80")},
        "least_bytes": moved,
        # A layer's time holds the frozen product too, so this says something of cells alone.
        "of_copy_bandwidth": round(moved / times.p50 / bandwidth, 3)
        if fused and name.startswith("cell")
        else None,
    }


# ---- Whole models ----------------------------------------------------------------------------


def measure_models(arguments: argparse.Namespace) -> dict[str, object]:
    """Training steps and inference, by the other benchmarks at their sizes for the device."""
    written = arguments.output / "models.json"
    command = [sys.executable, "-m", "pytest", "-q", *MODEL_BENCHMARKS, "--benchmark-only"]
    result = _run([*command, f"--benchmark-json={written}"], LIMITS["models"])
    rows = []
    if written.is_file() and written.stat().st_size:
        for benchmark in json.loads(written.read_text())["benchmarks"]:
            data = sorted(benchmark["stats"].get("data") or [benchmark["stats"]["median"]] * 2)
            times = timing.Times.of(data)
            cuts = {
                f"{cut}_us": round(1e6 * getattr(times, cut), 1) for cut in ("p20", "p50", "p80")
            }
            rows.append({"work": benchmark["group"], "mode": benchmark["name"], **cuts})
    return {**result, "rows": rows}


# ---- The table -------------------------------------------------------------------------------


def table(record: dict) -> str:
    """The record as Markdown."""
    lines = ["# gpu-check", ""]
    lines += [f"- {name}: {value}" for name, value in record["environment"].items()]
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
