"""Scores of a promptable model: simulated clicks, and a box, for each object of a split.

The first click is the centre of the object, each further one the centre of the largest error: the
pixel that is farthest from where the mask is right, as in the number of clicks (NoC) of RITM
(Sofiiuk et al., 2022). Of the three masks of the first click, that with the highest estimate
counts, as for a user. The best one has a score of its own.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torchvision.ops import masks_to_boxes

from naslora.data.dataset import SegmentationDataset
from naslora.results import CLICKS, MetricValue, SplitScores
from naslora.sam.losses import object_loss
from naslora.sam.objects import NEGATIVE, PADDING, POSITIVE
from naslora.sam.prompts import AnySam, PromptableSam
from naslora.training.evaluation import batches_of, evaluate
from naslora.training.interactive import (
    BOX,
    ONE,
    THREE,
    Objects,
    Prompts,
    chosen,
    enlarged,
    objects_of,
    overlap,
)
from naslora.training.run_config import RunConfig

THRESHOLDS = (0.85, 0.9)
"""IoU whose number of clicks is reported."""


class Turn(NamedTuple):
    """A prediction for N objects."""

    candidates: Tensor
    """(N, Q, S, S) float32 logits: three masks after the first click, else one."""
    best: Tensor
    """(N,) int64: the candidate with the highest estimate of its IoU."""
    prompts: Prompts
    """What it was made from."""

    @property
    def logits(self) -> Tensor:
        """(N, S, S) of the best candidates."""
        return chosen(self.candidates, self.best)[:, 0]


ImageScores = tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Of an image its index in the data set; of its N objects the (N,) loss after one click, IoU and
Dice, (N, clicks + 1), after each click and of the box, and the (N,) IoU of the best of three masks
after one click."""


def score_run(
    model: AnySam,
    dataset: SegmentationDataset,
    accelerator: Accelerator,
    config: RunConfig,
    metrics: Sequence[str] = (),
) -> SplitScores:
    """Scores a split by the run's task: as ``evaluate``, or by clicks.

    A promptable model gets all of ``CLICKS`` if ``metrics`` names any, and one without. Dice and
    IoU are those after one click, and means over the objects.
    """
    if not isinstance(model, PromptableSam):
        return evaluate(model, dataset, accelerator, config, metrics)
    model.eval()
    clicks = max(CLICKS) if metrics else 1
    own = [
        _score_image(model, batch, place, accelerator, clicks)
        for batch in batches_of(dataset, accelerator, config)
        for place in range(len(batch["index"]))
    ]
    scores: list[ImageScores] = sorted(gather_object(own))  # by the image's index
    _, *parts = zip(*scores, strict=True)
    losses, iou, dice, best = map(np.concatenate, parts)
    return SplitScores(
        loss=float(losses.mean()),
        dice=float(dice[:, 0].mean()),
        iou=float(iou[:, 0].mean()),
        metrics=_metrics(iou, dice, best) if metrics else {},
        resolution=f"{dataset.image_size} x {dataset.image_size}, {len(iou)} objects",
        click_iou=iou[:, :-1].mean(0).tolist() if metrics else None,
        image_dice=[float(own[:, 0].mean()) if len(own) else None for *_, own, _ in scores],
    )


def _metrics(iou: np.ndarray, dice: np.ndarray, best: np.ndarray) -> dict[str, MetricValue]:
    """The numbers of a table by their titles."""
    found: dict[str, MetricValue] = {}
    for title, values in (("IoU", iou), ("Dice", dice)):
        for clicks in CLICKS:
            name = f"{title}, {clicks} click{'s' if clicks > 1 else ''}"
            found[name] = float(values[:, clicks - 1].mean())
        found[f"{title}, box"] = float(values[:, -1].mean())
    found["IoU, 1 click, best of 3"] = float(best.mean())
    for threshold in THRESHOLDS:
        reached = iou[:, :-1] >= threshold
        needed = np.where(reached.any(1), reached.argmax(1) + 1, max(CLICKS))
        found[f"NoC {threshold:.0%}"] = float(needed.mean())
    return found


