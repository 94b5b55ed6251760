"""Instances: every object of an image, found by a grid of points, and their scores."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco
from segment_anything import SamAutomaticMaskGenerator

from naslora.choices import ObjectSource
from naslora.data.masks import IGNORED
from naslora.data.picture import Picture
from naslora.errors import warn
from naslora.files import write_text
from naslora.sam.instance_config import InstanceConfig
from naslora.trained import load_predictor, split_of, with_data
from naslora.training.progress import with_progress
from naslora.training.run_config import varied
from naslora.training.run_data import check_with_progress, make_dataset

COCO_FILE = "instances.json"
NOTHING = "no object was found: lower --min-iou and --min-stability, or raise --points-per-side"
WHOLE = 0.98
"""Share of an image's sides that the box of its background has at least."""
LEAST_LEFT = 0.5
"""Share of a mask that better masks must leave free for it to be an object in a label image."""
MOST_MASKS = 100_000
"""Masks of an image that count for average precision, the best first. COCO counts 100."""


class Instance(NamedTuple):
    """An object of an image."""

    runs: dict[str, Any]
    """Its mask as compressed run lengths of COCO: ``size`` and ``counts``."""
    score: float
    """The IoU with the true mask that the model estimates."""

    def mask(self) -> np.ndarray:
        """(H, W) bool."""
        return coco.decode(self.runs).astype(bool)


