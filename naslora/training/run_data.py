"""The images of a run: splits, check before training, those of each epoch, and for merging."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from naslora.choices import CALIBRATION_IMAGES, OVERLAP
from naslora.data.augmentation import Crop
from naslora.data.cache import Cache
from naslora.data.contents import (
    Content,
    Contents,
    check_unchanged,
    read_contents,
    warnings_about,
)
from naslora.data.dataset import SegmentationDataset
from naslora.data.datasets import count_differences, load_splits
from naslora.data.images import Sample
from naslora.data.layouts import OPTIONAL_SPLIT
from naslora.data.objects import warnings_about_objects
from naslora.data.picture import Intensity, parse_intensity
from naslora.data.sampling import draw_part, hold_out, refill
from naslora.data.tiles import Tiles, fit_tiles
from naslora.data.volumes import Slicing
from naslora.errors import UserError, warn
from naslora.methods import searches
from naslora.records import read_record
from naslora.sam.families import find_family
from naslora.training.accelerator import in_main_process
from naslora.training.progress import with_progress
from naslora.training.run_config import DataConfig, RunConfig, TrainConfig


def prepare_data(
    config: RunConfig, accelerator: Accelerator, record: Path | None = None
) -> tuple[dict[str, SegmentationDataset], Contents]:
    """Finds the images of a run, reads each once, and makes the data set of each split.

    The main process reads for all, as ``check_splits``.

    ``record`` is the file in which a run that is resumed has recorded its data; it may not exist.

    Returns:
        The data set of each split, and what the files hold: nothing but in the main process.

    Raises:
        UserError: in every process; ``record`` is damaged; as ``find_splits``, ``check_splits`` or
            ``check_unchanged``.
    """
    splits = find_splits(config)

    def read() -> Contents:
        contents = check_splits(splits, config)
        if record is not None and record.is_file():
            check_unchanged(read_record(record, dict[str, list[Content]]), contents)
        return contents

    contents = in_main_process(accelerator, read)
    views: dict[str, View] = {"val": "validated", "test": "tested"}
    datasets = {
        name: make_dataset(config, samples, views.get(name, "trained"))
        for name, samples in splits.items()
    }
    return datasets, contents or {}


def find_splits(config: RunConfig) -> dict[str, list[Sample]]:
    """Finds the samples of each split: ``train``, ``val`` and ``test``.

    ``arch`` is present if the method takes alpha steps on the data's own split. Otherwise those
    images are training images like the others.

    Raises:
        UserError: no data is given, ``arch_data`` is `split` and there is none; as ``load_splits``.
    """
    data, root, wanted = config.data, config.data.root, config.training.arch_data
    if root is None:
        raise UserError("no data: give --data DIR")
    how = slicing_of(data)
    splits = load_splits(data.dataset, root, data.class_names, data.split, data.group, how)
    differences = count_differences(data.dataset, splits)
    if differences and os.environ.get("RANK", "0") == "0":
        warn(f"{root} is not the paper's {data.dataset}: {', '.join(differences)}")
    if wanted == "split" and OPTIONAL_SPLIT not in splits:
        raise UserError(
            f"arch_data is split, but {root} has no split {OPTIONAL_SPLIT!r}; add one, or choose "
            "redraw"
        )
    alone = searches(config.method, config.adapter) and not config.training.simultaneous
    if not alone or wanted not in ("split", None):
        splits["train"] = splits["train"] + splits.pop(OPTIONAL_SPLIT, [])
    return splits


def check_with_progress(samples: Sequence[Sample], config: RunConfig) -> list[Content]:
    """What the files of each sample hold, as ``read_contents``; shows how far it has come."""
    found = read_contents(make_dataset(config, samples))
    return [*with_progress(found, "checking the data", len(samples))]


def check_splits(splits: dict[str, list[Sample]], config: RunConfig) -> Contents:
    """Reads every sample once, as ``check_with_progress``.

    Warns of what ``warnings_about`` finds, and in a promptable run ``warnings_about_objects``,
    which may also refuse the data.
    """
    found = iter(check_with_progress([s for split in splits.values() for s in split], config))
    contents = {name: [next(found) for _ in split] for name, split in splits.items()}
    warnings = warnings_about(contents)
    if config.task == "promptable":
        size, most = config.model.image_size, config.prompts.objects_per_image
        warnings += warnings_about_objects(contents, size, most)
    for warning in warnings:
        warn(warning)
    return contents


def scaling_of(config: RunConfig) -> Intensity | None:
    """The scaling of images of more than 8 bits, as ``open_picture`` takes it."""
    words = config.data.intensity
    return None if words is None else parse_intensity(words)


def slicing_of(data: DataConfig) -> Slicing:
    """How volumes become images."""
    return Slicing(data.slice_axis, data.neighbours, data.stacks)


def shown_of(config: RunConfig) -> list[int]:
    """The channels that are red, green and blue in pictures."""
    return [config.data.channels.index(name) for name in config.data.shown or ()] or [0, 1, 2]


def tiles_of(config: RunConfig, side: int | None = None, overlap: float = OVERLAP) -> Tiles:
    """The tiles of large images; None as their side gives the scale of the run's training."""
    size, patch = config.model.image_size, find_family(config.model.name).patch
    return fit_tiles(side or config.data.crop or size, size, patch, overlap)


