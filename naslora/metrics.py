"""Segmentation metrics: Dice, IoU and accuracy per image, averaged over the images."""

import torch
from torch import Tensor
from torchmetrics.functional.segmentation import dice_score, mean_iou


def image_scores(prediction: Tensor, target: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Scores a batch image by image.

    The background is left out. A class that is neither in an image nor predicted there has no score
    in it (NaN): were it counted as right, a model that predicts nothing would do well wherever many
    images are empty.

    Args:
        prediction: (B, S, S) int64 labels.
        target: (B, S, S) int64 labels.
        num_classes: 1 if binary, else K.

    Returns:
        ``dice`` and ``iou`` of shape (B, C) with C the foreground classes, ``accuracy`` (B,): the
        share of pixels with the right label.
    """
    labels = max(num_classes, 2)
    dice = dice_score(
        prediction, target, labels, include_background=False, average="none", input_format="index"
    )
    iou = mean_iou(
        prediction, target, labels, include_background=False, per_class=True, input_format="index"
    )
    absent = ~torch.stack(
        [((prediction == k) | (target == k)).flatten(1).any(1) for k in range(1, labels)], 1
    )
    return {
        "dice": dice.float().masked_fill(absent, torch.nan),
        "iou": iou.float().masked_fill(absent, torch.nan),
        "accuracy": (prediction == target).float().mean((1, 2)),
    }


def summarise(scores: dict[str, Tensor], class_names: list[str]) -> dict[str, object]:
    """Averages the scores of all images: first over images, then over foreground classes.

    Args:
        scores: ``image_scores`` of N images, concatenated.
        class_names: the foreground classes' names.

    Returns:
        ``dice``, ``iou``, ``accuracy``, and ``per_class`` with dice and iou by class name; a class
        that no image has is None and left out of the mean.
    """
    dice, iou = scores["dice"].nanmean(0), scores["iou"].nanmean(0)  # (C,)
    return {
        "dice": _number(dice.nanmean()),
        "iou": _number(iou.nanmean()),
        "accuracy": _number(scores["accuracy"].mean()),
        "per_class": {
            name: {"dice": _number(dice[i]), "iou": _number(iou[i])}
            for i, name in enumerate(class_names)
        },
    }


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)