class InstanceFinder:
    """Finds objects by segment_anything's ``SamAutomaticMaskGenerator``.

    ``path`` and errors are as those of ``load_predictor``.
    """

    def __init__(self, path: Path, search: InstanceConfig) -> None:
        self.predictor, self.config = load_predictor(path, search.image_size)
        self._least, self._found = search.min_area, list[tuple[dict[str, int], list[Instance]]]()
        self._generator = SamAutomaticMaskGenerator(
            self.predictor.model,
            points_per_side=search.points_per_side,
            pred_iou_thresh=search.min_iou,
            stability_score_thresh=search.min_stability,
            box_nms_thresh=search.max_overlap,
            crop_nms_thresh=search.max_overlap,
            crop_n_layers=search.crops,
            crop_n_points_downscale_factor=2,
            output_mode="coco_rle",
        )
        self._generator.predictor = self.predictor  # which resizes images as training does

    def find(self, pixels: np.ndarray) -> list[Instance]:
        """Finds the objects of an (H, W, 3) uint8 RGB image, the best first. They may overlap.

        A mask whose box is the whole image is background, and is left out.
        """
        size = WHOLE * np.array(pixels.shape[1::-1])
        found = [
            Instance(one["segmentation"], one["predicted_iou"])
            for one in self._generator.generate(pixels)
            if one["area"] >= max(1, self._least)
            if (coco.toBbox(one["segmentation"])[2:] < size).any()
        ]
        return sorted(found, key=lambda instance: -instance.score)

    def labels(self, picture: Picture) -> np.ndarray:
        """Finds the objects of an image, and keeps them for ``write``. Returns a label image."""
        found = self.find(picture.rows())
        self._found.append(({"height": picture.height, "width": picture.width}, found))
        return label_image(found, (picture.height, picture.width))

    def write(self, path: Path, names: Sequence[str]) -> None:
        """Writes the objects of all images, whose names are given, as a data set of COCO.

        Masks are run lengths, also where they overlap, each with its score.
        """
        images, annotations = [], list[dict[str, Any]]()
        for number, (name, (size, found)) in enumerate(zip(names, self._found, strict=True), 1):
            images.append({"id": number, "file_name": name, **size})
            for runs, score in found:
                ids = {"id": len(annotations) + 1, "image_id": number, "category_id": 1}
                area, box = int(coco.area(runs)), coco.toBbox(runs).tolist()
                own = {"segmentation": runs, "area": area, "bbox": box, "iscrowd": 0}
                annotations.append({**ids, **own, "score": score})
        if not annotations:
            warn(NOTHING)
        categories = [{"id": 1, "name": "object"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_text(path, json.dumps(content))


def label_image(instances: Sequence[Instance], shape: tuple[int, int]) -> np.ndarray:
    """Numbers the objects from 1 on, in a picture in which no two overlap.

    A pixel belongs to the first of the objects that have it. An object is left out if it keeps less
    than ``LEAST_LEFT`` of its pixels.

    The best instance comes first. Returns (H, W) labels, 0 for the background: uint8, or uint16 for
    more than 255 objects.
    """
    labels, number = np.zeros(shape, np.uint16), 0
    for instance in instances:
        mask = instance.mask()
        free = mask & (labels == 0)
        if free.sum() >= LEAST_LEFT * mask.sum():
            number += 1
            labels[free] = number
    return labels if number > 255 else labels.astype(np.uint8)


# ---- Scores --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InstanceScores:
    """Scores of the objects that a model finds in a split; None for those that are undefined."""

    images: int
    objects: int
    found: int
    """Masks of the model; they may overlap."""
    ap50: float | None
    """COCO's average precision at an IoU of 0.5, but with any number of masks an image."""
    ap: float | None
    """Its mean over the IoU 0.50, 0.55, ..., 0.95."""
    pq: float | None
    """Panoptic quality of label images, sq times rq: the mean over the images with any object."""
    sq: float | None
    """Mean IoU of the objects that are found, with an IoU above 0.5."""
    rq: float | None
    """F1 of the objects."""


def evaluate_instances(
    path: Path,
    split: str,
    data: Path | None,
    objects: ObjectSource | None,
    search: InstanceConfig,
) -> InstanceScores:
    """Scores the objects that a model finds, at the size of each image.

    Pixels that are ignored count for nothing.

    ``path`` is as in ``load_predictor``. The other arguments are the options of ``naslora evaluate
    --instances``.

    Raises:
        UserError: as ``load_predictor`` and ``split_of``; a file cannot be read.
    """
    finder = InstanceFinder(path, search)
    run = with_data(finder.config, data)
    run = varied(run, "prompts", objects=objects or run.prompts.objects)
    samples = split_of(run, split)
    check_with_progress(samples, run)
    # With this resolution images and masks are read at their own size.
    whole = varied(run, "data", resolution="tiles", cache=None)
    dataset = make_dataset(whole, samples, "tested")

    def pairs() -> Iterator[tuple[list[Instance], np.ndarray]]:
        for sample in with_progress(samples, "finding objects"):
            image, numbers = dataset.read(sample)
            assert numbers is not None
            yield finder.find(image.permute(1, 2, 0).numpy()), numbers.numpy()

    scores = score_instances(pairs())
    if not scores.found:
        warn(NOTHING)
    return scores


def score_instances(pairs: Iterable[tuple[Sequence[Instance], np.ndarray]]) -> InstanceScores:
    """Scores the objects that are found in images, by torchmetrics and pycocotools.

    A pair is what is found in an image, and the (H, W) numbers of its true objects; 0 is none.
    """
    # Imported here, because torchmetrics imports matplotlib's pyplot.
    from torchmetrics.detection import MeanAveragePrecision
    from torchmetrics.functional.detection import panoptic_quality

    precision = MeanAveragePrecision(
        iou_type="segm", extended_summary=True, max_detection_thresholds=[1, 10, MOST_MASKS]
    )
    precision.warn_on_many_detections = False
    qualities, counts = [], np.zeros(3, int)
    for found, numbers in pairs:
        ignored = numbers == IGNORED
        truth = np.where(ignored, 0, numbers)
        labels = np.where(ignored, 0, label_image(found, truth.shape))
        true = [truth == number for number in np.setdiff1d(truth, 0)]
        crowds = [ignored] if ignored.any() else []  # what COCO ignores
        precision.update(
            [_side([i.mask() for i in found], truth.shape, scores=[i.score for i in found])],
            [_side(true + crowds, truth.shape, iscrowd=[0] * len(true) + [1] * len(crowds))],
        )
        if truth.any() or labels.any():
            first, second = (  # (1, H, W, 2): the class, and the number
                torch.from_numpy(np.stack([side > 0, side], 2).astype(np.int64))[None]
                for side in (labels, truth)
            )
            quality = panoptic_quality(
                first, second, {1}, {0}, return_sq_and_rq=True, return_per_class=True
            )
            qualities.append(quality[0].numpy())  # of the objects, not of the background
        counts += [1, len(true), len(found)]
    images, objects, masks = counts.tolist()
    ap50 = ap = None if objects == 0 else 0.0
    if objects and masks:
        values = precision.compute()["precision"][:, :, 0, 0, -1]  # (IoU, recalls)
        ap50, ap = float(values[0].mean()), float(values.mean())
    means = np.mean(qualities, axis=0).tolist() if qualities else [None] * 3
    return InstanceScores(images, objects, masks, ap50, ap, *means)


def _side(masks: Sequence[np.ndarray], shape: tuple[int, int], **more: Any) -> dict[str, Any]:
    """The objects of one class in an image, as torchmetrics takes them."""
    stacked = torch.from_numpy(np.array(masks, bool).reshape(len(masks), *shape))
    own = {name: torch.tensor(values) for name, values in more.items()}
    return {"masks": stacked, "labels": torch.zeros(len(masks), dtype=torch.int64), **own}
