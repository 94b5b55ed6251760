"""Section "Test images": the worst and the best, with truth, prediction and errors, or clicks."""

from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from naslora.report.page import Legend, Part, Pictures
from naslora.report.pictures import (
    CHANGED,
    ERRORS,
    PICTURE_SIDE,
    UNKNOWN_COLOUR,
    Panel,
    class_colour,
    paint,
    paint_errors,
    unknown,
)
from naslora.report.tables import number

MOST_CHANGED = 2  # images that are shown before and after merging
DOT = 3
"""Radius of a click in pixels."""
CLICKS_NOTE = "Each object has a colour. White dots are clicks on it, black ones are off it."


def examples_parts(panels: list[Panel], class_names: list[str], images: int) -> list[Part]:
    """The panels below a legend of the classes and errors; nothing without panels.

    ``class_names`` are those of the labels 0, 1, ...; ``images`` is the number of test images.
    """
    if not panels:
        return []
    labels = [label for panel in panels for label in (panel.truth, panel.prediction)]
    unnamed = any(unknown(label, class_names).any() for label in labels)
    legend = [(name, class_colour(index)) for index, name in enumerate(class_names) if index > 0]
    kinds = list(ERRORS.items())[: 3 if len(class_names) > 2 else 2]
    parts: list[Part] = [
        Legend(legend + [("ignored or unknown", UNKNOWN_COLOUR)] * unnamed),
        Legend([(f"error: {name}", colour) for name, colour in kinds]),
    ]
    return parts + [_panel(panel, class_names, images) for panel in panels]


def _small(values: np.ndarray) -> np.ndarray:
    """(H, W, 3) pixels or (H, W) labels, shrunk to at most ``PICTURE_SIDE`` a side."""
    labels = values.ndim == 2
    picture = Image.fromarray(values.astype(np.int32) if labels else values)
    how = Image.Resampling.NEAREST if labels else Image.Resampling.LANCZOS
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), how)
    return np.asarray(picture)


def _panel(panel: Panel, class_names: list[str], images: int) -> Pictures:
    image, truth, prediction = map(_small, (panel.image, panel.truth, panel.prediction))
    # What is to be ignored is no error.
    known = np.where(unknown(truth, class_names), prediction, truth)
    pictures = [
        ("Image", image),
        ("Truth", paint(image, truth, class_names)),
        ("Prediction", paint(image, prediction, class_names)),
        ("Errors", paint_errors(image, known, prediction)),
    ]
    dice = "no Dice" if panel.dice is None else f"Dice {number(panel.dice)}"
    rank = "" if panel.rank is None else f" · rank {panel.rank} of {images}"
    return Pictures(panel.name, f"{panel.name} · {dice}{rank}", pictures)


def merged_parts(panels: list[Panel], class_names: list[str]) -> list[Part]:
    """The images that merging changes most, before and after; a note if none changes."""
    changed = [panel for panel in panels if any(_changed(panel).values())]
    changed.sort(key=lambda panel: max(_changed(panel).values()), reverse=True)
    if not changed:
        same = any(panel.merged for panel in panels)
        return ["No pixel of the images above changes by merging."] if same else []
    legend = Legend([("changed by the merge", CHANGED)])
    shown = [_before_and_after(panel, class_names) for panel in changed[:MOST_CHANGED]]
    return ["The images that merging changes most, before and after:", legend, *shown]


def _changed(panel: Panel) -> dict[str, float]:
    """The share of pixels whose label each merge changes."""
    merged = panel.merged.items()
    return {mode: float((own.prediction != panel.prediction).mean()) for mode, own in merged}


def _before_and_after(panel: Panel, class_names: list[str]) -> Pictures:
    image, prediction, changed = _small(panel.image), _small(panel.prediction), _changed(panel)
    pictures = [(f"Before, Dice {number(panel.dice)}", paint(image, prediction, class_names))]
    for mode, merged in panel.merged.items():
        if changed[mode] > 0:
            labels = _small(merged.prediction)
            after = paint(image, labels, class_names)
            after[labels != prediction] = CHANGED
            label = f"{mode}, Dice {number(merged.dice)}, {changed[mode]:.2%} changed"
            pictures.append((label, after))
    same = [mode for mode, share in changed.items() if share == 0]
    unchanged = f" · unchanged by {', '.join(same)}" if same else ""
    return Pictures(panel.name, panel.name + unchanged, pictures)


def draw_clicks(
    image: np.ndarray, objects: np.ndarray, clicks: Iterable[tuple[float, float, bool]]
) -> np.ndarray:
    """Paints objects, and clicks as dots, over an image.

    ``image`` is (H, W, 3) uint8 RGB, ``objects`` (H, W) the number of the object at each pixel, 0
    for none. A click is x, y, and whether it is on the object. Returns (H, W, 3) uint8 RGB, at most
    ``PICTURE_SIDE`` a side.
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
