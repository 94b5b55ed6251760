"""``naslora compare``: methods side by side on one data set, under one recipe.

Every (method, seed) is a cell: a run of ``train`` in a folder and a process of its own,
so that its peak memory is its own, too. One runs at a time.

compare.json         the recipe, and what every cell measured
runs/METHOD/SEED/    the cell's run, as ``naslora train`` leaves it
table.md, table.csv  one row a method, as the paper's Tables 1 and 2 have it
report.html          the same to look at
"""

import copy
import csv
import dataclasses
import io
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from naslora.adapter.config import NASLoRAConfig
from naslora.adapter.merging import MODES
from naslora.errors import UserError
from naslora.files import read_json, write_json, write_text
from naslora.methods import METHODS, apply, merge, merge_modes
from naslora.report.comparison_report import write_comparison
from naslora.report.html import MISSING
from naslora.sam.segmentation import build_model
from naslora.trained import load_model
from naslora.training.accelerator import make_accelerator
from naslora.training.run import check_output, train
from naslora.training.run_config import RunConfig, differing
from naslora.training.run_data import calibration, check_with_progress, find_splits

RECORD = "compare.json"
SCORES = {"dice": "Dice", "iou": "IoU", "accuracy": "accuracy"}
PASSES = 11  # forward passes of which the median is a model's time
State = Literal["done", "failed", "refused"]


@dataclass(frozen=True)
class Cell:
    """What became of one (method, seed)."""

    method: str
    seed: int
    state: State
    """``refused``: the method does not fit the encoder, nothing ran. ``failed``: its run ended."""
    reason: str | None = None
    """Why there are no numbers."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """What ``run_cell`` returns."""


def compare(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    resume: bool = False,
) -> list[Cell]:
    """Trains every method with every seed, and writes tables and report to ``output``.

    A method that does not fit is refused before anything trains; a cell that fails is marked; the
    others go on. Tables are written after every cell.

    Args:
        config: the recipe: data, model, schedule. Its method and seed are replaced.
        methods: names of ``naslora.methods.METHODS``, in the order of the rows.
        seeds: of data order, held-out images and fresh parameters.
        output: must be new or empty unless ``resume``.
        resume: keep the finished cells of ``output``, continue the others; methods and seeds may
            have been added.

    Returns:
        The cells, seed by seed.

    Raises:
        UserError: the recipe cannot work for any method, or belongs to another comparison.
    """
    _check_cells(config, methods, seeds)
    known = _open(config, output, resume)
    refusals = in_own_process(find_refusals, config, tuple(methods))
    if len(refusals) == len(methods):
        raise UserError(f"no method fits: {_listed(refusals)}")
    for method, reason in refusals.items():
        _say(f"{method} is left out: {reason}")
    keys = [(method, seed) for seed in seeds for method in methods]
    for method, seed in keys:
        if method in refusals:
            known[method, seed] = Cell(method, seed, "refused", refusals[method])
    pending = [key for key in keys if key[0] not in refusals and not _is_done(known.get(key))]
    _write(config, known, methods, output)
    started = time.perf_counter()
    for number, (method, seed) in enumerate(pending, 1):
        _say(f"cell {number} of {len(pending)}: {method}, seed {seed}")
        cell = known[method, seed] = _train_cell(config, method, seed, output)
        _write(config, known, methods, output)
        left = (time.perf_counter() - started) / number * (len(pending) - number)
        _say(f"{_outcome(cell)}; about {left / 60:.0f} min left")
    return [known[key] for key in keys]


def _check_cells(config: RunConfig, methods: Sequence[str], seeds: Sequence[int]) -> None:
    if config.method != RunConfig.method or config.adapter.seed != NASLoRAConfig.seed:
        raise UserError("compare takes --methods and --seeds, not --method or --seed")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise UserError(f"methods must be among {', '.join(METHODS)}, got {unknown[0]!r}")
    for name, values in (("methods", methods), ("seeds", seeds)):
        if not values:
            raise UserError(f"{name} must name at least one")
        if len(set(values)) != len(values):
            raise UserError(f"{name} must be distinct, got {' '.join(map(str, values))}")


def _open(config: RunConfig, output: Path, resume: bool) -> dict[tuple[str, int], Cell]:
    """The cells of an interrupted comparison; none for a new one."""
    if not (resume and (output / RECORD).is_file()):
        check_output(config, output, resume)
        return {}
    stored = read_json(output / RECORD)
    try:
        names = differing(stored["recipe"], _recipe(config))
        cells = [Cell(**cell) for cell in stored["cells"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{output / RECORD} is no comparison of this version: {error}") from error
    if names:
        raise UserError(
            f"{output} was started with another recipe (it differs in {', '.join(names)}); resume "
            "with the same one"
        )
    return {(cell.method, cell.seed): cell for cell in cells}


def _recipe(config: RunConfig) -> dict[str, Any]:
    """What all the cells share."""
    return cell_config(config, "decoder-only", seed=0).to_dict()


def cell_config(config: RunConfig, method: str, seed: int) -> RunConfig:
    """The recipe as one cell trains it."""
    adapter = dataclasses.replace(config.adapter, seed=seed)
    return dataclasses.replace(config, method=method, adapter=adapter)


def find_refusals(config: RunConfig, methods: Sequence[str]) -> dict[str, str]:
    """Which methods do not fit the encoder, and why; also reads every image once.

    Raises:
        UserError: no method could work with these data or this model.
    """
    splits = find_splits(config)
    check_with_progress([sample for split in splits.values() for sample in split], config)
    model = build_model(config.model, config.image_size, config.num_classes, config.checkpoint)
    refusals = {}
    for method in methods:
        try:
            apply(method, copy.deepcopy(model), cell_config(config, method, 0).adapter)
        except UserError as error:
            refusals[method] = str(error)
    return refusals


def _is_done(cell: Cell | None) -> bool:
    return cell is not None and cell.state == "done"


def _train_cell(config: RunConfig, method: str, seed: int, output: Path) -> Cell:
    directory = output / "runs" / method / str(seed)
    try:
        numbers = in_own_process(run_cell, cell_config(config, method, seed), directory)
    except Exception as error:  # whatever ends a cell must not end the others
        return Cell(method, seed, "failed", _one_line(error))
    return Cell(method, seed, "done", numbers=numbers)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a fresh process, which ends with this one; raises what it raises."""
    # From the server processes fork that have imported everything, but computed nothing yet.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([__name__])
    try:
        with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise RuntimeError("its process was killed; did the memory suffice?") from error


