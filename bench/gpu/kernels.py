"""What ``make gpu-check`` times: the launches, the layer, the cell and attention, on the device."""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

import naslora_kernels
from bench import attention, cases, timing
from bench.gpu import launches, traffic
from bench.kinds import KINDS, Case, Kind
from naslora_kernels.triton.primitives import TritonPrimitives, capability

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


def combinations(
    arguments: argparse.Namespace, of_kinds: dict[str, Sequence[Case]]
) -> Iterator[tuple[str, Kind, Case, cases.Setting]]:
    """Each case in each dtype by each backend, with a title; the smallest one where rehearsed."""
    for kind in (kind for kind in GPU_KINDS if kind.name in of_kinds):
        chosen, dtypes = of_kinds[kind.name], DTYPES
        if arguments.rehearse:
            chosen, dtypes = [(REHEARSED, chosen[0][1])], DTYPES[:1]
        for case, dtype in itertools.product(chosen, dtypes):
            for kernel in kernels(arguments, kind.name):
                title = f"{kernel}, {kind.title(case)}, {str(dtype).removeprefix('torch.')}"
                yield title, kind, case, cases.Setting(arguments.device, dtype, (kernel,))


def measure_kernels(arguments: argparse.Namespace, save: Save) -> Result:
    """Times every launch, then every case, forward and forward + backward, in every mode.

    The rows are saved case by case.
    """
    result: Result = {"passed": True, "summary": "", "problems": [], "notes": [], "rows": []}
    bandwidth = timing.copy_bandwidth(arguments.device)
    result["notes"].append(f"copies reach {bandwidth / 1e9:.1f} GB/s")
    deadline = time.perf_counter() + SECONDS
    for name, measure in measurements(arguments, bandwidth):
        if arguments.only not in name:
            continue
        if time.perf_counter() > deadline:
            result["notes"].append(f"{name}: not measured, the step's time was over")
        else:
            try:
                measure(name, result)
            except torch.OutOfMemoryError:
                result["notes"].append(f"{name}: left out, it does not fit the card's memory")
            except Exception as error:  # the device's have no common class
                result["problems"].append(f"{name}: {told(error)}")
        result["passed"] = not result["problems"] and bool(result["rows"])
        save(result)
    return result


def measurements(arguments: argparse.Namespace, bandwidth: float) -> list[Measurement]:
    """What is to be measured, the most important first, as functions that add to a result."""
    found: list[Measurement] = []
    for dtype, i, kind in itertools.product(DTYPES, range(len(CASES)), GPU_KINDS):
        if i < len(kind.cases):
            case = kind.cases[i] if not arguments.rehearse else (REHEARSED, kind.cases[i][1])
            title = f"{kind.title(case)} {str(dtype).removeprefix('torch.')}"
            measure = partial(measure_case, arguments, kind, case, dtype, bandwidth)
            found.append((title, measure))
    if arguments.rehearse:  # one case of each kind, and one of the launches
        del found[len(GPU_KINDS) :]
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
        functions = {name: work.function(direction) for name, work in works.items()}
        if arguments.device != "cpu":
            graphs = {name: graphed(function) for name, function in functions.items()}
            functions |= {f"{name}, CUDA graph": graph for name, graph in graphs.items()}
        moved = kind.least_bytes(*case, direction, setting)
        for mode, seconds in interleave(functions, arguments).items():
            # A layer also takes the time of the frozen product: the bytes tell something of cells.
            tells = mode.split(",")[0] in setting.kernels and kind.name == "cell"
            of = bandwidth if tells else None
            row = _row(name, direction, mode, seconds, moved, of)
            if kind.name == "attention":
                operations = attention.products(*case, direction)
                row["TFLOP_per_s"] = round(operations / row["p50_us"] / 1e6, 1)
            result["rows"].append(row)


def told(error: Exception) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def time_launches(
    arguments: argparse.Namespace,
    title: str,
    mode: str,
    work: Callable[[Callable[..., None]], object],
    bandwidth: float | None = None,
) -> list[Result]:
    """A row for each launch of a work, which gets the function that launches: its time, and what it
    takes of the card as it was loaded."""
    runs: dict[str, Callable[[], object]] = {}
    takes: dict[str, Result] = {}
    moved: dict[str, int] = {}

    def launch(kernel: Any, grid: tuple[int, ...], *tensors: Any, **constants: Any) -> None:
        name = kernel.fn.__name__.removesuffix("_kernel")
        name += f" {len(runs) + 1}" if name in runs else ""
        constants["enable_fp_fusion"] = True  # as the backend launches
        runs[name] = partial(kernel[grid], *tensors, **constants)
        loaded, moved[name] = runs[name](), traffic.bytes_of(tensors)
        takes[name] = {key: getattr(loaded, f"n_{key}", None) for key in ("regs", "spills")}
        takes[name]["shared"] = getattr(getattr(loaded, "metadata", None), "shared", None)

    work(launch)
    return [
        _row(title, name, mode, seconds, moved[name], bandwidth) | takes[name]
        for name, seconds in interleave(runs, arguments).items()
    ]


def measure_launches(
    arguments: argparse.Namespace, case: Case, bandwidth: float, name: str, result: Result
) -> None:
    """Times each launch of a layer by ``triton`` by itself, in bfloat16."""
    if "triton" not in kernels(arguments, "layer"):
        return
    operands = launches.Operands(*case, torch.bfloat16, arguments.device)
    for work in ("layer, forward", "layer, backward, weight step"):
        run = partial(launches.WORKS[work], of=operands)
        result["rows"] += time_launches(
            arguments,
            f"{name} {work}",
            "triton",
            lambda launch, run=run: run(TritonPrimitives(launch, capability)),
            bandwidth,
        )


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
) -> Result:
    times = timing.Times.of(seconds)
    return {
        "work": name,
        "direction": direction,
        "mode": mode,
        **{f"{cut}_us": round(1e6 * time, 2) for cut, time in times._asdict().items()},
        "least_bytes": moved,
        "of_copy_bandwidth": bandwidth and round(moved / times.p50 / bandwidth, 3),
    }
