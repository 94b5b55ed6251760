"""Section "Scores": what the model reaches on each split, before and after merging."""

from collections.abc import Mapping
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from naslora.metrics import METRICS
from naslora.report.figures import BLUE, ORANGE, Drawing
from naslora.report.numbers import MISSING, is_known, number
from naslora.report.page import Part
from naslora.report.tables import Table
from naslora.results import RunResult, SplitScores


def scores_parts(result: RunResult) -> list[Part]:
    """A table of all splits and ways of merging, a plot, and the data set's metrics."""
    named = {"Validation": result.val, "Test": result.test}
    named["Test, weights of the last step"] = result.test_last
    named["Test, in float32"] = result.test_float32
    named |= {f"Test, merged ({m})": scores for m, scores in (result.test_merged or {}).items()}
    known = {name: scores for name, scores in named.items() if scores}
    if not known:
        return ["This run has neither validation nor test scores."]
    parts: list[Part] = [_score_table(known), *_histogram(result)]
    if result.test is None:
        parts.append("This run has no test scores.")
    elif result.test.metrics:
        parts += [f"Test, scored at the resolution {result.test.resolution or MISSING}."]
        parts += [metric_table(result.test)] if _says_more(result.test) else []
    return parts


def _says_more(test: SplitScores) -> bool:
    """Whether the data set is reported by more than the means in the table of all splits."""
    means = {"dice": test.dice, "iou": test.iou, "accuracy": test.accuracy}
    further = {name for name, value in (test.metrics or {}).items() if means.get(name) != value}
    return bool(further or test.groups)


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


def _histogram(result: RunResult) -> list[Drawing]:
    """The images of the test split, or else of the validation split, by their Dice."""
    name, scores = ("test", result.test) if result.test else ("validation", result.val)
    known = [dice for dice in (scores.image_dice if scores else None) or [] if is_known(dice)]
    caption = f"Number of {name} images by their Dice. The line is the median."
    draw = partial(_draw_images, dice=known)
    return [Drawing("images", caption, draw, (4.6, 2.3))] if known else []


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
