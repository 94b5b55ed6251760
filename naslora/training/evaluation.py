"""Loss and metrics of a model on a split."""

import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as transforms

from naslora.data.dataset import SegmentationDataset, collate
from naslora.data.masks import IGNORED
from naslora.data.sampling import GlobalBatches
from naslora.data.tiles import Grid, fit
from naslora.data.volumes import spacing_of
from naslora.metrics import (
    METRICS,
    Scores,
    further_scores,
    image_scores,
    known,
    shape_scores,
    stacked,
    summarise,
)
from naslora.results import GroupScores, SplitScores, VolumeScores
from naslora.sam.losses import parse_terms, segmentation_loss
from naslora.sam.segmentation import SamForSegmentation, SegmentationOutput, labels_of
from naslora.training.run_config import RunConfig, TrainConfig


def make_loader(
    dataset: SegmentationDataset, batches: GlobalBatches, workers: int, accelerator: Accelerator
) -> DataLoader:
    """Loads this process's share of each batch: dicts as of ``collate``, None for no share."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=end_with_the_run,
        pin_memory=accelerator.device.type == "cuda",
    )


def batches_of(
    dataset: SegmentationDataset, accelerator: Accelerator, config: RunConfig
) -> Iterator[dict[str, Any]]:
    """This process's share of all images of a split, in order."""
    training, processes = config.training, (accelerator.process_index, accelerator.num_processes)
    batches = GlobalBatches(range(len(dataset)), training.batch_size, *processes, shuffle=False)
    return filter(None, make_loader(dataset, batches, training.workers, accelerator))


def end_with_the_run(_: int) -> None:
    """Makes a data loading process end with the run's process, and without a traceback.

    SIGTERM, which ``timeout`` and batch systems send to every process of a run, ends it as Ctrl-C
    does. The thread that hands tensors over reports that the main process has ended by the hook for
    exceptions. Errors of images take another way: the loader raises them in the main process.
    """
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.excepthook = lambda *_: None


def end_with_parent() -> None:
    """Ends this process when the process ends that started it, also if it has ended already.

    torch's own check takes whatever process is the parent when it begins for that process.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()


def loss_of(config: TrainConfig) -> partial[Tensor]:
    """The loss of an output and a target, as ``segmentation_loss``. Pixels with the label
    ``IGNORED`` do not count."""
    return partial(
        segmentation_loss,
        class_loss=config.class_loss,
        lambda_seg=config.lambda_seg,
        lambda_cls=config.lambda_cls,
        ignore_index=IGNORED,
        boundary_weight=config.boundary_weight,
        terms=parse_terms(config.loss),
        class_weights=cast(tuple[float, ...] | None, config.class_weights),  # once it is resolved
    )


@torch.no_grad()
def evaluate(
    model: SamForSegmentation,
    dataset: SegmentationDataset,
    accelerator: Accelerator,
    config: RunConfig,
    metrics: Sequence[str] = (),
) -> SplitScores:
    """Scores every image of a split, at the size at which the model sees it.

    Where the data set also gives the masks at their own size, images are scored at that size: the
    class map is resized bilinearly before it is thresholded. Where it gives whole images and their
    tiles, the class maps of the tiles are blended; the loss of an image is the mean over its tiles.

    The model is on the accelerator's device, and is put into evaluation mode. Processes share the
    images; each returns the whole result.

    Returns:
        The loss as a mean over images, the scores, and the Dice of each image. Without ``metrics``,
        names of ``naslora.metrics.METRICS``, there is neither ``resolution`` nor ``groups``.
    """
    model.eval()
    predictions = _predictions(model, dataset, accelerator, config, metrics)
    own = [_record(dataset, metrics, prediction) for prediction in predictions]
    records: list[_Record] = sorted(gather_object(own), key=lambda record: record.place)
    names, scores = config.data.class_names, [record.scores for record in records]
    summary = replace(
        summarise(stacked(scores), names, metrics),
        loss=sum(record.loss for record in records) / len(records),
        volumes=_volumes(dataset, records, metrics),
    )
    if not metrics:
        return summary
    resolution = f"{dataset.image_size} x {dataset.image_size}"
    if dataset.truth:
        resolution = "of each mask"
    if dataset.tiles is not None:
        resolution = f"of each mask, by tiles of {dataset.tiles.size} x {dataset.tiles.size}"
    members: dict[str, list[Scores]] = {}
    for sample, one in zip(dataset.samples, scores, strict=True):
        if sample.group:
            members.setdefault(sample.group, []).append(one)
    groups = {
        group: GroupScores(len(own), summarise(stacked(own), names, metrics).metrics)
        for group, own in members.items()
    }
    return replace(summary, resolution=resolution, groups=groups)


Prediction = tuple[int, float, Tensor, Tensor, Tensor]
"""Of an image the place in the data set, the loss of its batch or of its tiles, the (H, W) labels,
the (K, H, W) class map, and the (H, W) truth."""


def _predictions(
    model: SamForSegmentation,
    dataset: SegmentationDataset,
    accelerator: Accelerator,
    config: RunConfig,
    metrics: Sequence[str],
) -> Iterator[Prediction]:
    """Segments this process's share of the images."""
    loss, device = loss_of(config.training), accelerator.device
    # Labels of 8 bits and, if a metric needs it, the class map are kept of a whole image.
    needed = any(METRICS[name].of_map for name in metrics)
    losses: list[float] = []  # of the tiles of an image

    def add_loss(output: SegmentationOutput, mask: Tensor) -> None:
        losses.append(float(loss(output, mask)))

    for batch in batches_of(dataset, accelerator, config):
        if dataset.tiles is None:
            with accelerator.autocast():
                output = model(batch["image"].to(device))
            mask = batch["mask"].to(device)
            value, truths = float(loss(output, mask)), batch.get("truth", mask)
            images = zip(batch["index"], output.class_map(), truths, strict=True)
            for index, class_map, truth in images:
                class_map = fit(class_map, truth.shape)
                yield int(index), value, labels_of(class_map[None])[0], class_map, truth.to(device)
            continue
        images = zip(batch["index"], batch["pixels"], batch["truth"], strict=True)
        for index, pixels, truth in images:
            losses.clear()
            labels, maps = [], []
            for band in tiled_class_map(model, dataset, pixels, truth, accelerator, add_loss):
                labels.append(labels_of(band[None])[0].to(torch.uint8))
                maps.append(band if needed else band[:, :0])
            value, prediction = sum(losses) / len(losses), torch.cat(labels).long()
            yield int(index), value, prediction, torch.cat(maps, 1), truth


