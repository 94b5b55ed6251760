"""What the groups of benchmarks measure, one case of the kernels or one setting at a time.

Candidates take turns, round after round, in one process: what else the machine does then falls on
all alike, and a ratio may be taken round by round. Nothing is timed that fails its gate.
"""

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterable

import torch

from bench import cases, counts, models, prompts, timing
from bench.kinds import Case, Kind
from bench.models import Setting
from naslora.sam.prompts import PROMPTED

# (candidate, step): seconds round by round, and what stands beside them.
Entries = dict[tuple[str, str], tuple[list[float], dict[str, object]]]

# As in the paper's Table 5: an epoch takes a weight step for every batch of the training data, and
# a fifth as many architecture steps (25.2 minutes instead of 21.1).
ARCHITECTURE_STEPS = 0.2


def time_kernels(kind: Kind, case: Case, direction: str, rounds: int) -> Entries:
    """Seconds of each candidate in five times so many rounds.

    Raises:
        RuntimeError: the gate failed.
    """
    works = kind.works(*case)
    _refuse(cases.gate(works, judge=kind.judge))
    functions = {(name, direction): work.function(direction) for name, work in works.items()}
    about = {
        "group": kind.name,
        "work": kind.title(case),
        "direction": direction,
        "bytes": kind.least_bytes(*case, direction),
        "operations": kind.operations(*case, direction),
        "copy_bandwidth": timing.copy_bandwidth(),
    }
    target = 0.02 if rounds > 1 else 0
    seconds = timing.interleave(functions, 5 * rounds if target else 1, target)
    return {key: (samples, about) for key, samples in seconds.items()}


def time_training(setting: Setting, names: Iterable[str], rounds: int) -> Entries:
    """Seconds of each candidate's ``weights`` step; of those that search, the ``architecture``
    step, and ``epoch``, both for each batch of an epoch. A step leaves nothing in memory but
    weights and the optimizers' state. ``names`` are those of ``models.training_names``.

    Raises:
        RuntimeError: a gate failed.
    """
    base = models.untouched(setting)
    found = models.candidates(setting, names, base)
    _refuse(models.gate_training(found, base))
    functions = {}
    for name, candidate in found.items():
        functions[name, "weights"] = candidate.weight_step
        if candidate.alpha:
            functions[name, "architecture"] = candidate.architecture_step
    functions[models.FLOOR, "weights"] = models.floor(base, setting)
    seconds = timing.interleave(functions, rounds, target=0, device=setting.device)
    for name, step in list(seconds):
        if step == "architecture":
            pairs = zip(seconds[name, "weights"], seconds[name, step], strict=True)
            seconds[name, "epoch"] = [w + ARCHITECTURE_STEPS * a for w, a in pairs]
    return {key: (samples, dataclasses.asdict(setting)) for key, samples in seconds.items()}


def time_prompts(setting: Setting, rounds: int) -> Entries:
    """Seconds of a semantic step, and of promptable steps on the same encoder.

    Nothing if the model takes no prompts.

    Raises:
        RuntimeError: the gate failed.
    """
    if setting.model not in PROMPTED:
        return {}
    semantic, prompted = prompts.candidates(setting)
    _refuse(prompts.gate(prompted))
    functions = prompts.functions(semantic, prompted)
    seconds = timing.interleave(functions, rounds, target=0, device=setting.device)
    for step, clicks in prompts.STEPS.items():
        key = prompts.PROMPTABLE, step
        seconds[key] = [sample / len(clicks) for sample in seconds[key]]
    return {key: (samples, dataclasses.asdict(setting)) for key, samples in seconds.items()}


def time_inference(setting: Setting, methods: Iterable[str], rounds: int) -> Entries:
    """Seconds of a batch through the untouched models, every method's, and its merged ones.

    Raises:
        RuntimeError: a gate failed.
    """
    images, _ = models.batch(setting)
    found = models.inference_models(methods, models.untouched(setting), setting)
    _refuse(models.gate_inference(found, setting, images))
    functions = {
        (name, "inference"): functools.partial(models.inference, model, setting, images)
        for name, model in found.items()
    }
    seconds = timing.interleave(functions, rounds, target=0, device=setting.device)
    return {key: (samples, dataclasses.asdict(setting)) for key, samples in seconds.items()}


def measure_memory(setting: Setting, names: Iterable[str]) -> Entries:
    """Seconds of each candidate's counted weight step, and what a step takes, as ``bench.counts``.

    ``saved`` bytes are kept for the backward; ``peak`` is the most that lived at once, on a GPU as
    its allocator tells. ``architecture_*`` is the same of an architecture step.
    """
    base = models.untouched(setting)
    entries: Entries = {}
    for name, candidate in models.candidates(setting, names, base).items():
        started = time.perf_counter()
        numbers = _counted(candidate, candidate.weight_step)
        seconds = time.perf_counter() - started
        if candidate.alpha:
            of_alpha = _counted(candidate, candidate.architecture_step)
            numbers |= {f"architecture_{key}": value for key, value in of_alpha.items()}
        entries[name, "memory"] = [seconds], dataclasses.asdict(setting) | numbers
        gc.collect()
    return entries


def _counted(candidate: models.Candidate, step: Callable[[], None]) -> dict[str, int]:
    step()  # makes the optimizer's state, and leaves unfrozen what the step trains
    numbers = {"saved": counts.saved_bytes(candidate.loss, candidate.model)}
    gc.collect()  # what the forward kept: two of them would not fit at 1024 x 1024 pixels
    numbers |= dataclasses.asdict(counts.count(step))
    if candidate.setting.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        numbers["peak"] = torch.cuda.max_memory_allocated() - before
    return numbers


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise RuntimeError(f"not timed, as the gate failed: {reason}")
