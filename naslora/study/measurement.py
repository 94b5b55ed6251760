"""One cell of a comparison: training a method with a seed, and measuring its scores and costs.

A cell runs in a process of its own, so that its peak memory is its own.
"""

import copy
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from naslora.adapter.merge_report import MergeMode
from naslora.errors import UserError
from naslora.methods import apply, merge, merge_modes
from naslora.records import read_rows
from naslora.results import HISTORY, CellNumbers, Epoch, MeanScores, SplitScores
from naslora.sam.segmentation import build_model
from naslora.trained import load_model
from naslora.training.accelerator import make_accelerator
from naslora.training.run import train
from naslora.training.run_config import RunConfig
from naslora.training.run_data import calibration, check_with_progress, find_splits

PASSES = 11  # forward passes of which the median is a model's time
WARM_UP_PASSES = 2
UNMERGED = "unmerged"


def cell_config(recipe: RunConfig, method: str, seed: int) -> RunConfig:
    """The recipe as one cell trains it."""
    adapter = dataclasses.replace(recipe.adapter, seed=seed)
    return dataclasses.replace(recipe, method=method, adapter=adapter)


def find_refusals(recipe: RunConfig, methods: Sequence[str]) -> dict[str, str]:
    """Finds the methods that do not fit the encoder. Also reads every image once.

    Args:
        recipe: the configuration of all cells; its method and seed are replaced.
        methods: names of ``naslora.methods.METHODS``.

    Returns:
        Method to reason.

    Raises:
        UserError: no method could work with these data or this model.
    """
    splits = find_splits(recipe)
    check_with_progress([sample for split in splits.values() for sample in split], recipe)
    model = build_model(recipe.model, recipe.image_size, recipe.num_classes, recipe.checkpoint)
    refusals = {}
    for method in methods:
        try:
            apply(method, copy.deepcopy(model), cell_config(recipe, method, 0).adapter)
        except UserError as error:
            refusals[method] = str(error)
    return refusals


def run_cell(config: RunConfig, directory: Path) -> CellNumbers:
    """Trains a cell, continuing what is in its folder, and measures it.

    Raises:
        UserError: as ``naslora.training.run.train``.
    """
    result = train(config, directory, resume=True)
    load = os.getloadavg()[0]
    device = make_accelerator(config.training).device
    memory = peak_memory(device)  # before the copies below
    splits = result.images or {}
    images = splits["train"] + splits.get("arch", 0)  # the weight steps of an epoch take as many
    weights, everything = training_seconds(read_rows(directory / HISTORY, Epoch), images)
    if result.parameters is None or result.test is None:
        raise UserError(f"the run in {directory} reports no counts or no test scores")
    return CellNumbers(
        parameters=result.parameters.total,
        trainable_parameters=result.parameters.trainable,
        scores=_mean_scores(result.test),
        merged_scores={
            mode: _mean_scores(scores) for mode, scores in (result.test_merged or {}).items()
        },
        weight_seconds=weights,
        training_seconds=everything,
        peak_memory=memory,
        inference_seconds=inference_seconds(_models(config, directory, device), config),
        threads=torch.get_num_threads(),
        processors=os.cpu_count(),
        device=device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        load=load,
        image_dice=result.test.image_dice,
    )


def _models(config: RunConfig, directory: Path, device: torch.device) -> dict[str, nn.Module]:
    """The trained model, and a copy for each way of merging that works."""
    model = load_model(directory)[0].to(device)
    models: dict[str, nn.Module] = {UNMERGED: model}
    for mode in merge_modes(config.method, config.adapter):
        merged = copy.deepcopy(model)
        batches = calibration(config, find_splits(config), mode, device)
        try:
            merge(merged, cast(MergeMode, mode), batches)
        except UserError:  # too few images for the mode; the run's metrics hold the reason
            continue
        models[mode] = merged
    return models


def _mean_scores(scores: SplitScores) -> MeanScores:
    return MeanScores(scores.dice, scores.iou, scores.accuracy)


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes: of the GPU if it computes there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # absent on Windows, where the other commands work

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


def training_seconds(history: Sequence[Epoch], images: int) -> tuple[float, float]:
    """Mean seconds per training image and epoch.

    Args:
        history: one record an epoch.
        images: training images of an epoch.

    Returns:
        The seconds of the weight steps, and of all steps, those for alpha included.
    """
    weights = sum(epoch.seconds.weights for epoch in history)
    architecture = sum(epoch.seconds.architecture for epoch in history)
    steps = images * len(history)
    return weights / steps, (weights + architecture) / steps


@torch.no_grad()
def inference_seconds(models: Mapping[str, nn.Module], config: RunConfig) -> dict[str, float]:
    """Median seconds of one image through each model.

    The models take turns, so that other load on the machine affects all of them.
    """
    accelerator = make_accelerator(config.training)
    size = config.image_size
    image = torch.rand(1, 3, size, size, device=accelerator.device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for done in range(WARM_UP_PASSES + PASSES):
        for name, model in models.items():
            model.eval()
            started = time.perf_counter()
            with accelerator.autocast():
                model(image)
            _synchronize(image)
            if done >= WARM_UP_PASSES:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _synchronize(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize(tensor.device)