def _score_image(
    model: PromptableSam, batch: dict[str, Any], place: int, accelerator: Accelerator, clicks: int
) -> ImageScores:
    """Scores the objects of an image of a batch."""
    index, image = int(batch["index"][place]), batch["image"][place, None]
    objects = objects_of(batch["mask"][place, None].to(accelerator.device))
    if not len(objects.owners):
        none, turns = np.zeros(0, np.float32), np.zeros((0, clicks + 1))
        return index, none, turns, turns, none
    scores: list[Tensor] = []
    loss = best = torch.empty(0)
    for turn in play(model, image, objects, accelerator, clicks):
        common, total = (pixels.double() for pixels in overlap(turn.candidates, objects))
        # IoU and Dice, (2, N, Q); an object has pixels.
        both = torch.stack([common / (total - common), 2 * common / total])
        if not scores:
            loss = object_loss(turn.logits, objects.masks.float(), objects.counted.float())
            best = both[0].amax(1)
        scores.append(both.take_along_dim(turn.best[None, :, None], 2)[..., 0])
    iou, dice = torch.stack(scores, 2).cpu().numpy()
    return index, loss.cpu().numpy(), iou, dice, best.cpu().numpy()


@torch.no_grad()
def play(
    model: PromptableSam, image: Tensor, objects: Objects, accelerator: Accelerator, clicks: int
) -> Iterator[Turn]:
    """Predicts the masks of an image's objects after each click, and at last of their boxes.

    The model is in evaluation mode. The image is (1, 3, S, S) in [0, 1] and has objects.
    """
    masks, device = objects.masks, accelerator.device
    with accelerator.autocast():
        embedding = model(image.to(device))

    def predict(prompts: Prompts, previous: Tensor | None, wanted: slice) -> tuple[Tensor, Turn]:
        with accelerator.autocast():
            low, scores = model.decode(embedding, objects.owners, *prompts, previous, wanted)
        best, low = scores.float().argmax(1), low.float()
        return chosen(low, best), Turn(enlarged(low, masks), best, prompts)

    padding = torch.zeros(len(masks), 1, 2, device=device)
    prompts = Prompts(padding, torch.full((len(masks), 1), PADDING, device=device))
    logits, low = torch.full(masks.shape, -1.0, device=device), None
    for click in range(clicks):
        prompts = prompts.plus(*_next_clicks(logits, objects, prompts))
        low, turn = predict(prompts, low, ONE if click else THREE)
        logits = turn.logits
        yield turn
    corners = masks_to_boxes(masks).unflatten(1, (2, 2))
    box = torch.tensor(BOX, device=device).expand(len(masks), 2)
    yield predict(Prompts(corners, box), None, ONE)[1]


def _next_clicks(logits: Tensor, objects: Objects, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """The next click of each object: (N, 2) points and (N,) labels."""
    inside = (logits > 0).cpu().numpy()
    masks, counted = objects.masks.cpu().numpy(), objects.counted.cpu().numpy()
    clicked = prompts.points[:, 1:].long().cpu().numpy()  # without the padding
    found = []
    for own, truth, counts, before in zip(inside, masks, counted, clicked, strict=True):
        missed, wrong = truth & ~own & counts, own & ~truth & counts
        depths = [_centre(area, before) for area in (missed, wrong)]
        (depth, point), label = max(zip(depths, (POSITIVE, NEGATIVE), strict=True))
        if depth == 0:  # nothing is wrong, or all of it was clicked on
            point, label = (0, 0), PADDING
        found.append((point, label))
    points, labels = zip(*found, strict=True)
    device = logits.device
    return torch.tensor(points, device=device).float(), torch.tensor(labels, device=device)


def _centre(area: np.ndarray, clicked: np.ndarray) -> tuple[float, tuple[int, int]]:
    """The pixel of an (H, W) bool area that is farthest from its border, and its distance; 0 if
    there is none but ``clicked``, (P, 2), x and y."""
    from scipy import ndimage  # not for the help

    boxes = ndimage.find_objects(area.astype(np.uint8))
    if not boxes or boxes[0] is None:
        return 0.0, (0, 0)
    rows, columns = boxes[0]
    distance = np.zeros(area.shape)
    inner = ndimage.distance_transform_edt(np.pad(area[boxes[0]], 1))[1:-1, 1:-1]
    distance[rows, columns] = inner
    distance[clicked[:, 1], clicked[:, 0]] = 0
    row, column = np.unravel_index(distance.argmax(), area.shape)
    return float(distance[row, column]), (int(column), int(row))
