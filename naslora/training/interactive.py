"""Simulated prompts of a promptable model: the loss that it trains with, and its scores.

Training is as SAM's authors and micro-sam do it (Kirillov et al., 2023, A). An object's first
prompt is a point in it or its box, which is jittered. A prediction from a point has three masks, of
which the best trains. Then clicks follow where the mask errs, on the object where it is missed and
off it elsewhere. With the last mask as a prompt they give one mask. As in RITM (Sofiiuk et al.,
2022), only the last prediction has gradients: the others say where to click. To save predictions,
all clicks but the last one are drawn where the first mask errs.

Scores are of clicks, and of a box, for each object of a split. The first click is the centre of the
object, each further one the centre of the largest error: the pixel that is farthest from where the
mask is right, as in RITM's number of clicks (NoC). Of the three masks of the first click, that with
the highest estimate counts, as for a user. The best one has a score of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torchvision.ops import masks_to_boxes

from naslora.data.dataset import SegmentationDataset
from naslora.data.masks import IGNORED
from naslora.results import CLICKS, MetricValue, SplitScores
from naslora.sam.losses import object_loss
from naslora.sam.objects import BOTTOM_RIGHT, NEGATIVE, PADDING, POSITIVE, TOP_LEFT
from naslora.sam.promptable import AnySam, PromptableSam
from naslora.training.evaluation import batches_of, evaluate
from naslora.training.run_config import RunConfig

ONE, THREE, ALL = slice(0, 1), slice(1, 4), slice(0, 4)
"""Mask tokens: that of one mask, the three of ambiguous points, and all."""
POINT, BOX = (POSITIVE, PADDING), (TOP_LEFT, BOTTOM_RIGHT)
"""Labels of a first prompt."""
JITTER, MOST_JITTER = 0.1, 20 / 1024
"""How far the corners of a box move: the standard deviation, as a share of the box's sides, and the
most, as a share of the image's."""
FIRST_ALONE = 0.5
"""Share of the batches that train the first prompts; the others train corrections."""
THRESHOLDS = (0.85, 0.9)
"""IoU whose number of clicks is reported."""


class Objects(NamedTuple):
    """N objects of a batch of images."""

    owners: Tensor
    """(N,) int64, the image of each."""
    masks: Tensor
    """(N, h, w) bool."""
    counted: Tensor
    """(N, h, w) bool: the pixels that count."""


class Prompts(NamedTuple):
    """Prompts of N objects, P each."""

    points: Tensor
    """(N, P, 2) float32, x and y in pixels of the image as the model sees it."""
    labels: Tensor
    """(N, P) int64, as in ``encode_points``."""

    def plus(self, points: Tensor, labels: Tensor) -> "Prompts":
        """With one more point for each object, (N, 2) and (N,)."""
        return Prompts(
            torch.cat([self.points, points[:, None]], 1),
            torch.cat([self.labels, labels[:, None]], 1),
        )


def objects_of(numbers: Tensor) -> Objects:
    """The objects of (B, S, S) int64 images of numbers 1, 2, ..., as ``choose_objects`` makes."""
    counts = numbers.where(numbers != IGNORED, 0).amax((1, 2))
    owners = torch.arange(len(numbers), device=numbers.device).repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    own = torch.arange(len(owners), device=numbers.device) - starts[owners] + 1
    mine = numbers[owners]
    return Objects(owners, mine == own[:, None, None], mine != IGNORED)


def enlarged(masks: Tensor, like: Tensor) -> Tensor:
    """(N, Q, 4g, 4g) to (N, Q, h, w) of ``like``, (N, h, w)."""
    return F.interpolate(masks, like.shape[1:], mode="bilinear", align_corners=False)


def chosen(masks: Tensor, best: Tensor) -> Tensor:
    """(N, 1, h, w): one of (N, Q, h, w) masks each."""
    return masks[torch.arange(len(masks), device=masks.device), best][:, None]


