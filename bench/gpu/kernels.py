"""What ``make gpu-check`` times: the launches, the layer, the cell and attention, on the device."""

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import naslora_kernels
from bench import attention, cases, timing
from bench.gpu import launches, traffic
from bench.kinds import KINDS, Case, Kind
from naslora_kernels.launches import Primitives
from naslora_kernels.triton.primitives import TritonPrimitives, capability, launch

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
GPU_KINDS = (
    KINDS["layer"]._replace(cases=CASES),
    KINDS["cell"]._replace(cases=CASES),
    KINDS["attention"]._replace(
        cases=ATTENTION_CASES, works=attention.operator_works, judge=attention.EXACT
    ),
)
LAUNCHED = ((cases.HUGE_BATCH, 3), (cases.HUGE_BATCH, 24), (cases.TINY, 3))
Result = dict[str, Any]
Save = Callable[[Result], None]  # what a step has found so far
Measurement = tuple[str, Callable[[str, Result], None]]


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
    result: Result = {"passed": True, "summary": "", "problems": [], "rows": []}
    bandwidth = timing.copy_bandwidth(arguments.device)
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


def measurements(arguments: argparse.Namespace, bandwidth: float) -> list[Measurement]:
    """What is to be measured, the most important first, as functions that add to a result."""
    found: list[Measurement] = []

    def add(kind: Kind, case: Case, dtype: torch.dtype, compiled: bool) -> None:
        title = f"{kind.title(case)} {str(dtype).removeprefix('torch.')}"
        about = kind, case, dtype, compiled, bandwidth
        found.append((title, partial(measure_case, arguments, *about)))

    for dtype, i, kind in itertools.product(DTYPES, range(len(CASES)), GPU_KINDS):
        if i < len(kind.cases) and (kind.name != "attention" or dtype is DTYPES[0]):
            case = kind.cases[i] if not arguments.rehearse else (REHEARSED, kind.cases[i][1])
            add(kind, case, dtype, False)
    if arguments.rehearse:  # one case of each kind, and one of the launches
        del found[len(GPU_KINDS) :]
    else:
        for kind in GPU_KINDS[:2]:
            add(kind, *COMPILED, True)
    launched = ((REHEARSED, 3),) if arguments.rehearse else LAUNCHED
    for case in launched if arguments.device != "cpu" or arguments.rehearse else ():
        measure = partial(measure_launches, arguments, case, bandwidth)
        found.insert(2, (f"launches {case[0].name} r={case[1]}", measure))
    return found


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
    """Times a case after the gate has passed it; adds rows and problems to ``result``."""
    setting = cases.Setting(arguments.device, dtype, kernels(arguments, kind.name))
    works = kind.works(*case, setting)
    refusal = cases.gate(works, setting, kind.judge)
    if refusal is not None:
        result["problems"].append(f"{name}: not timed, {refusal}")
        return
    works.pop(attention.EXACT, None)
    for direction in ("forward", "both"):
        functions = modes(works, direction, arguments.device, compiled)
        moved = kind.least_bytes(*case, direction, setting)
        for mode, seconds in interleave(functions, arguments).items():
            # A layer also takes the time of the frozen product: the bytes tell something of cells.
            tells = mode.split(",")[0] in setting.kernels and kind.name == "cell"
            of = bandwidth if tells else None
            result["rows"].append(_row(name, direction, mode, seconds, moved, of))


class Launcher:
    """Primitives that launch, and keep each launch and its bytes so that it can be repeated."""

    def __init__(self, primitives: Primitives) -> None:
        self.calls: dict[str, tuple[Callable[[], None], int]] = {}
        self._primitives, self._counter = primitives, traffic.Counter(primitives)
        self.factor_partials = primitives.factor_partials
        self.cell_partials = primitives.cell_partials

    def __getattr__(self, primitive: str):
        def record(*arguments) -> None:
            run = partial(getattr(self._primitives, primitive), *arguments)
            run()
            getattr(self._counter, primitive)(*arguments)
            moved = traffic.moved(self._counter.launches[-1:])
            self.calls[f"triton: {len(self.calls) + 1} {primitive}"] = run, moved

        return record


def measure_launches(
    arguments: argparse.Namespace, case: Case, bandwidth: float, name: str, result: Result
) -> None:
    """Times each launch of a layer by ``triton`` by itself, in bfloat16."""
    if "triton" not in kernels(arguments, "layer"):
        return
    operands = launches.Operands(*case, torch.bfloat16, arguments.device)
    for work in ("layer, forward", "layer, backward, weight step"):
        launcher = Launcher(TritonPrimitives(launch, capability))
        launches.WORKS[work](launcher, operands)
        functions = {mode: run for mode, (run, _) in launcher.calls.items()}
        for mode, seconds in interleave(functions, arguments).items():
            moved = launcher.calls[mode][1]
            result["rows"].append(_row(name, work, mode, seconds, moved, bandwidth))


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
    functions: dict[str, Callable[[], object]], arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds per call of each function, all in turn in every round."""
    target = 0.02 if arguments.device == "cpu" else 0.001  # a GPU's clock is finer
    return timing.interleave(functions, arguments.rounds, target, device=arguments.device)


def _row(
    name: str, direction: str, mode: str, seconds: list[float], moved: int, bandwidth: float | None
) -> dict[str, object]:
    times = timing.Times.of(seconds)
    return {
        "work": name,
        "direction": direction,
        "mode": mode,
        **{f"{cut}_us": round(1e6 * time, 2) for cut, time in times._asdict().items()},
        "least_bytes": moved,
        "of_copy_bandwidth": bandwidth and round(moved / times.p50 / bandwidth, 3),
    }
