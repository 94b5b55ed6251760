"""What kernels must keep on a GPU beside right results: equal bits, whatever runs them."""

import argparse

import torch

from bench import attention, cases
from bench.gpu import kernels
from bench.gpu.kernels import Result, Save
from bench.kinds import Case, Kind

REPEATS = 20
CASES = {"layer": ((cases.TINY, 3), (cases.TINY, 24))}
CASES["attention"] = ((cases.SMALL, 12), (cases.HUGE_GLOBAL, 16))


def check_behaviour(arguments: argparse.Namespace, save: Save) -> Result:
    """Holds repeats, another stream, a CUDA graph and a second device to the first result's bits;
    notes the largest errors of attention beside those of torch's own."""
    result: Result = {"passed": True, "summary": "", "problems": [], "notes": []}
    for title, kind, case, setting in kernels.combinations(arguments, CASES):
        try:
            differing = _differing(kind, case, setting)
            if kind.name == "attention":
                result["notes"].append(f"{title}: errors {_errors(kind.works(*case, setting))}")
        except Exception as error:  # the device's have no common class
            differing = [kernels.told(error)]
        result["problems"] += [f"{title}: {what}" for what in differing]
        result["passed"] = not result["problems"]
        save(result)
    return result


def _differing(kind: Kind, case: Case, setting: cases.Setting) -> list[str]:
    """Under which conditions the bits of a work are not those of its first run."""
    (kernel,) = setting.kernels
    work = kind.works(*case, setting)[kernel]
    first = work.both()
    results = {f"repeat {i}": work.both() for i in range(REPEATS if work.leaves[0].is_cuda else 1)}
    if work.leaves[0].is_cuda:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results["another stream"] = work.both()
        torch.cuda.synchronize()
        replay = kernels.graphed(work.both)
        for number in ("first", "second"):
            results[f"a CUDA graph's {number} replay"] = tuple(map(torch.clone, replay()))
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if len(names) > 1 and names[0] == names[1]:
            second = cases.Setting("cuda:1", setting.dtype, setting.kernels)
            results["a second device"] = kind.works(*case, second)[kernel].both()
    return [
        f"{condition} has other bits"
        for condition, found in results.items()
        if not all(torch.equal(a.to(b.device), b) for a, b in zip(found, first, strict=True))
    ]


def _errors(works: dict[str, cases.Work]) -> str:
    """The largest error of o and the gradients beside float64, as a part of the largest number."""
    results = {name: (work.compute(), *work.both()) for name, work in works.items()}
    exact = results.pop(attention.EXACT)
    parts = {
        name: [(a - b).abs().max() / b.abs().max() for a, b in zip(found, exact, strict=True)]
        for name, found in results.items()
    }
    return ", ".join(f"{name} {float(max(errors)):.1e}" for name, errors in parts.items())
