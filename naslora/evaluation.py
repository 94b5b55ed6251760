"""Loss and metrics of a model on a split."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from naslora.data import GlobalBatches, SegmentationDataset, collate
from naslora.metrics import image_scores, summarise
from naslora.segmentation import SamForSegmentation, SegmentationOutput

Loss = Callable[[SegmentationOutput, Tensor], Tensor]


def make_loader(
    dataset: SegmentationDataset, batches: GlobalBatches, workers: int, accelerator: Accelerator
) -> DataLoader:
    """Loads this process's share of each batch: dicts as of ``collate``, None for no share."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=accelerator.device.type == "cuda",
    )


@torch.no_grad()
def evaluate(
    model: SamForSegmentation,
    dataset: SegmentationDataset,
    accelerator: Accelerator,
    loss: Loss,
    class_names: list[str],
    batch_size: int,
    workers: int = 0,
) -> dict[str, Any]:
    """Scores every image of a split at the size at which the model sees it.

    Args:
        model: on the accelerator's device; is put into evaluation mode.
        dataset: images with masks.
        accelerator: processes share the images; each returns the whole result.
        loss: of a batch of outputs and (B, S, S) labels.
        class_names: the foreground classes' names.
        batch_size: over all processes.
        workers: data loading processes.

    Returns:
        ``loss``, a mean over images, and what ``summarise`` returns.
    """
    model.eval()
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = GlobalBatches(len(dataset), batch_size, rank, world, shuffle=False)
    scores = []
    for batch in make_loader(dataset, batches, workers, accelerator):
        if batch is not None:
            scores += _score(model, batch, accelerator, loss)
    scores = sorted(gather_object(scores), key=lambda score: score[0])  # by the image's index
    _, losses, *columns = zip(*scores, strict=True)
    stacked = dict(zip(("dice", "iou", "accuracy"), map(torch.stack, columns), strict=True))
    return {"loss": sum(losses) / len(losses), **summarise(stacked, class_names)}


def _score(
    model: SamForSegmentation, batch: dict[str, Any], accelerator: Accelerator, loss: Loss
) -> list[tuple]:
    """(index, loss of its batch, dice, iou, accuracy) of every image."""
    with accelerator.autocast():
        output = model(batch["image"].to(accelerator.device))
    target = batch["mask"].to(accelerator.device)
    scores = image_scores(output.labels(), target, model.num_classes)
    columns = [scores[name].cpu() for name in ("dice", "iou", "accuracy")]
    mean_loss = float(loss(output, target))
    return [(i, mean_loss, *row) for i, *row in zip(batch["index"], *columns, strict=True)]
