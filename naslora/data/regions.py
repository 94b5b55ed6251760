"""Masks that are drawn from polygons and run lengths, as COCO stores instances.

They are equal to those of pycocotools, pixel by pixel. The package is not needed: it is compiled,
and the two formats are small.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from naslora.errors import UserError

FINER = 5
"""pycocotools draws the outline of a polygon on a grid that is this much finer than the pixels."""


def draw_annotation(content: bytes, ignored: int, where: str) -> np.ndarray:
    """Draws the mask of an image.

    Args:
        content: the instances of the image, from ``read_coco``.
        ignored: the label of pixels in instances of several classes.
        where: the start of an error message.

    Returns:
        (H, W) int32 labels.

    Raises:
        UserError: a segmentation is neither polygons nor run lengths of the image's size.
    """
    height, width, regions = json.loads(content)
    mask = np.zeros((height, width), np.int32)
    for id, label, segmentation in regions:
        if label == 0:
            continue
        inside = draw_segmentation(segmentation, height, width, f"{where}: annotation {id}")
        other = inside & (mask != 0) & (mask != label)
        mask[inside] = label
        mask[other] = ignored
    return mask


def draw_segmentation(segmentation: Any, height: int, width: int, where: str) -> np.ndarray:
    """Draws one instance.

    Args:
        segmentation: as COCO stores it.
        height: of the image in pixels.
        width: of the image in pixels.
        where: the start of an error message.

    Returns:
        (height, width) bool.

    Raises:
        UserError: as ``draw_annotation``.
    """
    try:
        if isinstance(segmentation, dict):
            size = list(segmentation["size"])
            if size != [height, width]:
                raise UserError(
                    f"{where} has run lengths of {size[1]}x{size[0]} pixels (width x height), its "
                    f"image has {width}x{height}"
                )
            counts = segmentation["counts"]
            runs = _decompress(counts) if isinstance(counts, str) else np.array(counts, np.int64)
            return draw_runs(runs, height, width)
        inside = np.zeros((height, width), bool)
        for polygon in segmentation:
            inside |= draw_polygon(np.array(polygon, np.float64), height, width)
        return inside
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise UserError(
            f"{where} is neither a list of polygons nor run lengths ({error}); correct it"
        ) from error


def draw_runs(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """Draws run lengths: of zeros and ones in turn, zeros first, down the columns.

    Raises:
        ValueError: a run is negative, or they do not add up to the pixels.
    """
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"the runs do not add up to {height * width} pixels")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def _decompress(text: str) -> np.ndarray:
    """Decodes COCO's compressed run lengths.

    A character holds five bits of a number and a bit that says whether more follow; the lowest come
    first, and the sign is the last character's fifth bit. From the fourth number on, each is the
    difference from the one two places before.
    """
    return np.array(list(_numbers(text)), np.int64)


def _numbers(text: str) -> Iterator[int]:
    known: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"the run lengths hold the character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(known) > 2:
            value += known[-2]
        known.append(value)
        yield value
        value = shift = 0
    if shift:
        raise ValueError("the run lengths end within a number")


def draw_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Draws a polygon as pycocotools does (``rleFrPoly``).

    The outline is drawn on a finer grid. Where it crosses the middle of a column of pixels, the
    pixels below change between outside and inside.

    Args:
        points: x, y, x, y, ... in pixels; (0, 0) is the corner of the image.
        height: of the image in pixels.
        width: of the image in pixels.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: there are fewer than three points, or they are not finite.
    """
    if points.ndim != 1 or len(points) % 2 or len(points) < 6 or not np.isfinite(points).all():
        raise ValueError("a polygon needs at least three points x, y")
    corners = (FINER * points.reshape(-1, 2) + 0.5).astype(np.int64)
    edges = zip(corners, np.roll(corners, -1, axis=0), strict=True)
    outline = np.concatenate([_edge(*start, *end) for start, end in edges])  # (M, 2): x, y
    before, after = outline[:-1], outline[1:]
    crossing = before[:, 0] != after[:, 0]
    before, after = before[crossing], after[crossing]
    # The column between the two, and the row of the one on the left; both in pixels.
    left = np.minimum(before[:, 0], after[:, 0])
    x = (left + 0.5) / FINER - 0.5
    y = (np.minimum(before[:, 1], after[:, 1]) + 0.5) / FINER - 0.5
    y = np.ceil(np.clip(y, 0, height)).astype(np.int64)
    kept = (x == np.floor(x)) & (x >= 0) & (x <= width - 1)
    changes = x[kept].astype(np.int64) * height + y[kept]
    inside = np.zeros((height, width), bool)
    if len(changes):
        first, last = int(x[kept].min()), int(x[kept].max()) + 1
        pixels = height * (last - first)
        counts = np.bincount(changes - height * first, minlength=pixels + 1)[:pixels]
        inside[:, first:last] = (np.cumsum(counts) % 2 == 1).reshape(last - first, height).T
    return inside


def _edge(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """The points of the finer grid from one corner to the next, one a step of the longer axis."""
    dx, dy = abs(x1 - x0), abs(y1 - y0)
    steep = dy > dx
    start, end = (y0, y1) if steep else (x0, x1)
    other_start, other_end = (x0, x1) if steep else (y0, y1)
    turned = start > end
    if turned:
        start, end, other_start, other_end = end, start, other_end, other_start
    steps = np.arange(end - start + 1)
    slope = (other_end - other_start) / max(end - start, 1)
    main, other = start + steps, (other_start + slope * steps + 0.5).astype(np.int64)
    points = np.stack([other, main] if steep else [main, other], axis=1)
    return points[::-1] if turned else points
