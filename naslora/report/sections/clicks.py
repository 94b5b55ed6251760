"""Scores of a promptable run by clicks, beside the untouched model, and pictures of the clicks."""

from collections.abc import Iterable
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw

from naslora.report.figures import BLUE, ORANGE, Drawing
from naslora.report.page import Part
from naslora.report.pictures import PICTURE_SIDE, paint
from naslora.report.tables import Table, number
from naslora.results import RunResult

DOT = 3
"""Radius of a click in pixels."""
CLICKS_NOTE = "Each object has a colour. White dots are clicks on it, black ones are off it."


def scores_parts(result: RunResult) -> list[Part]:
    """A table of the test scores of all models, and the IoU by clicks."""
    named = {"Untouched": result.untouched, "Fine-tuned": result.test}
    named["Fine-tuned, weights of the last step"] = result.test_last
    named["Fine-tuned, in float32"] = result.test_float32
    named |= {f"Merged ({mode})": scores for mode, scores in result.test_merged.items()}
    known = {name: scores.metrics for name, scores in named.items() if scores}
    rows = []
    for title in result.test.metrics:
        values = [metrics[title] for metrics in known.values()]
        rows.append([title, *(number(v) for v in values if not isinstance(v, dict))])
    return [
        f"Means over the objects of the test images, at {result.test.resolution}. The first click "
        "is the centre of the object, each further one the centre of the largest error. NoC is the "
        "number of clicks until the IoU is reached, at most 8.",
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


def draw_clicks(
    image: np.ndarray, objects: np.ndarray, clicks: Iterable[tuple[float, float, bool]]
) -> np.ndarray:
    """Paints objects and clicks over an image.

    Args:
        image: (H, W, 3) uint8 RGB.
        objects: (H, W) int: the number of the object at each pixel, 0 for none.
        clicks: x, y, and whether the click is on the object.

    Returns:
        (H, W, 3) uint8 RGB, at most ``PICTURE_SIDE`` a side.
    """
    names = ["background", *(f"object {k}" for k in range(1, int(objects.max()) + 1))]
    picture = Image.fromarray(paint(image, objects, names))
    scale = min(1, PICTURE_SIDE / max(picture.size))
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    pen = ImageDraw.Draw(picture)
    for x, y, on in clicks:
        colours = ("white", "black") if on else ("black", "white")
        pen.circle((x * scale, y * scale), DOT, fill=colours[0], outline=colours[1])
    return np.asarray(picture)
