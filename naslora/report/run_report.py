"""The report of a run."""

from pathlib import Path
from typing import Any

from naslora.report.numbers import duration, is_known, number, reduce_known
from naslora.report.page import Cards, Part, write_page
from naslora.report.pictures import Panel
from naslora.report.sections.costs import parameters_parts, times_parts
from naslora.report.sections.examples import examples_parts
from naslora.report.sections.merging import merging_parts
from naslora.report.sections.operations import operations_parts
from naslora.report.sections.scores import scores_parts
from naslora.report.sections.training import training_parts
from naslora.results import Epoch, OperationHistory, RunResult, SplitScores

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
        "Training": training_parts(history, result.kept_epoch),
        "Operations": operations_parts(operations, history),
        "Parameters": parameters_parts(result.parameters),
        "Time": times_parts(history, result.seconds),
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
    # exact leaves a convolution beside SAM's own layers
    plain = {m: s.dice for m, s in (result.test_merged or {}).items() if m != "exact"}
    known = {mode: dice for mode, dice in plain.items() if is_known(dice)}
    if known:
        mode = max(known, key=known.__getitem__)
        cards.append(("Merged into SAM's layers", number(known[mode]), f"test Dice, {mode}"))
    if result.parameters:
        share = result.parameters.trainable / max(1, result.parameters.total)
        trained = f"{result.parameters.trainable:,}"
        cards.append(("Trainable parameters", trained, f"{share:.2%} of all"))
    cards.append(("Time", duration(result.seconds), ""))
    images = [f"{n:,} {SPLIT_TITLES.get(s, s)}" for s, n in (result.images or {}).items()]
    return [Cards(cards), *([f"Images: {', '.join(images)}."] if images else [])]