def _end_with_parent() -> None:
    """Lets no cell train on after a kill: the next attempt may be in its folder already."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# ---- One cell, in its own process --------------------------------------------------------------


def run_cell(config: RunConfig, directory: Path) -> dict[str, Any]:
    """Trains a cell, continuing what is in its folder, and measures what the table shows.

    Returns:
        ``parameters`` (all) and ``trainable_parameters``; ``scores`` on the test split, and
        ``merged_scores`` by mode; ``weight_seconds`` and ``training_seconds`` an image;
        ``peak_memory`` in bytes; ``inference_seconds`` an image, ``unmerged`` and by mode;
        ``threads``, ``processors``, ``device`` and ``load``: under what they were taken.
    """
    metrics = train(config, directory, resume=True)
    load = os.getloadavg()[0]
    device = make_accelerator(config.search).device
    memory = peak_memory(device)
    weights, everything = training_seconds(directory / "history.csv", metrics["images"]["train"])
    model = load_model(directory)[0].to(device)
    models = {"unmerged": model}
    for mode in merge_modes(config.method, config.adapter):
        merged = copy.deepcopy(model)
        batches = calibration(config, find_splits(config), mode, device)
        try:
            merge(merged, mode, batches)
        except UserError:  # too few images for the mode, as the run's metrics tell
            continue
        models[mode] = merged
    return {
        "parameters": sum(metrics["parameters"].values()),
        "trainable_parameters": metrics["trainable_parameters"],
        "scores": _scores(metrics["test"]),
        "merged_scores": {
            mode: _scores(scores) for mode, scores in metrics.get("test_merged", {}).items()
        },
        "best_epoch": metrics["best_epoch"],
        "weight_seconds": weights,
        "training_seconds": everything,
        "peak_memory": memory,
        "inference_seconds": inference_seconds(models, config),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "load": load,
    }


def peak_memory(device: torch.device) -> int:
    """The most memory, in bytes, that this process has had so far: the GPU's, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # absent on Windows, where the rest of the command line works

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


