"""Instances: every object of an image, found by a grid of points, and written with its score."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, PngImagePlugin
from pycocotools import mask as coco
from rich.console import Console
from rich.progress import track
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

from naslora.choices import ObjectSource
from naslora.data.images import Sample, open_picture
from naslora.data.masks import IGNORED
from naslora.data.picture import ImageError
from naslora.errors import UserError
from naslora.files import replaced_file, write_text
from naslora.instance_metrics import AveragePrecision, Quality, panoptic_quality
from naslora.locks import locked
from naslora.prediction import (
    INSTANCE_ENDINGS,
    SOFTWARE,
    check_targets,
    find_images,
    targets_of,
    write_png,
)
from naslora.report.pictures import OVERLAY, paint_bands
from naslora.sam.instance_config import InstanceConfig
from naslora.trained import load_predictor, split_of, with_data
from naslora.training.run_data import check_with_progress, make_dataset, scaling_of

T = TypeVar("T")
COCO_FILE = "instances.json"
WHOLE = 0.98
"""Share of an image's sides that the box of its background has at least."""
LEAST_LEFT = 0.5
"""Share of a mask that better masks must leave free for it to be an object in a label image."""


class Instance(NamedTuple):
    """An object of an image."""

    runs: dict[str, Any]
    """Its mask as compressed run lengths of COCO: ``size`` and ``counts``."""
    score: float
    """The IoU with the true mask that the model estimates."""

    def mask(self) -> np.ndarray:
        """(H, W) bool."""
        return coco.decode(self.runs).astype(bool)


def build_generator(predictor: SamPredictor, config: InstanceConfig) -> SamAutomaticMaskGenerator:
    """segment_anything's generator of masks on a predictor of ``load_predictor``."""
    generator = SamAutomaticMaskGenerator(
        predictor.model,
        points_per_side=config.points_per_side,
        pred_iou_thresh=config.min_iou,
        stability_score_thresh=config.min_stability,
        box_nms_thresh=config.max_overlap,
        crop_nms_thresh=config.max_overlap,
        crop_n_layers=config.crops,
        crop_n_points_downscale_factor=2,
        output_mode="coco_rle",
    )
    generator.predictor = predictor  # which resizes images as training does
    return generator


def find_instances(
    generator: SamAutomaticMaskGenerator, pixels: np.ndarray, min_area: int = 0
) -> list[Instance]:
    """Finds the objects of an (H, W, 3) uint8 RGB image, the best first. They may overlap.

    A mask whose box is the whole image is background, and is left out.
    """
    size = WHOLE * np.array(pixels.shape[1::-1])
    found = [
        Instance(one["segmentation"], one["predicted_iou"])
        for one in generator.generate(pixels)
        if one["area"] >= max(1, min_area)
        if (coco.toBbox(one["segmentation"])[2:] < size).any()
    ]
    return sorted(found, key=lambda instance: -instance.score)


def label_image(instances: Sequence[Instance], shape: tuple[int, int]) -> np.ndarray:
    """Numbers the objects from 1 on, in a picture in which no two overlap.

    A pixel belongs to the first of the objects that have it. An object is left out if it keeps less
    than ``LEAST_LEFT`` of its pixels.

    Args:
        instances: the objects, the best first.
        shape: height and width.

    Returns:
        (H, W) labels, 0 for the background: uint8, or uint16 for more than 255 objects.
    """
    labels, number = np.zeros(shape, np.uint16), 0
    for instance in instances:
        mask = instance.mask()
        free = mask & (labels == 0)
        if free.sum() >= LEAST_LEFT * mask.sum():
            number += 1
            labels[free] = number
    return labels if number > 255 else labels.astype(np.uint8)


def write_labels(path: Path, labels: np.ndarray) -> None:
    """Writes a label image as PNG of 8 or 16 bits, atomically."""
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", SOFTWARE)
    with replaced_file(path) as temporary:
        Image.fromarray(labels).save(temporary, "PNG", pnginfo=about)


