"""Section "Examples": test images with their truth and their prediction."""

from dataclasses import replace
from html import escape

import numpy as np
from PIL import Image

from naslora.report.html import section
from naslora.report.numbers import is_known, number
from naslora.report.pictures import (
    PICTURE_SIDE,
    UNKNOWN_COLOUR,
    Panel,
    class_colour,
    data_uri,
    paint,
    unknown,
)


def examples_section(panels: list[Panel], class_names: list[str]) -> str:
    """The panels below a legend of the classes; empty without panels."""
    if not panels:
        return ""
    labels = [label for panel in panels for label in (panel.truth, panel.prediction)]
    unnamed = any(unknown(label, class_names).any() for label in labels if label is not None)
    legend = [(name, class_colour(index)) for index, name in enumerate(class_names) if index > 0]
    legend += [("ignored or unknown", UNKNOWN_COLOUR)] if unnamed else []
    swatches = "".join(
        f'<li><i style="background: rgb{colour}"></i>{escape(name)}</li>' for name, colour in legend
    )
    figures = "".join(_panel(_shrink(panel), class_names) for panel in panels)
    body = f'<ul class="legend">{swatches}</ul><div class="panels">{figures}</div>'
    return section("Examples", body)


def _shrink(panel: Panel) -> Panel:
    """Shrinks the pictures of a panel to at most ``PICTURE_SIDE`` pixels a side."""
    height, width = panel.image.shape[:2]
    scale = min(1.0, PICTURE_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))

    def resize(labels: np.ndarray) -> np.ndarray:
        pixels = Image.fromarray(np.asarray(labels, dtype=np.int32))
        return np.asarray(pixels.resize(size, Image.Resampling.NEAREST))

    return replace(
        panel,
        image=np.asarray(Image.fromarray(panel.image).resize(size, Image.Resampling.LANCZOS)),
        truth=None if panel.truth is None else resize(panel.truth),
        prediction=resize(panel.prediction),
    )


def _panel(panel: Panel, class_names: list[str]) -> str:
    pictures = [_picture("Image", panel.name, panel.image)]
    for kind, labels in (("Truth", panel.truth), ("Prediction", panel.prediction)):
        if labels is None:
            pictures.append(f"<div><span>{kind}: none</span></div>")
        else:
            painted = paint(panel.image, labels, class_names)
            pictures.append(_picture(kind, panel.name, painted))
    dice = f"Dice {number(panel.dice)}" if is_known(panel.dice) else "no Dice"
    return (
        f'<figure><div class="pictures">{"".join(pictures)}</div>'
        f"<figcaption>{escape(panel.name)} · {dice}</figcaption></figure>"
    )


def _picture(kind: str, name: str, pixels: np.ndarray) -> str:
    height, width = pixels.shape[:2]
    return (
        f'<div><img src="{data_uri(pixels)}" width="{width}" height="{height}"'
        f' alt="{kind} of {escape(name)}"><span>{kind}</span></div>'
    )
