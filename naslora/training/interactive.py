"""Training by simulated prompts, as SAM's authors and micro-sam do it (Kirillov et al., 2023, A).

An object's first prompt is a point in it or its box, which is jittered. A prediction from a point
has three masks, of which the best trains. Then clicks follow where the mask errs, on the object
where it is missed and off it elsewhere. With the last mask as a prompt they give one mask. As in
RITM (Sofiiuk et al., 2022), only the last prediction has gradients: the others say where to click.
To save predictions, all clicks but the last one are drawn where the first mask errs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import masks_to_boxes

from naslora.data.masks import IGNORED
from naslora.sam.losses import object_loss
from naslora.sam.objects import BOTTOM_RIGHT, NEGATIVE, PADDING, POSITIVE, TOP_LEFT
from naslora.sam.prompts import PromptableSam

ONE, THREE, ALL = slice(0, 1), slice(1, 4), slice(0, 4)
"""Mask tokens: that of one mask, the three of ambiguous points, and all."""
POINT, BOX = (POSITIVE, PADDING), (TOP_LEFT, BOTTOM_RIGHT)
"""Labels of a first prompt."""
JITTER, MOST_JITTER = 0.1, 20 / 1024
"""How far the corners of a box move: the standard deviation, as a share of the box's sides, and the
most, as a share of the image's."""
FIRST_ALONE = 0.5
"""Share of the batches that train the first prompts; the others train corrections."""


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
    """(N, P) int64, as in ``decode``."""

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
    mine = numbers.short()[owners]
    return Objects(owners, mine == own[:, None, None], mine != IGNORED)


def enlarged(masks: Tensor, like: Tensor) -> Tensor:
    """(N, Q, 4g, 4g) to (N, Q, h, w) of ``like``, (N, h, w)."""
    return F.interpolate(masks, like.shape[1:], mode="bilinear", align_corners=False)


def chosen(masks: Tensor, best: Tensor) -> Tensor:
    """(N, 1, h, w): one of (N, Q, h, w) masks each."""
    return masks[torch.arange(len(masks), device=masks.device), best][:, None]


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
        for clicks in self.corrections():
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

    def corrections(self) -> list[int]:
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
    rows = (part[:, ::2].byte() + part[:, 1::2] for part in (objects.masks, objects.counted))
    masks, counted = (part[..., ::2] + part[..., 1::2] for part in rows)
    return Objects(objects.owners, masks >= 2, counted == 4)


def overlap(masks: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
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
        common, total = overlap(large, objects)
        iou = common / (total - common).clamp(min=1)  # (N, Q)
        best = torch.zeros_like(objects.owners)
        if masks.shape[1] > 1:
            fits = [object_loss(one, truth, counted) for one in large.unbind(1)]
            best = torch.stack(fits, 1).masked_fill(~allowed, torch.inf).argmin(1)
    own = enlarged(chosen(masks, best), truth)[:, 0]
    error = ((scores - iou) ** 2 * allowed).sum(1) / allowed.sum(1)
    return object_loss(own, truth, counted) + error
