"""Scores of objects: average precision as COCO has it, and panoptic quality of label images."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

MATCH = 0.5
"""IoU above which two objects are the same. No object then has two partners."""
MOST_MASKS = 100_000
"""Masks of an image that count, the best first. COCO counts 100."""


class Quality(NamedTuple):
    """Panoptic quality of one image (Kirillov et al., 2019), in [0, 1]; NaN if undefined."""

    pq: float
    """The product of the other two; NaN without any object, 0 if none is found."""
    rq: float
    """F1 of the objects."""
    sq: float
    """Mean IoU of the objects that are found; NaN if none is."""


def panoptic_quality(found: np.ndarray, truth: np.ndarray) -> Quality:
    """Computes the panoptic quality of one image.

    Args:
        found: (H, W) numbers of the model's objects; 0 is none.
        truth: (H, W) numbers of the true objects.
    """
    columns = int(found.max()) + 1
    pairs, pixels = np.unique(truth.astype(np.int64) * columns + found, return_counts=True)
    rows, columns_of = np.divmod(pairs, columns)
    areas = np.bincount(rows, pixels), np.bincount(columns_of, pixels)
    both = (rows > 0) & (columns_of > 0)
    unions = areas[0][rows] + areas[1][columns_of] - pixels
    iou = (pixels / unions)[both]
    matched = iou[iou > MATCH]
    objects = sum(len(np.setdiff1d(numbers, 0)) for numbers in (rows, columns_of))
    if not objects:
        return Quality(np.nan, np.nan, np.nan)
    rq = 2 * len(matched) / objects
    sq = float(matched.mean()) if len(matched) else np.nan
    return Quality(rq * sq if len(matched) else 0.0, rq, sq)


class AveragePrecision:
    """Average precision of the masks of one class, by pycocotools."""

    def __init__(self) -> None:
        self._images: list[dict[str, Any]] = []
        self._truth: list[dict[str, Any]] = []
        self._found: list[dict[str, Any]] = []

    def add(
        self,
        found: Sequence[tuple[dict[str, Any], float]],
        truth: np.ndarray,
        ignored: np.ndarray,
    ) -> None:
        """Adds an image.

        Args:
            found: masks as compressed run lengths, with their scores.
            truth: (H, W) numbers of the true objects; 0 is none.
            ignored: (H, W) bool. A mask in such pixels is neither right nor wrong.
        """
        image = len(self._images) + 1
        self._images.append({"id": image, "height": truth.shape[0], "width": truth.shape[1]})
        masks = [(truth == number, 0) for number in np.setdiff1d(truth, 0)]
        masks += [(ignored, 1)] if ignored.any() else []
        for mask, crowd in masks:
            runs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
            self._truth.append(self._entry(image, len(self._truth) + 1, runs) | {"iscrowd": crowd})
        for runs, score in found:
            entry = self._entry(image, len(self._found) + 1, runs) | {"iscrowd": 0}
            self._found.append(entry | {"score": score})

    @staticmethod
    def _entry(image: int, number: int, runs: dict[str, Any]) -> dict[str, Any]:
        area = float(coco.area(runs))
        own = {"id": number, "image_id": image, "category_id": 1}
        return own | {"segmentation": runs, "area": area}

    def compute(self) -> tuple[float | None, float | None]:
        """AP50, and AP from 50 to 95; None without true objects."""
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            sides = []
            for entries in (self._truth, self._found):
                side = COCO()
                side.dataset = {
                    "images": self._images,
                    "annotations": entries,
                    "categories": [{"id": 1}],
                }
                side.createIndex()
                sides.append(side)
            scores = COCOeval(*sides, "segm")
            scores.params.maxDets = [MOST_MASKS]
            scores.params.areaRng, scores.params.areaRngLbl = [[0, 1e10]], ["all"]
            scores.evaluate()
            scores.accumulate()
        precision = scores.eval["precision"]  # (T, R, 1, 1, 1), T thresholds, R recalls
        if (precision < 0).all():
            return None, None
        return float(precision[0].mean()), float(precision.mean())
