"""The report of a run: one HTML file that loads nothing from elsewhere."""

from html import escape
from pathlib import Path
from typing import Any

from naslora.report.html import card, note
from naslora.report.numbers import count, duration, is_known, number, reduce_known
from naslora.report.page import configuration, page_title, write_page
from naslora.report.pictures import Panel
from naslora.report.sections.costs import (
    parameters_section,
    share_of_model,
    times_section,
    trainable_parameters,
)
from naslora.report.sections.examples import examples_section
from naslora.report.sections.merging import merging_section
from naslora.report.sections.operations import operations_section
from naslora.report.sections.scores import scores_section
from naslora.report.sections.training import training_section
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
        config: the run's configuration as JSON-ready values, shown whole. ``method``, ``model`` and
            ``dataset`` (or ``data``) make the title.
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
    title = page_title(config)
    images = (result.images or {}).get("test")
    sections = (  # first whether it worked, then why, then what it took
        scores_section(result),
        examples_section(panels, class_names, images),
        merging_section(result, panels, class_names),
        training_section(history, result.kept_epoch),
        operations_section(operations, history),
        parameters_section(result),
        times_section(history, result.seconds),
        configuration(config),
    )
    write_page(path, title, _header(title, result), "".join(sections))


def _header(title: str, result: RunResult) -> str:
    """The title, cards with the main numbers, and the number of images."""
    name, scores = ("Test", result.test) if result.test else ("Validation", result.val)
    scores = scores or SplitScores()
    seconds = f"{result.seconds:,.0f} s" if is_known(result.seconds) else ""
    cards = (
        card(f"{name} Dice", number(scores.dice), _worst(scores)),
        card(f"{name} IoU", number(scores.iou), ""),
        _merged_card(result),
        card("Trainable parameters", count(trainable_parameters(result)), share_of_model(result)),
        card("Time", duration(result.seconds), seconds),
    )
    return f'<h1>{escape(title)}</h1><dl class="headline">{"".join(cards)}</dl>{_images(result)}'


def _worst(scores: SplitScores) -> str:
    """The Dice of the worst image in words; empty if unknown."""
    worst = reduce_known(min, scores.image_dice or [])
    return "" if worst is None else f"worst image {number(worst)}"


def _merged_card(result: RunResult) -> str:
    """A card with the best Dice of a merge that leaves SAM's own layers; empty without one."""
    plain = {m: s.dice for m, s in (result.test_merged or {}).items() if m != "exact"}
    known = {mode: dice for mode, dice in plain.items() if is_known(dice)}
    if not known:
        return ""
    mode = max(known, key=known.__getitem__)
    return card("Merged into SAM's layers", number(known[mode]), f"test Dice, {escape(mode)}")


def _images(result: RunResult) -> str:
    parts = [
        f"{count(images)} {escape(SPLIT_TITLES.get(split, split))}"
        for split, images in (result.images or {}).items()
    ]
    return note(f"Images: {', '.join(parts)}.") if parts else ""