# ---- Training ---------------------------------------------------------------------------------


@dataclass
class InteractiveLoss:
    """The loss of a batch, from its image embeddings: the mean over its images.

    What an image without objects adds is 0.
    """

    model: PromptableSam
    """Decodes the embeddings."""
    most_clicks: int
    """Most prompts of an object."""
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    """Makes the context of the precision."""

    def __call__(self, embeddings: Tensor, numbers: Tensor) -> Tensor:
        """The loss of (B, 256, g, g) embeddings and (B, S, S) int64 numbers of objects: ()."""
        objects = objects_of(numbers)
        if not len(objects.owners):
            return 0.0 * embeddings.float().sum()
        halves = _halved(objects)
        prompts, boxed = _first_prompts(objects.masks, halves.masks)
        wanted, previous = ALL, None
        decode = partial(self.model.decode, embeddings, objects.owners)
        allowed = torch.stack([boxed, ~boxed, ~boxed, ~boxed], 1)  # (N, 4)
        for clicks in self._corrections():
            with torch.no_grad(), self.autocast():
                masks, scores = decode(*prompts, previous, wanted)
            best = scores.float().masked_fill(~allowed, -torch.inf).argmax(1)
            previous = chosen(masks.float(), best)
            wrong = ((enlarged(previous, halves.masks)[:, 0] > 0) != halves.masks) & halves.counted
            for _ in range(clicks):
                prompts = prompts.plus(*_correction(wrong, halves.masks))
            wanted, allowed = ONE, allowed.new_ones(len(boxed), 1)
        with self.autocast():
            masks, scores = decode(*prompts, previous, wanted)
        losses = _loss(masks.float(), scores.float(), allowed, halves)
        shares = objects.owners.bincount(minlength=len(numbers))[objects.owners] * len(numbers)
        return (losses / shares).sum()

    def _corrections(self) -> list[int]:
        """Draws the numbers of clicks after each prediction but the last."""
        corrections = 0
        if self.most_clicks > 1 and float(torch.rand(())) >= FIRST_ALONE:
            corrections = int(torch.randint(1, self.most_clicks, ()))
        return [clicks for clicks in (corrections - 1, min(corrections, 1)) if clicks > 0]


def _first_prompts(masks: Tensor, halves: Tensor) -> tuple[Prompts, Tensor]:
    """Points in (N, S/2, S/2) halves, each with a padding, or jittered boxes of (N, S, S) masks;
    and which of them are boxes, (N,) bool."""
    size, device = masks.shape[-1], masks.device
    boxes = masks_to_boxes(masks)  # (N, 4), x y x y
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    shift = (JITTER * sides * torch.randn(boxes.shape).to(device)).clamp(
        -MOST_JITTER * size, MOST_JITTER * size
    )
    corners = (boxes + shift).clamp(0, size - 1).unflatten(1, (2, 2))
    drawn = _drawn(halves)
    points = torch.stack([drawn, torch.zeros_like(drawn)], 1)
    boxed = (torch.rand(len(masks)) < 0.5).to(device)
    labels = torch.tensor([POINT, BOX], device=device)[boxed.long()]
    return Prompts(torch.where(boxed[:, None, None], corners, points), labels), boxed


