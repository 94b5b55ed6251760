"""One run of a study, in a process of its own: its training, its scores and its costs."""

import copy
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from naslora.allocator import keep_freed_memory
from naslora.data.images import Sample
from naslora.errors import UserError
from naslora.methods import apply, merge, merge_modes
from naslora.records import read_rows
from naslora.results import HISTORY, Epoch, RunNumbers
from naslora.study.rows import Row
from naslora.study.summary import UNMERGED
from naslora.trained import load_model
from naslora.training.accelerator import make_accelerator
from naslora.training.evaluation import end_with_parent
from naslora.training.run import train
from naslora.training.run_config import RunConfig
from naslora.training.run_data import calibration, check_with_progress, find_splits
from naslora.training.run_model import build_frozen_model

Result = TypeVar("Result")
PASSES = 11
"""Timed passes of a model, of which the median is its time."""
WARM_UP_PASSES = 2


def find_refusals(rows: Sequence[Row], samples: Sequence[Sample]) -> dict[str, str]:
    """Finds why rows of a comparison do not fit the encoder, by row. Also reads every image once.

    A row with several configurations comes several times. Errors are of the data and the model.
    """
    recipe = rows[0].config
    check_with_progress(samples, recipe)
    model = build_frozen_model(recipe)
    refusals = {}
    for row in rows:
        try:
            apply(row.config.method, copy.deepcopy(model), row.config.adapter)
        except UserError as error:
            refusals[row.name] = str(error)
    return refusals


def run_and_measure(config: RunConfig, directory: Path, costs: bool) -> RunNumbers:
    """Trains a run, continuing what is in its folder, and measures it; errors as in ``train``.

    With ``costs`` it measures time and memory, too. The process must then be the run's own, because
    its peak memory counts.
    """
    keep_freed_memory()  # also in a job, which is no process of the command
    result = train(config, directory, resume=True)
    history = read_rows(directory / HISTORY, Epoch)
    test, counts = result.test, result.parameters
    scores = {"dice": test.dice, "iou": test.iou, "accuracy": test.accuracy, **test.metrics}
    numbers: dict[str, int | float | None] = {
        "trainable_parameters": counts.trainable,
        "share_of_parameters": counts.trainable / counts.total,
        **{name: value for name, value in scores.items() if not isinstance(value, dict)},
        "entropy": history[-1].entropy,
        **{f"dice_{mode}": own.dice for mode, own in result.test_merged.items()},
    }
    if not costs:
        return RunNumbers(numbers, test.image_dice or [])
    accelerator, load = make_accelerator(config.training), os.getloadavg()[0]
    device, size = accelerator.device, config.model.image_size
    memory = peak_memory(device)  # before the copies below
    # The weight steps of an epoch take as many images.
    images = len(history) * (result.images["train"] + result.images.get("arch", 0))
    weights = sum(epoch.seconds_weights for epoch in history)
    both = weights + sum(epoch.seconds_architecture for epoch in history)
    numbers |= {"weight_seconds": weights / images, "training_seconds": both / images}
    numbers["peak_memory"] = memory
    models = _models(config, directory, device)
    image = torch.rand(1, len(config.data.channels) or 3, size, size, device=device)

    @torch.no_grad()
    @accelerator.autocast()
    def infer(model: nn.Module) -> None:
        model(image)

    seconds = seconds_in_turn([partial(infer, model.eval()) for model in models.values()])
    for name, own in zip(models, seconds, strict=True):
        numbers[f"inference_{name}"] = float(np.median(own))
    where = device.type if device.type == "cpu" else torch.cuda.get_device_name(device)
    threads, processors = torch.get_num_threads(), os.cpu_count()
    machine = f"{threads} threads each, on {processors} processors ({where})"
    return RunNumbers(numbers, test.image_dice or [], machine, load)


def _models(config: RunConfig, directory: Path, device: torch.device) -> dict[str, nn.Module]:
    """The trained model, and a copy for each way of merging that works."""
    model = load_model(directory)[0].to(device)
    models: dict[str, nn.Module] = {UNMERGED: model}
    for mode in merge_modes(config.method, config.adapter):
        merged = copy.deepcopy(model)
        batches = calibration(config, find_splits(config), mode, device)
        with suppress(UserError):  # too few images for the mode; the run's metrics hold the reason
            merge(merged, mode, batches)
            models[mode] = merged
    return models


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes: of the GPU if it computes there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # absent on Windows, where the other commands work

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


def seconds_in_turn(calls: Sequence[Callable[[], object]]) -> np.ndarray:
    """(calls, PASSES) seconds of calls, which take turns: other load affects all of them."""
    seconds = np.empty((len(calls), WARM_UP_PASSES + PASSES))
    for own in seconds.T:
        for place, call in enumerate(calls):
            started = time.perf_counter()
            call()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            own[place] = time.perf_counter() - started
    return seconds[:, WARM_UP_PASSES:]


# ---- A process of its own ------------------------------------------------------------------------


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function in a fresh process, which ends with this one, and returns its result. If it
    is killed, that is a RuntimeError."""
    # The fork server imports the function's module once. A process forked from it has all imports
    # and no results of an earlier run.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([function.__module__])
    try:
        with ProcessPoolExecutor(1, mp_context=context, initializer=_start) as pool:
            try:
                return pool.submit(function, *arguments).result()
            except KeyboardInterrupt:  # the pool would wait for the process
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    except BrokenProcessPool as error:
        raise RuntimeError("its process was killed, perhaps for lack of memory") from error


def _start() -> None:
    """Otherwise the run of a killed study would train on in a folder that a resumed one uses."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's, which then terminates this process
    end_with_parent()