def _scores(scores: dict[str, Any]) -> dict[str, float | None]:
    return {name: scores[name] for name in SCORES}


def training_seconds(history: Path, images: int) -> tuple[float, float]:
    """Seconds for each of ``images`` training images: of weight steps, and alpha steps included."""
    with history.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    weights = sum(float(row["seconds_weights"]) for row in rows)
    architecture = sum(float(row["seconds_architecture"]) for row in rows)
    return tuple(total / (images * len(rows)) for total in (weights, weights + architecture))


@torch.no_grad()
def inference_seconds(models: dict[str, nn.Module], config: RunConfig) -> dict[str, float]:
    """Median seconds of one image through each model; they take turns, so that what else the
    machine does meanwhile falls on all of them."""
    accelerator = make_accelerator(config.search)
    size = config.image_size
    image = torch.rand(1, 3, size, size, device=accelerator.device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for passed in range(-2, PASSES):
        for name, model in models.items():
            model.eval()
            started = time.perf_counter()
            with accelerator.autocast():
                model(image)
            _synchronize(image)
            if passed >= 0:  # the first ones warm up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _synchronize(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize(tensor.device)


# ---- Tables ------------------------------------------------------------------------------------


def _write(
    config: RunConfig, known: dict[tuple[str, int], Cell], methods: Sequence[str], output: Path
) -> None:
    stored = [dataclasses.asdict(cell) for cell in known.values()]
    write_json(output / RECORD, {"recipe": _recipe(config), "cells": stored})
    shown = [cell for cell in known.values() if cell.method in methods]
    rows = [summarise(method, [c for c in shown if c.method == method]) for method in methods]
    notes = notes_on(rows, shown)
    write_text(output / "table.csv", as_csv(rows))
    write_text(output / "table.md", as_markdown(rows, notes))
    write_comparison(
        output / "report.html",
        config=_recipe(config),
        tables={"Comparison": main_table(rows), "Dice after merging": merged_table(rows)},
        rows=rows,
        notes=notes,
    )


def summarise(method: str, cells: list[Cell]) -> dict[str, Any]:
    """One row of the table: means over the seeds, with standard deviations of the scores."""
    done = [cell.numbers for cell in cells if cell.state == "done"]
    broken = [f"seed {cell.seed}: {cell.reason}" for cell in cells if cell.state == "failed"]
    broken += list(dict.fromkeys(cell.reason for cell in cells if cell.state == "refused"))
    row: dict[str, Any] = {
        "method": method,
        "title": METHODS[method].title,
        "seeds": len(done),
        "missing": len(cells) - len(done),
        "refused": any(cell.state == "refused" for cell in cells),
        "reason": "; ".join(broken),
    }
    if not done:
        return row
    row["trainable_parameters"] = done[0]["trainable_parameters"]
    row["share_of_parameters"] = done[0]["trainable_parameters"] / done[0]["parameters"]
    for name in SCORES:
        values = [numbers["scores"][name] for numbers in done]
        row[name], row[f"{name}_spread"] = mean_and_spread(values)
        row[f"{name}_values"] = values
    for name in ("weight_seconds", "training_seconds"):
        row[name] = statistics.median(numbers[name] for numbers in done)
    row["peak_memory"] = max(numbers["peak_memory"] for numbers in done)
    for mode in done[0]["inference_seconds"]:
        times = [numbers["inference_seconds"][mode] for numbers in done]
        row[f"inference_{mode}"] = statistics.median(times)
    for mode in done[0]["merged_scores"]:
        values = [numbers["merged_scores"][mode]["dice"] for numbers in done]
        row[f"dice_{mode}"], row[f"dice_{mode}_spread"] = mean_and_spread(values)
    return row


def mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (n - 1); no spread for one value, neither without all values."""
    if any(value is None for value in values):
        return None, None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return statistics.mean(values), spread


def as_csv(rows: list[dict[str, Any]]) -> str:
    """The rows as numbers, in seconds and bytes; empty where there is none."""
    columns = dict.fromkeys(name for row in rows for name in row if not name.endswith("_values"))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and text of the table in the shape of the paper's Tables 1 and 2."""
    modes = [mode for mode in ("unmerged", *MODES) if any(f"inference_{mode}" in r for r in rows)]
    head = ["Method", "Trainable, M", "Of all, %", *SCORES.values()]
    head += ["Weight steps, s/image", "Training, s/image", "Peak memory, MB"]
    head += ["Inference, s/image" if m == "unmerged" else f"merged, {m}" for m in modes]
    return head, [_text_row(row, modes) for row in rows]


def _text_row(row: dict[str, Any], modes: list[str]) -> list[str]:
    mark = f" ({row['missing']} failed)" if row["missing"] else ""
    mark = " (refused)" if row["refused"] else mark
    return [
        row["title"] + mark,
        _number(row, "trainable_parameters", 1e-6, ".3f"),
        _number(row, "share_of_parameters", 100, ".2f"),
        *(_mean_text(row, name) for name in SCORES),
        _number(row, "weight_seconds", 1, ".3f"),
        _number(row, "training_seconds", 1, ".3f"),
        _number(row, "peak_memory", 1e-6, ",.0f"),
        *(_number(row, f"inference_{mode}", 1, ".3f") for mode in modes),
    ]


def merged_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and text: test Dice before and after each way of merging; of what merges."""
    modes = [mode for mode in MODES if any(f"dice_{mode}" in row for row in rows)]
    merged = [row for row in rows if any(f"dice_{mode}" in row for mode in modes)]
    names = ["dice", *(f"dice_{mode}" for mode in modes)]
    head = ["Method", "Dice", *(f"merged, {mode}" for mode in modes)]
    return head, [[row["title"], *(_mean_text(row, name) for name in names)] for row in merged]


def _number(row: dict[str, Any], name: str, factor: float, form: str) -> str:
    return MISSING if row.get(name) is None else format(factor * row[name], form)


def _mean_text(row: dict[str, Any], name: str) -> str:
    mean, spread = row.get(name), row.get(f"{name}_spread")
    if mean is None:
        return MISSING
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"


def as_markdown(rows: list[dict[str, Any]], notes: list[str]) -> str:
    """The tables and what has to be said about them."""
    tables = [table for table in (main_table(rows), merged_table(rows)) if table[1]]
    return "\n\n".join([*(markdown_table(*table) for table in tables), *notes]) + "\n"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table of text in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def notes_on(rows: list[dict[str, Any]], cells: list[Cell]) -> list[str]:
    """What has to be said about a table: what the numbers are, the load, and what is missing."""
    done = [cell.numbers for cell in cells if cell.state == "done"]
    notes = [
        "Scores are means over the test images, then means ± standard deviations over the seeds; "
        "times are medians and memory the most over the seeds. Training seconds are those of all "
        "steps for each training image of an epoch, steps for α included."
    ]
    if done:
        notes.append(_load_note(done))
    return notes + [f"{row['title']}: {row['reason']}." for row in rows if row["missing"]]


def _load_note(done: list[dict[str, Any]]) -> str:
    threads = max(numbers["threads"] for numbers in done)
    loads = [numbers["load"] for numbers in done]
    note = (
        f"Times were taken with one cell at a time, {threads} threads each on a machine of "
        f"{done[0]['processors']} processors ({done[0]['device']}), while its load average was "
        f"{min(loads):.1f} to {max(loads):.1f}"
    )
    # A cell itself adds one for each of its threads, and half a one beside them.
    if max(loads) > threads + 0.5:
        return f"{note}: other work ran beside the cells, so times compare only roughly."
    return f"{note}: nothing of weight ran beside the cells, so times compare."


# ---- The terminal ------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr, flush=True)


def _outcome(cell: Cell) -> str:
    if cell.state != "done":
        return f"failed: {cell.reason}"
    dice = cell.numbers["scores"]["dice"]
    return "test Dice " + ("unknown" if dice is None else f"{dice:.4f}")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def check_complete(cells: Sequence[Cell], output: Path) -> None:
    """Says in one line which cells are missing.

    Raises:
        UserError: a cell was refused or failed.
    """
    missing = {}
    for cell in cells:
        if cell.state != "done":
            missing.setdefault(cell.method, cell.reason)
    if missing:
        count = sum(cell.state != "done" for cell in cells)
        raise UserError(
            f"{count} of {len(cells)} cells have no result ({_listed(missing)}); the others are in "
            f"{output / 'report.html'}"
        )


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{method}: {reason}" for method, reason in reasons.items())
