"""Section "Scores": what the model reaches on each split, before and after merging."""

from collections.abc import Mapping
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from naslora.metrics import METRICS
from naslora.report.figures import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    Drawing,
    as_array,
    draw_row_axis,
)
from naslora.report.numbers import MISSING, is_known, number
from naslora.report.page import Part
from naslora.report.tables import Table
from naslora.results import RunResult, SplitScores


def scores_parts(result: RunResult) -> list[Part]:
    """Plots, a table of all splits and ways of merging, and one of the data set's metrics."""
    named = {"Validation": result.val, "Test": result.test}
    named |= {f"Test, merged ({m})": scores for m, scores in (result.test_merged or {}).items()}
    known = {name: scores for name, scores in named.items() if scores}
    if not known:
        return ["This run has neither validation nor test scores."]
    parts: list[Part] = [*_drawings(result), _score_table(known)]
    if result.test is None:
        parts.append("This run has no test scores.")
    elif result.test.metrics:
        parts += [f"Test, scored at the resolution {result.test.resolution or MISSING}:"]
        parts += [metric_table(result.test)]
    return parts


def _score_table(known: Mapping[str, SplitScores]) -> Table:
    """The means of each split, and of each class if there are several."""
    rows = []
    for name, scores in known.items():
        rows.append([name, number(scores.dice), number(scores.iou), number(scores.accuracy)])
        classes = scores.per_class or {}
        if len(classes) > 1:
            rows += [
                [f"{name}, {title}", number(own.dice), number(own.iou), ""]
                for title, own in classes.items()
            ]
    return Table(["", "Dice", "IoU", "Pixel accuracy"], rows)


def _drawings(result: RunResult) -> list[Drawing]:
    """Bars of the classes and of the images, of the test split or else of the validation split."""
    name, scores = ("test", result.test) if result.test else ("validation", result.val)
    drawings = []
    if scores and scores.per_class:
        merged = {mode: own for mode, own in (result.test_merged or {}).items() if own.per_class}
        caption = f"Dice and IoU of each class on the {name} images"
        caption += ", and its Dice after each way of merging." if merged and result.test else "."
        draw = partial(_draw_classes, scores=scores, merged=merged if result.test else {})
        drawings.append(Drawing("classes", caption, draw, (4.6, 1.3 + 0.5 * len(scores.per_class))))
    known = [dice for dice in (scores.image_dice if scores else None) or [] if is_known(dice)]
    if known:
        caption = f"Number of {name} images by their Dice. The line is the median."
        drawings.append(Drawing("images", caption, partial(_draw_images, dice=known), (4.6, 2.3)))
    return drawings


def _draw_classes(axes: Axes, scores: SplitScores, merged: Mapping[str, SplitScores]) -> None:
    classes = scores.per_class or {}
    places = np.arange(len(classes))
    for offset, colour, label in ((-0.2, BLUE, "Dice"), (0.2, GREEN, "IoU")):
        values = as_array(getattr(own, label.lower()) for own in classes.values())
        axes.barh(places + offset, values, height=0.38, color=colour, label=label)
    # One above the other, because they often agree.
    marks = ((-0.32, ORANGE, "D"), (-0.2, PURPLE, "s"), (-0.08, INK, "^"))
    for (mode, own), (offset, colour, marker) in zip(merged.items(), marks, strict=False):
        found = own.per_class or {}
        dice = as_array(found[name].dice if name in found else None for name in classes)
        axes.plot(
            dice, places + offset, marker, color=colour, markersize=4, label=mode, linestyle="none"
        )
    draw_row_axis(axes, list(classes))
    axes.set_xlim(0, 1)
    # Of the figure, because long names of classes leave the axes narrow.
    axes.figure.legend(loc="outside upper center", ncols=5, handlelength=1.2, columnspacing=0.8)


def _draw_images(axes: Axes, dice: list[float]) -> None:
    axes.hist(dice, bins=20, range=(0, 1), color=BLUE, rwidth=0.9)
    axes.axvline(float(np.median(dice)), color=ORANGE, linewidth=1.5)
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Dice")
    axes.set_ylabel("images")


def metric_table(scores: SplitScores) -> Table:
    """The metrics of a split, over all its images and over each of its groups.

    A metric is a row. A metric of classes has one row a class.
    """
    metrics, groups = scores.metrics or {}, scores.groups or {}
    head = ["Metric", "All", *(f"{name} ({group.images})" for name, group in groups.items())]
    columns = [metrics, *(group.metrics for group in groups.values())]
    rows = []
    for name, value in metrics.items():
        label = METRICS[name].label if name in METRICS else name
        for part in value if isinstance(value, dict) else [None]:
            values = [column[name] for column in columns]
            found = [own.get(part or "") if isinstance(own, dict) else own for own in values]
            rows.append([label if part is None else f"{label}, {part}", *map(number, found)])
    return Table(head, rows)
