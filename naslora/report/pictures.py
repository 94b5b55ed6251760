"""Images with labels painted over them, and how they are embedded in a page."""

import base64
import functools
import io
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

# Pixels on the longer side of an embedded picture. 18 of them take well below 3 MB.
PICTURE_SIDE = 320
# Without colour subsampling, which keeps the edges of an overlay sharp, in a seventh of PNG.
JPEG: dict[str, Any] = {"format": "JPEG", "quality": 88, "subsampling": 0}
PAINTED_PIXELS = 1 << 18  # at once, to bound the memory for numbers of 8 bytes

Colour = tuple[int, int, int]

# Colours of the classes, distinct for every kind of colour vision. The first is rare in tissue,
# skin and soil.
OVERLAY: tuple[Colour, ...] = (
    (0, 200, 255),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (213, 94, 0),
    (0, 114, 178),
    (148, 103, 189),
    (140, 86, 75),
    (23, 190, 207),
)
UNKNOWN_COLOUR = (128, 128, 128)

# Kinds of errors, in colours that differ for every kind of colour vision.
ERRORS: dict[str, Colour] = {
    "missed": (0, 114, 178),
    "false alarm": (213, 94, 0),
    "another class": (204, 121, 167),
}
CHANGED = (230, 0, 200)
"""Pixels whose label a merge changes."""


class Merged(NamedTuple):
    """What the model predicts for an image after a merge."""

    prediction: np.ndarray
    """(H, W) integer labels."""
    dice: float | None
    """Dice of this image in [0, 1]; None if it is undefined."""


@dataclass(frozen=True, eq=False)
class Panel:
    """An image with its truth and its prediction."""

    name: str
    """Shown below the pictures, for instance the file's name."""
    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    truth: np.ndarray
    """(H, W) integer labels."""
    prediction: np.ndarray
    """(H, W) integer labels."""
    dice: float | None
    """Dice of this image in [0, 1]; None if it is undefined."""
    merged: dict[str, Merged] = field(default_factory=dict)
    """Predictions by way of merging."""
    rank: int | None = None
    """Its place among the images of the split by Dice, 1 for the worst; None without a Dice."""


def data_uri(pixels: np.ndarray, side: int = PICTURE_SIDE) -> str:
    """(H, W, 3) uint8 pixels, shrunk to a longer side, as the data URI of a JPEG."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(buffer, **JPEG)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def paint(image: np.ndarray, labels: np.ndarray, class_names: list[str]) -> np.ndarray:
    """Tints each class in its colour, with its border in the full colour and a black line around.

    ``image`` and the result are (H, W, 3) uint8 RGB. The (H, W) integer label 0, the background, is
    left unpainted; labels beyond the names of 0, 1, ... are painted grey.
    """
    height, width = labels.shape
    step, painted = max(1, PAINTED_PIXELS // max(1, width)), image.copy()
    classes = map(class_colour, range(1, len(class_names)))
    colours = np.array([(0, 0, 0), *classes, UNKNOWN_COLOUR], np.uint8)
    tints = 7 * colours.astype(np.uint16) + 10
    for top in range(0, height, step):
        bottom = min(top + step, height)
        own = labels[max(top - 1, 0) : bottom + 1]
        # One more label on every side. Beyond the image its outer pixels repeat.
        around = np.pad(own, ((int(top == 0), int(bottom == height)), (1, 1)), mode="edge")
        own = around[1:-1, 1:-1]
        sides = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
        border = np.flatnonzero(functools.reduce(np.logical_or, (own != side for side in sides)))
        kinds = np.where(unknown(own, class_names), len(colours) - 1, own).ravel()
        seen, pixels = np.flatnonzero(kinds != 0), painted[top:bottom].reshape(-1, 3)
        own = np.take(pixels, seen, 0).astype(np.uint16)
        pixels[seen] = (13 * own + np.take(tints, kinds[seen], 0)) // 20  # 0.35 of the colour
        pixels[border] = colours[kinds[border]]
    return painted


def in_turn(numbers: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Ten labels in turn for (H, W) numbers of objects, and names for them, for ``paint``."""
    own = 1 + (numbers.astype(np.int32) - 1) % len(OVERLAY)
    return np.where(numbers, own, 0), [""] * (1 + len(OVERLAY))


def paint_errors(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Marks the pixels that are wrong, in the colours of ``ERRORS``, on the image in dim grey.

    ``image`` and the result are (H, W, 3) uint8 RGB, the others (H, W) integer labels, 0 for the
    background.
    """
    grey = image.mean(-1, keepdims=True) * 0.55
    painted = np.broadcast_to(grey, image.shape).astype(np.uint8)
    wrong = truth != prediction
    kinds = (prediction == 0, truth == 0, (truth != 0) & (prediction != 0))
    for colour, of_kind in zip(ERRORS.values(), kinds, strict=True):
        painted[wrong & of_kind] = colour
    return painted


def unknown(labels: np.ndarray, class_names: list[str]) -> np.ndarray:
    """(H, W) bool of (H, W) labels: True where a label has no class name."""
    return (labels < 0) | (labels >= max(1, len(class_names)))


def class_colour(label: int) -> Colour:
    """RGB colour of a foreground class; ten colours in turn."""
    return OVERLAY[(label - 1) % len(OVERLAY)]
