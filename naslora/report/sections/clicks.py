"""Sections of a promptable run: scores by clicks, beside the untouched model, and pictures."""

from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw

from naslora.report.figures import BLUE, ORANGE, Drawing
from naslora.report.page import Part, Pictures
from naslora.report.pictures import PICTURE_SIDE, Prompted, View, paint
from naslora.report.tables import Table, number
from naslora.results import RunResult, SplitScores

DOT = 3
"""Radius of a click in pixels."""


def scores_parts(result: RunResult) -> list[Part]:
    """A table of the test scores of all models, and the IoU by clicks."""
    named = {"Untouched": result.untouched, "Fine-tuned": result.test}
    named["Fine-tuned, weights of the last step"] = result.test_last
    named["Fine-tuned, in float32"] = result.test_float32
    named |= {f"Merged ({mode})": scores for mode, scores in (result.test_merged or {}).items()}
    known = {name: scores.metrics for name, scores in named.items() if scores and scores.metrics}
    rows = []
    for title in known.get("Fine-tuned", {}):
        values = [metrics[title] for metrics in known.values()]
        rows.append([title, *(number(v) for v in values if not isinstance(v, dict))])
    test = result.test or SplitScores()
    return [
        f"Means over the objects of the test images, at {test.resolution}. The first click is the "
        "centre of the object, each further one the centre of the largest error. NoC is the number "
        "of clicks until the IoU is reached, at most 8.",
        Table(["", *known], rows),
        Drawing("clicks", "Mean IoU by clicks.", partial(_draw_clicks, result=result), (4.6, 2.8)),
    ]


def _draw_clicks(axes: Axes, result: RunResult) -> None:
    for name, scores, colour in (
        ("untouched", result.untouched, ORANGE),
        ("fine-tuned", result.test, BLUE),
    ):
        if scores is not None and scores.click_iou:
            clicks = range(1, len(scores.click_iou) + 1)
            axes.plot(clicks, scores.click_iou, "o-", label=name, color=colour)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("clicks")
    axes.set_ylabel("IoU")
    axes.legend()


def prompted_parts(panels: list[Prompted]) -> list[Part]:
    """The masks of test images from their clicks, before training and after it."""
    note = "Each object has a colour. White dots are clicks on it, black ones are off it."
    pictures = []
    for panel in panels:
        shown = [(view.title, _drawn(panel, view)) for view in panel.views]
        pictures.append(Pictures(panel.name, panel.name, shown))
    return [note, *pictures] if pictures else []


def _drawn(panel: Prompted, view: View) -> np.ndarray:
    """(H, W, 3) uint8: the image with masks and clicks, at most ``PICTURE_SIDE`` a side."""
    names = ["background", *(f"object {k}" for k in range(1, int(view.objects.max()) + 1))]
    picture = Image.fromarray(paint(panel.image, view.objects, names))
    scale = PICTURE_SIDE / max(picture.size)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    pen = ImageDraw.Draw(picture)
    for x, y, on in view.clicks:
        colours = ("white", "black") if on else ("black", "white")
        pen.circle((x * min(scale, 1), y * min(scale, 1)), DOT, fill=colours[0], outline=colours[1])
    return np.asarray(picture)
