"""Loss and metrics of a model on a split."""

import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
from naslora.sam.losses import SegmentationLoss, parse_terms
from naslora.sam.segmentation import SamForSegmentation, labels_of
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


def loss_of(config: TrainConfig) -> SegmentationLoss:
    """The loss of a run. Pixels with the label ``IGNORED`` do not count."""
    return SegmentationLoss(
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
    own = [*_records(model, dataset, accelerator, config, metrics)]
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


class _Record(NamedTuple):
    """What is known of an image of a split."""

    place: int
    """Of the image in the data set."""
    loss: float
    """Of its batch, or the mean over its tiles."""
    scores: Scores
    labels: bytes
    """Of a slice, if a metric needs them: predicted and true labels, (2, H, W), as np.savez."""


def _records(
    model: SamForSegmentation,
    dataset: SegmentationDataset,
    accelerator: Accelerator,
    config: RunConfig,
    metrics: Sequence[str],
) -> Iterator[_Record]:
    """Segments and scores this process's share of the images."""
    loss, device = loss_of(config.training), accelerator.device
    by_shape = any(METRICS[name].shape for name in metrics)
    # Labels of 8 bits and, if a metric needs it, the class map are kept of an image by tiles.
    by_map = any(METRICS[name].of_map for name in metrics)

    def record(index: Tensor, labels: Tensor, class_map: Tensor, truth: Tensor) -> _Record:
        found = image_scores(labels[None], truth[None], dataset.num_classes, IGNORED)
        own = {name: values[0] for name, values in found.items()}
        own |= further_scores(metrics, class_map, labels, truth, IGNORED)
        kept = io.BytesIO()
        if by_shape and dataset.samples[index].slice is not None:
            pair = torch.stack([labels, truth]).where(truth != IGNORED, 0).to(torch.uint8)
            np.savez_compressed(kept, pair.cpu().numpy())
        scores = {name: values.cpu() for name, values in own.items()}
        return _Record(int(index), sum(losses) / len(losses), scores, kept.getvalue())

    losses: list[float] = []  # of what was segmented since it was emptied

    def segment(images: Tensor, masks: Tensor) -> Tensor:
        with accelerator.autocast():
            output = model(images.to(device))
        losses.append(float(loss(output, masks.to(device))))
        return output.class_map()

    for batch in batches_of(dataset, accelerator, config):
        if dataset.tiles is None:
            losses.clear()
            maps = segment(batch["image"], batch["mask"])
            truths = batch.get("truth", batch["mask"])
            for index, own, truth in zip(batch["index"], maps, truths, strict=True):
                own = fit(own, truth.shape)
                yield record(index, labels_of(own[None])[0], own, truth.to(device))
            continue
        images = zip(batch["index"], batch["pixels"], batch["truth"], strict=True)
        for index, pixels, truth in images:
            losses.clear()
            labels, kept = [], []
            for band in tiled_class_map(segment, dataset, pixels, truth):
                labels.append(labels_of(band[None])[0].to(torch.uint8))
                kept.append(band if by_map else band[:, :0])
            yield record(index, torch.cat(labels).long(), torch.cat(kept, 1), truth)


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
    segment: Callable[[Tensor, Tensor], Tensor],
    dataset: SegmentationDataset,
    pixels: Tensor,
    truth: Tensor,
) -> Iterator[Tensor]:
    """Computes the class map of a whole image from those of its tiles.

    ``segment`` maps a tile, (1, 3, S, S) in [0, 1], and its (1, S, S) labels to the (1, K, S, S)
    class map. The image is (3, H, W) uint8, its truth (H, W) labels.

    Yields:
        (K, rows, W) float32 scores on the CPU: bands of the image, from its top to its bottom.
    """
    assert dataset.tiles is not None
    grid = Grid(dataset.tiles, *pixels.shape[1:])

    def maps() -> Iterator[Tensor]:
        for box in grid.boxes():
            image, mask = dataset.cut(pixels, truth, box)
            assert mask is not None
            tile = transforms.to_dtype(image, torch.float32, scale=True)
            yield segment(tile[None], mask.long()[None])[0]

    return (band for _, band in grid.blend(maps()))