class _Record(NamedTuple):
    """What is known of an image of a split."""

    place: int
    """Of the image in the data set."""
    loss: float
    scores: Scores
    labels: bytes
    """Of a slice, if a metric needs them: predicted and true labels, (2, H, W), as np.savez."""


def _record(
    dataset: SegmentationDataset, metrics: Sequence[str], prediction: Prediction
) -> _Record:
    """Scores an image."""
    place, loss, labels, class_map, truth = prediction
    scores = image_scores(labels[None], truth[None], dataset.num_classes, IGNORED)
    own = {name: values[0] for name, values in scores.items()}
    own |= further_scores(metrics, class_map, labels, truth, IGNORED)
    kept = io.BytesIO()
    if dataset.samples[place].slice is not None and any(METRICS[name].shape for name in metrics):
        pair = torch.stack([labels, truth]).where(truth != IGNORED, 0).to(torch.uint8)
        np.savez_compressed(kept, pair.cpu().numpy())
    return _Record(place, loss, {name: own[name].cpu() for name in own}, kept.getvalue())


def _volumes(
    dataset: SegmentationDataset, records: Sequence[_Record], metrics: Sequence[str]
) -> VolumeScores | None:
    """The scores of the volumes; None if there are none."""
    members: dict[Path, list[_Record]] = {}
    for sample, own in zip(dataset.samples, records, strict=True):
        if sample.slice is not None:
            members.setdefault(sample.image, []).append(own)
    scores: list[Scores] = []
    units: set[str] = set()
    for path, slices in members.items():
        total = torch.stack([own.scores["confusion"] for own in slices]).sum(0)  # (K, K)
        both = total.sum(0) + total.sum(1)
        found: Scores = {"dice": (2 * total.diagonal() / both)[1:]}
        if slices[0].labels:
            stack = [np.load(io.BytesIO(own.labels))["arr_0"] for own in slices]
            predicted, truth = np.stack(stack, 1)  # (slices, H, W) each
            how = dataset.samples[slices[0].place].slice
            assert how is not None
            spacing, unit = spacing_of(path, how.how.axis, truth.shape[1:])
            found |= shape_scores(metrics, predicted, truth, len(total), spacing)
            units.add(unit)
        scores.append(found)
    if not scores:
        return None
    together = stacked(scores)
    numbers = {name: known(METRICS[name].of(together)) for name in together}
    return VolumeScores(len(scores), " and ".join(sorted(units)) or "voxels", numbers)


def tiled_class_map(
    model: SamForSegmentation,
    dataset: SegmentationDataset,
    pixels: Tensor,
    truth: Tensor | None,
    accelerator: Accelerator,
    on_output: Callable[[SegmentationOutput, Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Computes the class map of a whole image from those of its tiles.

    The model is in evaluation mode. The image is (3, H, W) uint8, its truth (H, W) labels or None.
    ``on_output`` is called with the output for each tile and its (1, S, S) labels.

    Yields:
        (K, rows, W) float32 scores on the CPU: bands of the image, from its top to its bottom.
    """
    assert dataset.tiles is not None
    grid = Grid(dataset.tiles, *pixels.shape[1:])

    def maps() -> Iterator[Tensor]:
        for box in grid.boxes():
            image, mask = dataset.cut(pixels, truth, box)
            tile = transforms.to_dtype(image, torch.float32, scale=True)[None]
            with accelerator.autocast():
                output = model(tile.to(accelerator.device))
            if on_output is not None and mask is not None:
                on_output(output, mask.long()[None].to(accelerator.device))
            yield output.class_map()[0]

    return (band for _, band in grid.blend(maps()))