def _drawn(areas: Tensor) -> Tensor:
    """One pixel at random of each of (N, S/2, S/2) bool areas: (N, 2), x and y in pixels of S x S.
    The first pixel if an area is empty."""
    counts = areas.flatten(1).cumsum(1)
    wanted = (torch.rand(len(areas), 1).to(areas.device) * counts[:, -1:]).ceil().long()
    place = torch.searchsorted(counts, wanted.clamp(min=1)).clamp(max=counts.shape[1] - 1)[:, 0]
    place = torch.stack([place % areas.shape[-1], place // areas.shape[-1]], 1)
    return 2.0 * place + 0.5


def _halved(objects: Objects) -> Objects:
    """The objects at half of the size: finer than the decoder draws, and cheaper to compare than
    the image. A pixel is an object's if two of four are, and counts if all four do."""
    masks, counted = (F.avg_pool2d(part.float(), 2) for part in (objects.masks, objects.counted))
    return Objects(objects.owners, masks >= 0.5, counted == 1)


def _overlap(masks: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
    """Pixels that (N, Q, h, w) mask logits have in common with their objects, and the sum of the
    pixels of both: (N, Q) int64. Pixels that do not count are in neither."""
    inside = (masks > 0) & objects.counted[:, None]
    truth = (objects.masks & objects.counted)[:, None]
    return (inside & truth).sum((2, 3)), inside.sum((2, 3)) + truth.sum((2, 3))


def _correction(wrong: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Draws a click of each object in (N, h, w) errors: (N, 2) and labels (N,)."""
    place = _drawn(wrong)
    columns, rows = (place / 2).long().unbind(1)
    on = masks[torch.arange(len(place), device=place.device), rows, columns]
    return place, torch.where(on, POSITIVE, NEGATIVE)


def _loss(masks: Tensor, scores: Tensor, allowed: Tensor, objects: Objects) -> Tensor:
    """The loss of each object: of the best of its allowed masks (N, Q, 4g, 4g), and of the (N, Q)
    scores that estimate their IoU."""
    truth, counted = objects.masks.float(), objects.counted.float()
    with torch.no_grad():
        large = enlarged(masks.detach(), truth)
        common, total = _overlap(large, objects)
        iou = common / (total - common).clamp(min=1)  # (N, Q)
        best = torch.zeros_like(objects.owners)
        if masks.shape[1] > 1:
            fits = [object_loss(one, truth, counted) for one in large.unbind(1)]
            best = torch.stack(fits, 1).masked_fill(~allowed, torch.inf).argmin(1)
    own = enlarged(chosen(masks, best), truth)[:, 0]
    error = ((scores - iou) ** 2 * allowed).sum(1) / allowed.sum(1)
    return object_loss(own, truth, counted) + error


# ---- Scores -----------------------------------------------------------------------------------


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


class ImageScores(NamedTuple):
    """Scores of the N objects of one image."""

    image: int
    """Its index in the data set."""
    loss: np.ndarray
    """(N,) loss after one click."""
    iou: np.ndarray
    """(N, clicks + 1) after each click; the last is of the box."""
    dice: np.ndarray
    """The same."""
    best: np.ndarray
    """(N,) IoU of the best of three masks after one click."""


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
    parts = zip(*(one[1:] for one in scores), strict=True)
    losses, iou, dice, best = map(np.concatenate, parts)
    return SplitScores(
        loss=float(losses.mean()),
        dice=float(dice[:, 0].mean()),
        iou=float(iou[:, 0].mean()),
        metrics=_metrics(iou, dice, best) if metrics else {},
        resolution=f"{dataset.image_size} x {dataset.image_size}, {len(iou)} objects",
        click_iou=iou[:, :-1].mean(0).tolist() if metrics else None,
        image_dice=[float(one.dice[:, 0].mean()) if len(one.dice) else None for one in scores],
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
        return ImageScores(index, none, turns, turns, none)
    scores: list[Tensor] = []
    loss = best = torch.empty(0)
    for turn in play(model, image, objects, accelerator, clicks):
        common, total = (pixels.double() for pixels in _overlap(turn.candidates, objects))
        # IoU and Dice, (2, N, Q); an object has pixels.
        both = torch.stack([common / (total - common), 2 * common / total])
        if not scores:
            loss = object_loss(turn.logits, objects.masks.float(), objects.counted.float())
            best = both[0].amax(1)
        scores.append(both.take_along_dim(turn.best[None, :, None], 2)[..., 0])
    iou, dice = torch.stack(scores, 2).cpu().numpy()
    return ImageScores(index, loss.cpu().numpy(), iou, dice, best.cpu().numpy())


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
