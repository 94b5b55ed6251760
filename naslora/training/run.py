"""A run's folder: from a configuration to a trained, evaluated, merged and reported model.

config.json            the whole configuration
best/                  adapter (and decoder) of the best epoch, as ``save_adapter`` writes it
last.pt                what --resume needs
history.csv            one row an epoch
operations.json        softmax(alpha) of every layer after every epoch
metrics.json           test metrics, merge errors, counts, times
report.html            all of it to look at
tensorboard/           the curves for TensorBoard
"""

import csv
import io
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from naslora.adapter.merging import unmerge
from naslora.adapter.storage import load_adapter
from naslora.data.masks import Sample
from naslora.errors import UserError
from naslora.files import read_json, write_json, write_text
from naslora.methods import (
    merge,
    merge_modes,
)
from naslora.metrics import image_scores
from naslora.report.pictures import Panel
from naslora.report.run_report import write_report
from naslora.results import BEST, Epoch, OperationHistory, RunResult, from_json
from naslora.sam.segmentation import predict_labels
from naslora.training.accelerator import make_accelerator
from naslora.training.run_config import RunConfig, differing
from naslora.training.run_data import calibration, check_with_progress, find_splits, make_dataset
from naslora.training.run_model import build_adapted_model, count_parameters
from naslora.training.search import Search, quality

PANELS = 6  # test images shown in the report


def train(config: RunConfig, output: Path, resume: bool = False) -> dict[str, Any]:
    """Searches, evaluates, merges and reports; everything ends up in ``output``.

    What the user gave is checked before anything is written.

    Args:
        config: the run.
        output: the run's folder; must be new or empty unless ``resume``.
        resume: continue the run in ``output`` where its last checkpoint stands.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: something the user gave cannot work.
    """
    accelerator = make_accelerator(config.search)
    _check_start(config)
    check_output(config, output, resume)
    splits = find_splits(config)
    _check_together(accelerator, splits, config)
    model = build_adapted_model(config)
    counts = count_parameters(model)
    data = {
        name: make_dataset(
            config,
            split,
            flip=config.search.flip and name in ("train", "arch"),
            truth=config.resolution == "original" and name == "test",
        )
        for name, split in splits.items()
    }
    seed = config.adapter.seed
    search = Search(model, data, config.search, seed, output, config.foreground_names, accelerator)
    if resume:
        search.resume()
    if accelerator.is_main_process:
        write_json(output / "config.json", config.to_dict())
    search.run()
    load_adapter(model, output / BEST)
    metrics = _final_metrics(search, counts, config)
    if accelerator.is_main_process:
        _write_results(search, metrics, config, output)
    accelerator.wait_for_everyone()
    return metrics


def _check_start(config: RunConfig) -> None:
    """A recipe of the paper on an encoder without SAM's weights would train for days in vain."""
    has_weights = config.model != "vit_t" and config.method != "full"
    if config.recipe is not None and has_weights and config.checkpoint is None:
        raise UserError(
            f"recipe {config.recipe} starts from SAM's weights: give --checkpoint FILE, the "
            f"{config.model} checkpoint"
        )


def check_output(config: RunConfig, output: Path, resume: bool) -> None:
    """Refuses a folder that holds another run's results, or nothing to resume.

    Raises:
        UserError: ``output`` is not empty, or, with ``resume``, belongs to another configuration.
    """
    if resume and (output / "config.json").is_file():
        stored = RunConfig.from_dict(read_json(output / "config.json"))
        names = differing(stored.to_dict(), config.to_dict())
        if names:
            raise UserError(
                f"{output} was started with another configuration (it differs in "
                f"{', '.join(names)}); resume with the same one"
            )
        return
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; choose another --output")
    # The demo keeps its data inside the run's folder.
    own_data = output / "data" if config.root == output / "data" else None
    if output.is_dir() and any(path != own_data for path in output.iterdir()):
        advice = "" if resume else ", or add --resume to continue the run in it"
        what = "holds files, but no run" if resume else "exists and is not empty"
        raise UserError(f"{output} {what}; choose another --output{advice}")