def paint_instances(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Paints (H, W) objects over (H, W, 3) uint8 RGB, in ten colours in turn."""
    colours = np.where(labels, 1 + (labels.astype(np.int32) - 1) % len(OVERLAY), 0)
    names = [""] * (1 + len(OVERLAY))
    return np.concatenate(list(paint_bands(lambda top, bottom: pixels[top:bottom], colours, names)))


def predict_instances(
    path: Path,
    inputs: Sequence[Path],
    output: Path,
    config: InstanceConfig,
    on_error: Callable[[UserError], None] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Finds the objects of images: writes a label image and an overlay for each, and one COCO file.

    instances.json has the masks of all objects as run lengths, with their scores, also where they
    overlap. It is a data set for ``--dataset coco``, and a list of results for other programs.

    Args:
        path: as in ``load_predictor``.
        inputs: image files, or folders of images.
        output: created if needed; gets NAME_instances.png, NAME_overlay.png and instances.json.
        config: how objects are found.
        on_error: called with the error of an image that cannot be read. If None, it is raised.
        overwrite: whether files that exist are replaced.

    Returns:
        The label images that were written.

    Raises:
        UserError: as ``load_predictor`` and ``prediction.predict_run``.
    """
    images = find_images(inputs)
    check_targets(images, output, overwrite, INSTANCE_ENDINGS)
    if (output / COCO_FILE).exists() and not overwrite:
        raise UserError(f"{output / COCO_FILE} exists; give --overwrite, or another --output")
    with locked(output):
        predictor, run = load_predictor(path, config.image_size)
        generator = build_generator(predictor, config)
        pictures: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        written = []
        for image in _followed(images):
            try:
                picture = open_picture(Sample(image, None, "input"), scaling_of(run))
                pixels = picture.rows()
            except ImageError as error:
                if on_error is None:
                    raise
                on_error(error)
                continue
            instances = find_instances(generator, pixels, config.min_area)
            labels = label_image(instances, pixels.shape[:2])
            target, overlay = targets_of(image, output, INSTANCE_ENDINGS)
            write_labels(target, labels)
            with replaced_file(overlay) as file:
                write_png(file, picture, [paint_instances(pixels, labels)])
            written.append(target)
            size = {"height": picture.height, "width": picture.width}
            pictures.append({"id": len(written), "file_name": image.name, **size})
            annotations += annotations_of(instances, len(written), len(annotations))
        content = {
            "images": pictures,
            "annotations": annotations,
            "categories": [{"id": 1, "name": "object"}],
        }
        write_text(output / COCO_FILE, json.dumps(content))
        return written


@dataclass(frozen=True)
class InstanceScores:
    """Scores of the objects that a model finds in a split. None means undefined."""

    images: int
    objects: int
    found: int
    """Masks of the model; they may overlap."""
    ap50: float | None
    """Average precision at an IoU of 0.5, as COCO's, but with any number of masks an image."""
    ap: float | None
    """Its mean over the IoU 0.50, 0.55, ..., 0.95."""
    pq: float | None
    """Panoptic quality: the mean over the images of ``rq`` times ``sq``."""
    rq: float | None
    """F1 of the objects with an IoU above 0.5."""
    sq: float | None
    """Mean IoU of these objects."""


def evaluate_instances(
    path: Path,
    split: str,
    data: Path | None,
    objects: ObjectSource | None,
    config: InstanceConfig,
) -> InstanceScores:
    """Scores the objects that a model finds, at the size of each image.

    Average precision takes all masks, panoptic quality those of ``label_image``. Pixels that are
    ignored count for neither.

    Args:
        path: as in ``load_predictor``.
        split: the name of the split.
        data: a CSV folder; None takes the run's own data.
        objects: as ``PromptConfig.objects``; None takes the run's own.
        config: how objects are found.

    Raises:
        UserError: as ``load_predictor`` and ``split_of``; a file cannot be read.
    """
    predictor, run = load_predictor(path, config.image_size)
    run = with_data(run, data)
    if objects is not None:
        run = replace(run, prompts=replace(run.prompts, objects=objects))
    samples = split_of(run, split)
    check_with_progress(samples, run)
    # With this resolution images and masks are read at their own size.
    run = replace(run, data=replace(run.data, resolution="tiles", cache=None))
    dataset, generator = make_dataset(run, samples, "scored"), build_generator(predictor, config)
    precision, found, count = AveragePrecision(), 0, 0
    qualities: list[Quality] = []
    for sample in _followed(samples):
        image, numbers = dataset.read(sample)
        assert numbers is not None
        instances = find_instances(generator, image.permute(1, 2, 0).numpy(), config.min_area)
        truth, ignored = numbers.numpy(), numbers.numpy() == IGNORED
        truth = np.where(ignored, 0, truth)
        own = [(instance.runs, instance.score) for instance in instances]
        precision.add(own, truth, ignored)
        labels = label_image(instances, truth.shape)
        qualities.append(panoptic_quality(np.where(ignored, 0, labels), truth))
        found, count = found + len(instances), count + len(np.setdiff1d(truth, 0))
    means = []
    for values in np.array(qualities).T:
        known = values[~np.isnan(values)]
        means.append(float(known.mean()) if len(known) else None)
    return InstanceScores(len(samples), count, found, *precision.compute(), *means)


def _followed(items: Sequence[T]) -> Iterable[T]:
    """The items, while a terminal shows how far they have come."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(items, "finding objects", console=console, transient=True, disable=hidden)


def annotations_of(
    instances: Sequence[Instance], image_id: int, before: int = 0
) -> list[dict[str, Any]]:
    """The objects of an image as COCO's annotations, with the ids ``before`` + 1, ..."""
    return [
        {
            "id": before + number,
            "image_id": image_id,
            "category_id": 1,
            "segmentation": instance.runs,
            "area": int(coco.area(instance.runs)),
            "bbox": coco.toBbox(instance.runs).tolist(),
            "iscrowd": 0,
            "score": instance.score,
        }
        for number, instance in enumerate(instances, 1)
    ]
