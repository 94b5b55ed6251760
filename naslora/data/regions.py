"""Masks that pycocotools draws from polygons and run lengths, as COCO stores instances.

Its C code trusts what it gets: it reads beyond a broken string, and leaves memory uninitialised
after runs that are too short. The types below and ``_decode`` refuse such values before.
"""

from typing import Annotated, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta
from pycocotools import mask as coco

from naslora.errors import UserError

MOST_PIXELS = 3 << 24
"""Of an image. In larger ones, run lengths may take more characters than pycocotools allocates."""
LONGEST_OUTLINE = 1 << 22
"""Pixels. pycocotools takes 80 bytes for each pixel of a polygon's outline."""

Polygon = Annotated[list[Annotated[float, Meta(ge=-1e6, le=1e6)]], Meta(min_length=6)]
"""x, y, x, y, ... in pixels; (0, 0) is the corner of the image."""
# A number of at most 30 bits: up to five characters that say that more follow, and one that ends.
CompressedRuns = Annotated[str, Meta(pattern=r"^([P-o]{0,5}[0-O])+\Z")]


class Runs(msgspec.Struct):
    """Run lengths: of zeros and ones in turn, zeros first, down the columns."""

    size: tuple[int, int]
    """Height and width."""
    counts: list[Annotated[int, Meta(ge=0, le=MOST_PIXELS)]] | CompressedRuns


class Instance(msgspec.Struct):
    """One instance of a class."""

    image_id: int | str
    category_id: int
    segmentation: list[Polygon] | Runs | None = None
    id: int | str | None = None
    iscrowd: int | bool = 0


class Drawing(msgspec.Struct):
    """What the mask of one image is drawn from."""

    height: int
    width: int
    instances: list[tuple[int, Instance]]
    """Each with its label."""


def draw_annotation(content: bytes, ignored: int, where: str) -> np.ndarray:
    """Draws the mask of an image, (H, W) int32 labels.

    ``content`` is a ``Drawing`` as JSON, ``ignored`` the label of pixels in instances of several
    classes, ``where`` the start of an error message.

    Raises:
        UserError: run lengths have another size than the image, or do not add up to it; a polygon
            has an odd number of coordinates, or is too long.
    """
    drawing = msgspec.json.decode(content, type=Drawing)
    mask = np.zeros((drawing.height, drawing.width), np.int32)
    for label, instance in drawing.instances:
        if label == 0:
            continue
        inside = _draw(instance, drawing, where)
        other = inside & (mask != 0) & (mask != label)
        mask[inside] = label
        mask[other] = ignored
    return mask


class Objects(NamedTuple):
    """What ``draw_objects`` draws."""

    numbers: np.ndarray
    """(H, W) int32: 0 is no object."""
    overlapping: bool
    """Whether instances have pixels in common."""
    crowds: int
    """Number of crowds, which are left out."""


def draw_objects(content: bytes, where: str) -> Objects:
    """Draws the instances of an image, the largest first, so that a smaller one covers it.

    Arguments and errors as ``draw_annotation``. Instances with the label 0 are left out.
    """
    drawing = msgspec.json.decode(content, type=Drawing)
    own = [instance for label, instance in drawing.instances if label]
    drawn = [_draw(instance, drawing, where) for instance in own if not instance.iscrowd]
    numbers = np.zeros((drawing.height, drawing.width), np.int32)
    for number, inside in enumerate(sorted(drawn, key=np.sum, reverse=True), start=1):
        numbers[inside] = number
    overlapping = sum(map(np.sum, drawn)) > (numbers > 0).sum()
    return Objects(numbers, bool(overlapping), len(own) - len(drawn))


def _draw(instance: Instance, drawing: Drawing, where: str) -> np.ndarray:
    """Draws one instance, (H, W) bool."""
    where = f"{where}: annotation {instance.id}"
    height, width = drawing.height, drawing.width
    parts = instance.segmentation
    if isinstance(parts, Runs):
        if parts.size != (height, width):
            raise UserError(
                f"{where} has run lengths of {parts.size[1]}x{parts.size[0]} pixels (width x "
                f"height), its image has {width}x{height}"
            )
        return _decode(parts.counts, height, width, where)
    inside = np.zeros((height, width), bool)
    for polygon in parts or ():
        if len(polygon) % 2:
            raise UserError(f"{where} has a polygon of {len(polygon)} numbers; x or y is missing")
        points = np.array(polygon).reshape(-1, 2)
        steps = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1)
        if steps.sum() > LONGEST_OUTLINE:
            raise UserError(
                f"{where} has a polygon with an outline of {steps.sum():.0f} pixels; correct its "
                "coordinates, which are pixels of the image"
            )
        inside |= coco.decode(coco.frPyObjects([polygon], height, width)[0]).astype(bool)
    return inside


def _decode(counts: list[int] | str, height: int, width: int, where: str) -> np.ndarray:
    """Draws run lengths, (H, W) bool."""
    pixels = height * width
    if isinstance(counts, list):
        if sum(counts) == pixels:
            return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
    # A mask of one pixel less is too small for them: too few would leave memory as it is.
    elif (
        _fill(counts, pixels - 1, 1) is None and (mask := _fill(counts, height, width)) is not None
    ):
        return mask
    raise UserError(f"{where} has run lengths that do not add up to {pixels} pixels; correct it")


def _fill(counts: str, height: int, width: int) -> np.ndarray | None:
    """Draws compressed run lengths; None if they have more pixels than the mask."""
    try:
        return coco.decode({"size": [height, width], "counts": counts}).astype(bool)
    except ValueError:
        return None