def _check_together(
    accelerator: Accelerator, splits: dict[str, list[Sample]], config: RunConfig
) -> None:
    """The main process reads every sample for all; none goes on before, or without the others."""
    problem = None
    if accelerator.is_main_process:
        try:
            check_with_progress([sample for split in splits.values() for sample in split], config)
        except UserError as error:
            problem = str(error)
    for found in gather_object([problem]):
        if found is not None:
            raise UserError(found)


def _final_metrics(search: Search, counts: dict[str, int], config: RunConfig) -> dict[str, Any]:
    """Metrics of the best epoch: on the test split, and again after each way of merging."""
    started = time.perf_counter()
    best = max(search.history, key=quality)
    metrics: dict[str, Any] = {
        "test": search.evaluate("test", config.metrics),
        "val": {name: best[f"val_{name}"] for name in ("loss", "dice", "iou", "accuracy")},
        "best_epoch": best["epoch"],
        "trainable_parameters": sum(counts.values()) - counts["frozen"],
        "parameters": counts,
        "images": {split: len(data) for split, data in search.data.items()},
    }
    modes = merge_modes(config.method, config.adapter)
    if modes:
        metrics |= {"test_merged": {}, "merge": {}}
        samples = {split: data.samples for split, data in search.data.items()}
        for mode in modes:
            batches = calibration(config, samples, mode, search.accelerator.device)
            try:
                report = merge(search.model, mode, batches)
            except UserError as error:  # too few images for the mode; the others still tell
                metrics["merge"][mode] = {"refused": str(error)}
                continue
            metrics["test_merged"][mode] = search.evaluate("test", config.metrics)
            if mode == "center" and config.search.anneal_epochs:
                metrics["annealing"] = _annealing(search)
            metrics["merge"][mode] = report.to_dict()
            unmerge(search.model)
    training = sum(sum(record["seconds"].values()) for record in search.history)
    metrics["seconds"] = training + time.perf_counter() - started
    return metrics


def _annealing(search: Search) -> dict[str, Any]:
    """Validation scores of the best epoch before, of every epoch while, and of the best epoch after
    the cell gave up its neighbours, and of the model merged with `center`."""
    names = ("epoch", "spatial", "val_loss", "val_dice", "val_iou")
    epochs = {"before": [], "during": [], "after": []}
    for record in search.history:
        part = {0.0: "after", 1.0: "before"}.get(record["spatial"], "during")
        epochs[part].append({name: record[name] for name in names})
    merged = search.evaluate("val")
    return {
        "before": max(epochs["before"], key=quality, default=None),
        "during": epochs["during"],
        "after": max(epochs["after"], key=quality),
        "merged": {f"val_{name}": merged[name] for name in ("loss", "dice", "iou")},
    }


def _write_results(
    search: Search, metrics: dict[str, Any], config: RunConfig, output: Path
) -> None:
    operations = search.operation_history()
    write_text(output / "history.csv", _history_csv(search.history))
    if operations is not None:
        write_json(output / "operations.json", operations)
    write_json(output / "metrics.json", metrics)
    write_report(
        output / "report.html",
        config=config.to_dict(),
        # until training returns records
        result=from_json(RunResult, metrics, output),
        history=from_json(list[Epoch], search.history, output),
        operations=from_json(OperationHistory | None, operations, output),
        panels=_panels(search, config),
        class_names=["background", *config.foreground_names],
    )


def _history_csv(history: list[dict[str, Any]]) -> str:
    rows = [
        {**record, **{f"seconds_{name}": s for name, s in record["seconds"].items()}}
        for record in history
    ]
    text = io.StringIO()
    columns = [name for name in rows[0] if name != "seconds"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _panels(search: Search, config: RunConfig) -> list[Panel]:
    """A few test images, evenly spread over the split."""
    dataset = search.data["test"]
    indices = np.linspace(0, len(dataset) - 1, min(PANELS, len(dataset))).round().astype(int)
    panels = []
    for item in (dataset[int(i)] for i in indices):
        labels = predict_labels(search.model, item["image"][None])[0].numpy()
        scores = image_scores(
            torch.from_numpy(labels)[None], item["mask"][None], config.num_classes
        )
        dice = float(scores["dice"].nanmean())
        panels.append(
            Panel(
                name=item["name"],
                image=(255 * item["image"]).round().byte().permute(1, 2, 0).numpy(),
                truth=item["mask"].numpy(),
                prediction=labels,
                dice=None if math.isnan(dice) else dice,
            )
        )
    return panels