View = Literal["trained", "seen", "validated", "tested"]
"""What a data set gives. ``trained``: images as training sees them, changed at random. ``seen``:
images without these changes; windows of ``crop`` are still drawn. ``validated`` and ``tested``:
images for metrics. Those of ``tested`` have the size of the masks if ``resolution`` says so."""


def make_dataset(
    config: RunConfig, samples: Sequence[Sample], view: View = "seen"
) -> SegmentationDataset:
    """Makes the data set that the run's model sees."""
    data, training, trained = config.data, config.training, view == "trained"
    scored = view in ("validated", "tested")
    return SegmentationDataset(
        list(samples),
        config.model.image_size,
        data.num_classes,
        data.palette,
        flip=trained and training.flip and training.augment != "none",
        seed=0 if scored else config.seed,  # all runs are scored on the same objects
        cache=None if data.cache is None else Cache(data.cache),
        truth=view == "tested" and data.resolution == "original",
        ignore_index=data.ignore_index,
        augment=training.augment if trained else "none",
        crop=Crop(data.crop, data.crop_foreground) if data.crop and not scored else None,
        intensity=scaling_of(config),
        channels=len(data.channels) or None,
        objects=config.prompts.objects if config.task == "promptable" else None,
        most_objects=config.prompts.objects_per_image,
        tiles=tiles_of(config) if scored and data.resolution == "tiles" else None,
    )


def calibration(
    config: RunConfig,
    splits: dict[str, list[Sample]],
    mode: str,
    device: torch.device,
    images: int = CALIBRATION_IMAGES,
) -> Iterator[Tensor]:
    """Yields the (B, C, S, S) float32 images that a way of merging needs, windows with ``crop``.

    Mode ``calibrated`` is fitted to, and measured on, ``images`` training images, evenly spread.
    The other modes are measured on the validation images.
    """
    samples = splits["val"]
    if mode == "calibrated":
        # An arch split may be the training images again.
        train = list(dict.fromkeys(splits["train"] + splits.get("arch", [])))
        indices = np.linspace(0, len(train) - 1, min(images, len(train))).round().astype(int)
        samples = [train[int(i)] for i in indices]
    for batch in DataLoader(make_dataset(config, samples), config.training.batch_size):
        yield batch["image"].to(device)


@dataclass(frozen=True)
class EpochImages:
    """The images of the weight steps and of the alpha steps.

    An epoch's weight steps take equally many images, whatever alpha takes. Images that are left to
    alpha are replaced by others, which then come twice.
    """

    config: TrainConfig
    train: int
    """Number of training images."""
    arch: int
    """Number of images in the data's own split for alpha; 0 without one."""
    searches: bool
    """Whether the run takes alpha steps of their own."""
    seed: int

    def of(self, epoch: int) -> tuple[Sequence[int], Sequence[int]]:
        """Indices of the training images that an epoch's weight steps take, and of the images of
        its alpha steps: in the data's own split for alpha, if there is one, else in the training
        split."""
        kept: Sequence[int] = range(self.train)
        alpha: Sequence[int] = range(self.arch)
        how, fraction = self.config.arch_data, self.config.arch_fraction
        if not self.searches:
            alpha = ()
        elif not self.arch and how in ("rotate", "hold-out"):
            path = () if how == "hold-out" else (epoch,)  # `hold-out` draws once
            others, alpha = hold_out(kept, fraction, self.seed, *path)
            if how == "hold-out" or epoch >= self.config.search_start:
                kept = others
        elif not self.arch:
            alpha = draw_part(kept, fraction, self.seed, epoch)
        return refill(kept, self.train + self.arch, self.seed, epoch), alpha
