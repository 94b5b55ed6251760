"""What ``make gpu-check`` times: the launches, the layer, the cell and attention, on the device."""

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

import naslora_kernels
from bench import attention, cases, timing
from bench.gpu import launch_times

SECONDS = 105  # for all of it; what is left then is reported as not measured
DTYPES = (torch.bfloat16, torch.float32)
# The most important first. The same holds for the kinds and the dtypes.
CASES = (
    (cases.HUGE_BATCH, 3),
    (cases.HUGE, 3),
    (cases.HUGE_GLOBAL, 3),
    (cases.TINY, 3),
    (cases.HUGE, 24),
)
REHEARSED = cases.Shape("rehearsed", (1, 3, 4), 32, 48)
# Compiling takes some ten seconds a candidate, so it is measured last and here alone.
COMPILED = ((cases.HUGE, 3), torch.bfloat16)
ATTENTION_CASES = ((cases.HUGE_GLOBAL, 16), (cases.HUGE, 16), (cases.SMALL, 12))  # and heads
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

    def setting(self, arguments: argparse.Namespace, case: Case, dtype: torch.dtype):
        """How a case is measured; flex_attention is compiled, so it takes part in one alone."""
        fused = kernels(arguments, self.name)
        return cases.Setting(arguments.device, dtype, fused, case == ATTENTION_CASES[0])


KINDS = (
    Kind("layer", CASES, cases.case_name, cases.layer_works, cases.layer_bytes),
    Kind("cell", CASES, cases.case_name, cases.cell_works, cases.cell_bytes),
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
Result = dict[str, Any]
Save = Callable[[Result], None]  # what a step has found so far


def kernels(arguments: argparse.Namespace, kind: str) -> tuple[str, ...]:
    """The fused backends that serve the device and the kind of work."""
    on_cpu = arguments.device == "cpu" and not arguments.rehearse
    candidates = ("cpp",) if on_cpu else ("cuda", "triton")
    reasons = naslora_kernels.available_backends()
    usable = tuple(name for name in candidates if reasons[name] is None)
    return tuple(name for name in usable if (kind, name) != ("attention", "cuda"))


def measure_kernels(arguments: argparse.Namespace, save: Save) -> Result:
    """Times every launch, then every case, forward and forward + backward, in every mode.

    The rows are saved case by case.
    """
    result: Result = {"passed": True, "summary": "", "problems": [], "notes": [], "rows": []}
    bandwidth = copy_bandwidth(arguments.device)
    deadline = time.perf_counter() + SECONDS
    for name, measure in measurements(arguments, bandwidth):
        if arguments.only not in name:
            continue
        if time.perf_counter() > deadline:
            result["problems"].append(f"{name}: not measured, the step's time was over")
        else:
            try:
                measure(name, result)
            except Exception as error:  # the device's have no common class
                reason = (str(error).splitlines() or [""])[0]
                result["problems"].append(f"{name}: {type(error).__name__}: {reason}")
        result["passed"] = not result["problems"] and bool(result["rows"])
        save(result)
    return result


Measurement = tuple[str, Callable[[str, Result], None]]


def measurements(arguments: argparse.Namespace, bandwidth: float) -> list[Measurement]:
    """What is to be measured, the most important first, as functions that add to a result."""
    found: list[Measurement] = []
    rounds = range(max(len(kind.cases) for kind in KINDS))
    for dtype, i, kind in itertools.product(DTYPES, rounds, KINDS):
        if i < len(kind.cases) and dtype in kind.dtypes:
            case = kind.cases[i] if not arguments.rehearse else (REHEARSED, kind.cases[i][1])
            measure = partial(measure_case, arguments, kind, case, dtype, False, bandwidth)
            found.append((case_title(kind, case, dtype), measure))
    launched = [(cases.HUGE_BATCH, 3), (cases.HUGE_BATCH, 24), (cases.TINY, 3)]
    if arguments.rehearse:  # one case of each kind, and one of the launches
        found, launched = found[: len(KINDS)], [(REHEARSED, 3)]
    else:
        for kind in KINDS[:2]:
            measure = partial(measure_case, arguments, kind, *COMPILED, True, bandwidth)
            found.append((case_title(kind, *COMPILED), measure))
    for case in launched if arguments.device != "cpu" or arguments.rehearse else ():
        measure = partial(measure_launches, arguments, case, bandwidth)
        found.insert(2, (f"launches {cases.case_name(case)}", measure))
    return found


def case_title(kind: Kind, case: Case, dtype: torch.dtype) -> str:
    return f"{kind.name} {kind.case_name(case)} {str(dtype).removeprefix('torch.')}"


def measure_case(
    arguments: argparse.Namespace,
    kind: Kind,
    case: Case,
    dtype: torch.dtype,
    compiled: bool,
    bandwidth: float,
    name: str,
    result: Result,
) -> None:
    """Times a case after the gate has passed it; adds rows, problems and notes to ``result``."""
    setting = kind.setting(arguments, case, dtype)
    works = kind.works(*case, setting)
    refusal = cases.gate(works, setting, kind.judge)
    if refusal is not None:
        result["problems"].append(f"{name}: not timed, {refusal}")
        return
    works.pop(attention.EXACT, None)
    left_out = leave_out_failing(works, setting.kernels)
    result["notes"] += [f"{name}: {note}" for note in left_out]
    for direction in ("forward", "both"):
        functions = modes(works, direction, arguments.device, compiled)
        seconds = interleave(functions, arguments.rounds, arguments.device)
        moved = kind.least_bytes(*case, direction, setting)
        result["rows"] += [
            _row(name, direction, mode, seconds[mode], moved, bandwidth) for mode in functions
        ]


def measure_launches(
    arguments: argparse.Namespace, case: Case, bandwidth: float, name: str, result: Result
) -> None:
    """Times each launch of a layer by ``triton`` by itself."""
    if "triton" not in kernels(arguments, "layer"):
        return
    for work, calls in launch_times.calls(case, arguments.device).items():
        seconds = interleave(
            {call.name: call.run for call in calls}, arguments.rounds, arguments.device
        )
        for call in calls:
            row = _row(name, work, f"triton: {call.name}", seconds[call.name], call.bytes, 0)
            times = timing.Times.of(seconds[call.name])
            row["of_copy_bandwidth"] = round(call.bytes / times.p50 / bandwidth, 3)
            result["rows"].append(row)


def leave_out_failing(works: dict[str, cases.Work], ours: tuple[str, ...]) -> list[str]:
    """Removes candidates that this version of torch cannot run here; a note on each."""
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
    """Each candidate compiled where asked for, else eager and on a GPU as a CUDA graph."""
    functions: dict[str, Callable[[], object]] = {}
    for candidate, work in works.items():
        if compiled:
            compute = torch.compile(work.compute, dynamic=False)
            compiled_work = cases.Work(compute, work.leaves, work.gradient)
            functions[f"{candidate}, compiled"] = compiled_work.function(direction)
            continue
        functions[candidate] = work.function(direction)
        if device != "cpu":
            functions[f"{candidate}, CUDA graph"] = graphed(work.function(direction))
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
