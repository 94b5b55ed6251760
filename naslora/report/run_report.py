"""The report of a run."""

import shlex
from pathlib import Path
from statistics import fmean
from typing import Any

from naslora.report.numbers import duration, is_known, number, reduce_known
from naslora.report.page import Cards, Code, Part, write_page
from naslora.report.pictures import Panel
from naslora.report.sections.examples import examples_parts
from naslora.report.sections.merging import merging_parts
from naslora.report.sections.operations import operations_parts
from naslora.report.sections.scores import scores_parts
from naslora.report.sections.training import training_parts
from naslora.report.tables import Table
from naslora.results import Epoch, OperationHistory, ParameterCounts, RunResult, SplitScores

SPLIT_TITLES = {
    "train": "training",
    "arch": "architecture",
    "val": "validation",
    "test": "test",
}


def write_report(
    path: Path,
    *,
    config: dict[str, Any],
    result: RunResult,
    history: list[Epoch],
    operations: OperationHistory | None,
    panels: list[Panel],
    class_names: list[str],
) -> None:
    """Writes a run's report as one self-contained HTML file, atomically.

    A section whose part of the result is None is left out, or says that it is missing.

    Args:
        path: the file to write. Its folder is made if needed.
        config: the run's configuration, as ``page_title`` takes it, shown whole.
        result: what the run reports.
        history: one record an epoch; may be empty.
        operations: the path of alpha; None for a method without alpha.
        panels: test images to show, the worst first.
        class_names: names of the labels 0, 1, ..., so two for a binary task. Label 0 is the
            background, which is left unpainted.

    Raises:
        UserError: the file cannot be created.
        OSError: writing fails, for instance on a full disk. An older file then keeps its content.
    """
    sections = {  # first whether it worked, then why, then what it took
        "Scores": scores_parts(result),
        "Test images": examples_parts(panels, class_names, (result.images or {}).get("test")),
        "Merging": merging_parts(result, panels, class_names),
        "What next": _commands(path.parent, result),
        "Training": training_parts(history, result.kept_epoch),
        "Operations": operations_parts(operations, history),
        "Parameters": _parameters(result.parameters),
        "Time": _times(history, result.seconds),
    }
    write_page(path, page_title(config), config, _header(result), sections)


def page_title(config: dict[str, Any], method: str = "") -> str:
    """The title of a run's page: method, model and data.

    Args:
        config: the configuration as JSON-ready values.
        method: replaces the configuration's.
    """
    dataset, root = config["data"]["dataset"], config["data"]["root"]
    own = dataset in ("csv", "folders", "coco") and root  # a layout; the folder has the data's name
    data = Path(root).name if own else dataset
    return f"{method or config['method']} on {config['model']['name']} for {data}"


def _header(result: RunResult) -> list[Part]:
    """Cards with the main numbers, and the number of images."""
    name, scores = ("Test", result.test) if result.test else ("Validation", result.val)
    scores = scores or SplitScores()
    worst = reduce_known(min, scores.image_dice or [])
    detail = "" if worst is None else f"worst image {number(worst)}"
    cards = [
        (f"{name} Dice", number(scores.dice), detail),
        (f"{name} IoU", number(scores.iou), ""),
    ]
    mode, dice = _best_merge(result)
    if mode and mode != "exact":
        cards.append(("Merged into SAM's layers", number(dice), f"test Dice, {mode}"))
    if result.parameters:
        share = result.parameters.trainable / max(1, result.parameters.total)
        trained = f"{result.parameters.trainable:,}"
        cards.append(("Trainable parameters", trained, f"{share:.2%} of all"))
    cards.append(("Time", duration(result.seconds), ""))
    images = [f"{n:,} {SPLIT_TITLES.get(s, s)}" for s, n in (result.images or {}).items()]
    return [Cards(cards), *([f"Images: {', '.join(images)}."] if images else []), *result.notes]


def _best_merge(result: RunResult) -> tuple[str, float | None]:
    """The way of merging with the highest test Dice; "" without one."""
    merged = {m: s.dice for m, s in (result.test_merged or {}).items() if is_known(s.dice)}
    # exact leaves a convolution beside SAM's own layers
    plain = {mode: dice for mode, dice in merged.items() if mode != "exact"} or merged
    mode = max(plain, key=plain.__getitem__, default="")
    return mode, plain.get(mode)


def _commands(run: Path, result: RunResult) -> list[Part]:
    """The commands that use the run."""
    mode, _ = _best_merge(result)
    model = run.with_name(f"{run.name}-merged") if mode else run
    commands = [("evaluate", run), ("predict", run, "IMAGES", "--output", f"{run}-masks")]
    if mode:
        commands.append(("merge", run, "--mode", mode, "--output", model))
    commands.append(("export", model, "--format", "onnx", "--output", f"{run}.onnx"))
    lines = [shlex.join(["naslora", *map(str, command)]) for command in commands]
    return [
        "Score the run again, segment images, merge the adapter, export the model:",
        Code("\n".join(lines)),
    ]


def _parameters(counts: ParameterCounts | None) -> list[Part]:
    """A table of parameters by part of the model; nothing if they were not counted."""
    if counts is None:
        return []
    parts = {
        "Frozen": counts.frozen,
        "Decoder": counts.decoder,
        "Trained in the encoder": counts.adapter,
        "Architecture (α)": counts.architecture,
        "Total trainable": counts.trainable,
    }
    rows = [[name, f"{count:,}"] for name, count in parts.items()]
    return [Table(["Part", "Parameters"], rows, total=True)]


def _times(history: list[Epoch], total: float | None) -> list[Part]:
    """A table of seconds by phase; nothing if nothing was timed.

    Args:
        history: one record an epoch; may be empty.
        total: seconds of the whole run; None if unknown.
    """
    if not history and not is_known(total):
        return []
    phases = {
        "Weight steps": [epoch.seconds.weights for epoch in history],
        "Architecture steps": [epoch.seconds.architecture for epoch in history],
        "Evaluation": [epoch.seconds.evaluation for epoch in history],
    }
    rows, spent = [], 0.0
    for label, seconds in phases.items():
        # The mean is over the epochs that had such steps. Stage 1 has no architecture steps.
        ran = [value for value in seconds if is_known(value) and value > 0]
        spent += sum(ran)
        mean = number(reduce_known(fmean, ran), ".2f")
        rows.append([label, f"{sum(ran):,.1f}", mean, str(len(ran))])
    if is_known(total):
        rows.append(["Everything else", f"{max(0.0, total - spent):,.1f}", "", ""])
        rows.append(["Total", f"{total:,.1f}", "", ""])
    head = ["", "Seconds", "Seconds per epoch", "Epochs"]
    return [Table(head, rows, total=is_known(total))]
