"""Loss and metrics of a model on a split."""

import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as transforms

from naslora.data.dataset import SegmentationDataset, collate
from naslora.data.masks import IGNORED
from naslora.data.sampling import GlobalBatches
from naslora.data.tiles import Grid
from naslora.data.volumes import spacing_of
from naslora.metrics import METRICS, Scores, further_scores, image_scores, shape_scores, summarise
from naslora.records import from_json
from naslora.results import GroupScores, SplitScores, VolumeScores
from naslora.sam.segmentation import SamForSegmentation, SegmentationOutput, labels_of
from naslora.training.run_config import RunConfig
from naslora.training.train_config import loss_of


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

    Args:
        model: on the accelerator's device; is put into evaluation mode.
        dataset: images with masks.
        accelerator: processes share the images; each returns the whole result.
        config: the run, for its loss, classes and batches.
        metrics: names of ``naslora.metrics.METRICS``.

    Returns:
        The loss as a mean over images, the scores, and the Dice of each image. Without ``metrics``
        there are neither ``metrics`` nor ``resolution`` nor ``groups``.
    """
    model.eval()
    scorer = _Scorer(model, dataset, accelerator, config, metrics)
    score = scorer.of_batch if dataset.tiles is None else scorer.of_tiles
    records = [own for batch in batches_of(dataset, accelerator, config) for own in score(batch)]
    records = sorted(gather_object(records), key=lambda record: record.place)
    losses, scores = [own.loss for own in records], [own.scores for own in records]
    summary = scorer.summary(scores)
    image_dice = torch.stack([own["dice"] for own in scores]).nanmean(1)  # (N,)
    summary["image_dice"] = [None if dice.isnan() else float(dice) for dice in image_dice]
    if "calibration" in scores[0]:
        summary["calibration"] = torch.stack([own["calibration"] for own in scores]).sum(0).tolist()
    summary["volumes"] = _volumes(dataset, records, metrics)
    if metrics:
        summary["resolution"] = f"{dataset.image_size} x {dataset.image_size}"
        if dataset.truth:
            summary["resolution"] = "of each mask"
        if dataset.tiles is not None:
            side = dataset.tiles.size
            summary["resolution"] = f"of each mask, by tiles of {side} x {side}"
        members: dict[str, list[Scores]] = {}
        for sample, own in zip(dataset.samples, scores, strict=True):
            if sample.group:
                members.setdefault(sample.group, []).append(own)
        summary["groups"] = {
            group: GroupScores(len(own), scorer.summary(own)["metrics"])
            for group, own in members.items()
        }
    return from_json(SplitScores, {"loss": sum(losses) / len(losses), **summary}, "scores")


class _Record(NamedTuple):
    """What is known of an image of a split."""

    place: int
    """Of the image in the data set."""
    loss: float
    """Of the image, or of its batch."""
    scores: Scores
    labels: bytes = b""
    """Of a slice, if a metric needs them: predicted and true labels, (2, H, W), as np.savez."""


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
    stacked = {name: torch.stack([own[name] for own in scores]) for name in scores[0]}
    values = {name: METRICS[name].of(stacked) for name in stacked}
    numbers = {name: None if own.isnan() else float(own) for name, own in values.items()}
    return VolumeScores(len(scores), " and ".join(sorted(units)) or "voxels", numbers)


class _Scorer(NamedTuple):
    """Scores images; the fields are the arguments of ``evaluate``."""

    model: SamForSegmentation
    dataset: SegmentationDataset
    accelerator: Accelerator
    config: RunConfig
    metrics: Sequence[str]

    def of_batch(self, batch: dict[str, Any]) -> list[_Record]:
        """The records of a batch; the loss is the batch's."""
        device = self.accelerator.device
        with self.accelerator.autocast():
            output = self.model(batch["image"].to(device))
        mask = batch["mask"].to(device)
        loss, truths = self.loss(output, mask), batch.get("truth", mask)
        records = []
        for index, class_map, truth in zip(batch["index"], output.class_map(), truths, strict=True):
            truth, scores = truth.to(device), class_map[None]
            if scores.shape[-2:] != truth.shape:
                scores = F.interpolate(scores, truth.shape, mode="bilinear", align_corners=False)
            records.append(self._record(index, loss, labels_of(scores)[0], scores[0], truth))
        return records

    def of_tiles(self, batch: dict[str, Any]) -> list[_Record]:
        """The records of whole images; the loss is the image's own."""
        images = zip(batch["index"], batch["pixels"], batch["truth"], strict=True)
        return [self._of_tiles(*image) for image in images]

    def _of_tiles(self, index: Tensor, pixels: Tensor, truth: Tensor) -> _Record:
        losses: list[float] = []

        def add_loss(output: SegmentationOutput, mask: Tensor) -> None:
            losses.append(self.loss(output, mask))

        # Labels of 8 bits and, if a metric needs it, the class map are kept of a whole image.
        labels, scores = [], []
        needed = any(METRICS[name].of_map for name in self.metrics)
        arguments = self.model, self.dataset, pixels, truth, self.accelerator, add_loss
        for band in tiled_class_map(*arguments):
            labels.append(labels_of(band[None])[0].to(torch.uint8))
            scores.append(band if needed else band[:, :0])
        loss, prediction = sum(losses) / len(losses), torch.cat(labels).long()
        return self._record(index, loss, prediction, torch.cat(scores, 1), truth)

    def loss(self, output: SegmentationOutput, mask: Tensor) -> float:
        """The run's loss."""
        return float(loss_of(self.config.training)(output, mask))

    def _record(
        self, index: Tensor, loss: float, labels: Tensor, class_map: Tensor, truth: Tensor
    ) -> _Record:
        """Scores of one image's (H, W) labels, and of its (K, H, W) class map."""
        scores = image_scores(labels[None], truth[None], self.dataset.num_classes, IGNORED)
        own = {name: values[0].cpu() for name, values in scores.items()}
        more = further_scores(self.metrics, class_map, labels, truth, IGNORED)
        own |= {name: values.cpu() for name, values in more.items()}
        kept = io.BytesIO()
        if self.dataset.samples[int(index)].slice is not None and any(
            METRICS[name].shape for name in self.metrics
        ):
            pair = torch.stack([labels, truth]).where(truth != IGNORED, 0).to(torch.uint8)
            np.savez_compressed(kept, pair.cpu().numpy())
        return _Record(int(index), loss, own, kept.getvalue())

    def summary(self, scores: Sequence[Scores]) -> dict[str, Any]:
        """What ``summarise`` makes of the scores of some images."""
        stacked = {name: torch.stack([own[name] for own in scores]) for name in scores[0]}
        return summarise(stacked, list(self.config.data.class_names), self.metrics)


def tiled_class_map(
    model: SamForSegmentation,
    dataset: SegmentationDataset,
    pixels: Tensor,
    truth: Tensor | None,
    accelerator: Accelerator,
    on_output: Callable[[SegmentationOutput, Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Computes the class map of a whole image from those of its tiles.

    Args:
        model: on the accelerator's device, in evaluation mode.
        dataset: its ``tiles`` say how the image is cut.
        pixels: (3, H, W) uint8.
        truth: (H, W) labels; None without a mask.
        accelerator: the device and the precision.
        on_output: called with the output for each tile and its (1, S, S) labels; needs ``truth``.

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
