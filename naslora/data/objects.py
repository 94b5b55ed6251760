"""Objects in masks: an image of numbers, in which each object has its own.

0 is no object, and ``IGNORED`` are pixels that do not count. No object has that number.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from naslora.data.masks import IGNORED
from naslora.data.sampling import OBJECTS, seeded_generator
from naslora.errors import UserError

SMALLEST = 16
"""Pixels of the smallest object that is taken, as the model sees it: SAM's decoder draws one value
for 4 x 4 pixels."""


class Counts(NamedTuple):
    """The objects of one image, as the model sees it."""

    objects: int
    """Those of at least ``SMALLEST`` pixels."""
    small: int
    """The others."""
    overlapping: bool = False
    """Whether COCO's instances overlap."""
    crowds: int = 0
    """COCO's crowds, which are no objects."""


def components(labels: np.ndarray) -> np.ndarray:
    """Numbers the connected parts of each class of (H, W) class indices: (H, W) int32 numbers.

    Pixels that meet at a corner are connected.
    """
    from scipy import ndimage  # not for the help

    found, last = np.zeros(labels.shape, np.int64), 0
    for label in np.setdiff1d(labels, (0, IGNORED)):
        own, count = ndimage.label(labels == label, np.ones((3, 3)))
        found[own > 0] = own[own > 0] + last
        last += count
    return numbered(found, labels == IGNORED)


def numbered(values: np.ndarray, ignored: np.ndarray | bool = False) -> np.ndarray:
    """Numbers the values of (H, W) pixels, but 0, in their order: (H, W) int32."""
    numbers = np.searchsorted(np.unique(np.append(values, 0)), values)
    numbers[numbers >= IGNORED] += 1
    numbers[ignored] = IGNORED
    return numbers.astype(np.int32)


def count_objects(numbers: np.ndarray) -> Counts:
    """Counts the objects of an (S, S) image of numbers."""
    pixels = _pixels(numbers)
    return Counts(int((pixels >= SMALLEST).sum()), int(((pixels > 0) & (pixels < SMALLEST)).sum()))


def choose_objects(numbers: Tensor, most: int, seed: int, epoch: int, index: int) -> Tensor:
    """Draws ``most`` objects of (S, S) int64 numbers and numbers them 1, 2, ...; the others become
    background, and so do fewer than ``SMALLEST`` pixels. The seeds are those of ``Augmentation``.
    """
    present = np.flatnonzero(_pixels(numbers.numpy()) >= SMALLEST)
    drawn = seeded_generator(OBJECTS, seed, epoch, index).permutation(present)[:most]
    table = torch.zeros(max(int(numbers.max()), IGNORED) + 1, dtype=torch.int64)
    table[drawn] = torch.arange(1, len(drawn) + 1)
    table[IGNORED] = IGNORED
    return table[numbers]


def _pixels(numbers: np.ndarray) -> np.ndarray:
    """Pixels of each number that is an object's, by the number."""
    pixels = np.bincount(numbers.ravel(), minlength=IGNORED + 1)
    pixels[[0, IGNORED]] = 0
    return pixels


def warnings_about_objects(splits: Mapping[str, Sequence[Any]], size: int, most: int) -> list[str]:
    """Says what is left out of the objects of a run's splits, whose records have ``objects``.

    ``size`` is the side S of the images in pixels, ``most`` the objects of an image that train at
    once.

    Raises:
        UserError: a split has no object.
    """
    for name, contents in splits.items():
        if not any(content.objects.objects for content in contents):
            raise UserError(
                f"the split {name!r} holds no object of at least {SMALLEST} pixels at {size} x "
                f"{size}; check its masks, --objects, or raise --image-size"
            )
    counts = [content.objects for contents in splits.values() for content in contents]
    total, small = (sum(own) for own in zip(*(c[:2] for c in counts), strict=True))
    empty = sum(not own.objects for own in counts)
    overlapping = sum(own.overlapping for own in counts)
    crowds, highest = sum(own.crowds for own in counts), max(own.objects for own in counts)
    lines = {
        f"{empty} of {len(counts)} images hold no object, so they train and score nothing": empty,
        f"{small} of {total + small} objects are left out: they have fewer than {SMALLEST} pixels "
        f"at {size} x {size}; --image-size may be larger": small,
        f"instances overlap in {overlapping} images; the smaller one keeps the pixels": overlapping,
        f"{crowds} crowds of COCO are no objects": crowds,
        f"an image has up to {highest} objects; {most} of each are scored, and as many others "
        "train in each epoch (--objects-per-image)": highest > most,
    }
    return [line for line, holds in lines.items() if holds]
