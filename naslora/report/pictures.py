"""Pictures: images with their labels painted over them, embedded as JPEG."""

import base64
import io
from dataclasses import dataclass, replace
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

from naslora.report.html import is_known, number, section

# Pixels on the longer side of an embedded picture: 18 of them stay well below 3 MB.
PICTURE_SIDE = 320


PICTURE_ROW = 4 * PICTURE_SIDE  # of pictures that stand in a row


# Colours of classes on pictures, apart from each other for every kind of colour vision.
OVERLAY = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (213, 94, 0),
    (0, 114, 178),
    (148, 103, 189),
    (140, 86, 75),
    (23, 190, 207),
)


OVERLAY_UNKNOWN = (128, 128, 128)


@dataclass(frozen=True, eq=False)
class Panel:
    """One example: a picture beside its truth and its prediction.

    Attributes:
        name: what to call it, for instance the file's name.
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) integer labels, None where there is no truth.
        prediction: (H, W) integer labels.
        dice: Dice of this image, in [0, 1], None where it is not known.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray | None
    prediction: np.ndarray
    dice: float | None


class Picture(NamedTuple):
    """Pixels, (H, W, 3) uint8."""

    caption: str
    image: np.ndarray


def picture_figure(picture: Picture) -> str:
    image = Image.fromarray(picture.image)
    image.thumbnail((PICTURE_ROW, PICTURE_ROW))
    return (
        f'<figure><img src="{data_uri(np.asarray(image))}" alt="{escape(picture.caption)}" '
        f'style="width: 100%; height: auto"><figcaption>{escape(picture.caption)}</figcaption>'
        "</figure>"
    )


def panel_section(panels: list[Panel], class_names: list[str]) -> str:
    if not panels:
        return ""
    labels = [label for panel in panels for label in (panel.truth, panel.prediction)]
    strange = any(_unknown(label, class_names).any() for label in labels if label is not None)
    legend = [(name, _colour(index)) for index, name in enumerate(class_names) if index > 0]
    legend += [("ignored or unknown", OVERLAY_UNKNOWN)] if strange else []
    swatches = "".join(
        f'<li><i style="background: rgb{colour}"></i>{escape(name)}</li>' for name, colour in legend
    )
    figures = "".join(_panel(_shrink(panel), class_names) for panel in panels)
    body = f'<ul class="legend">{swatches}</ul><div class="panels">{figures}</div>'
    return section("Examples", body)


def _shrink(panel: Panel) -> Panel:
    """The panel at no more than ``PICTURE_SIDE`` pixels a side."""
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


def data_uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    # JPEG without colour subsampling: the edges of the overlay stay sharp at a fraction of a PNG.
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def paint(image: np.ndarray, labels: np.ndarray, class_names: list[str]) -> np.ndarray:
    """Tints each class in its colour and draws its border in full: (H, W, 3) uint8."""
    colours = np.zeros_like(image)
    for index in range(1, len(class_names)):
        colours[labels == index] = _colour(index)
    colours[_unknown(labels, class_names)] = OVERLAY_UNKNOWN
    neighbours = np.pad(labels, 1, mode="edge")
    around = (neighbours[:-2, 1:-1], neighbours[2:, 1:-1], neighbours[1:-1, :-2])
    border = np.any([labels != other for other in (*around, neighbours[1:-1, 2:])], axis=0)
    opacity = np.where(border, 1, 0.45) * (labels != 0)
    blend = image + opacity[..., None] * (colours.astype(float) - image)
    return blend.round().astype(np.uint8)


def _unknown(labels: np.ndarray, class_names: list[str]) -> np.ndarray:
    return (labels < 0) | (labels >= max(1, len(class_names)))


def _colour(label: int) -> tuple[int, int, int]:
    return OVERLAY[(label - 1) % len(OVERLAY)]
