"""Segmentation metrics: each image is scored once, and summed up as each data set's papers do.

Shares lie in [0, 1]; balanced error rates are percentages, as they are printed everywhere.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from naslora.errors import UserError

T_IOU = 0.65  # below it the thresholded Jaccard index counts an image as a failure

Scores = dict[str, Tensor]  # of N images: (N, ...) each


def image_scores(prediction: Tensor, target: Tensor, num_classes: int) -> Scores:
    """Scores a batch image by image.

    The background is left out. A class that is neither in an image nor predicted there has no score
    in it (NaN): were it counted as right, a model that predicts nothing would do well wherever many
    images are empty.

    Args:
        prediction: (B, H, W) int64 labels.
        target: (B, H, W) int64 labels.
        num_classes: 1 if binary, else K.

    Returns:
        ``dice`` and ``iou`` of shape (B, C) with C the foreground classes; ``accuracy`` (B,), the
        share of pixels with the right label; ``confusion`` (B, K, K) int64, how many pixels of the
        class of the row have the label of the column, K = 2 if binary.
    """
    # Imported here, as they import matplotlib's pyplot; the labels below are wanted without it.
    from torchmetrics.functional.classification import multiclass_confusion_matrix
    from torchmetrics.functional.segmentation import dice_score, mean_iou

    labels = max(num_classes, 2)
    dice = dice_score(
        prediction, target, labels, include_background=False, average="none", input_format="index"
    )
    iou = mean_iou(
        prediction, target, labels, include_background=False, per_class=True, input_format="index"
    )
    confusion = torch.stack(
        [
            multiclass_confusion_matrix(image, truth, labels, validate_args=False)
            for image, truth in zip(prediction, target, strict=True)
        ]
    )
    absent = (confusion.sum(1) + confusion.sum(2))[:, 1:] == 0
    return {
        "dice": dice.float().masked_fill(absent, torch.nan),
        "iou": iou.float().masked_fill(absent, torch.nan),
        "accuracy": (prediction == target).float().mean((1, 2)),
        "confusion": confusion,
    }


def saliency_scores(probability: Tensor, target: Tensor) -> Scores:
    """The measures of salient and camouflaged object detection, by PySODMetrics.

    As is the rule there, the map is rounded to 8 bits and stretched to its full range.

    Args:
        probability: (H, W) of the foreground, in [0, 1].
        target: (H, W) labels 0 and 1.

    Returns:
        Numbers of the image, () float64 each: ``s_alpha`` (structure), ``e_phi`` (alignment, mean
        over the thresholds), ``f_w_beta`` and ``f_w_beta_0.3`` (weighted F, with beta squared 1 as
        in the library, and 0.3 as in Conv-LoRA's tables), ``mae``.
    """
    import py_sod_metrics as sod  # it imports for a second, and few data sets need it

    prediction = (255 * probability.cpu().float().numpy()).round().astype(np.uint8)
    truth = 255 * target.cpu().numpy().astype(np.uint8)
    measures = {
        "s_alpha": (sod.Smeasure(), lambda results: results["sm"]),
        "e_phi": (sod.Emeasure(), lambda results: results["em"]["curve"].mean()),
        "f_w_beta": (sod.WeightedFmeasure(beta=1), lambda results: results["wfm"]),
        "f_w_beta_0.3": (sod.WeightedFmeasure(beta=0.3), lambda results: results["wfm"]),
        "mae": (sod.MAE(), lambda results: results["mae"]),
    }
    scores = {}
    for name, (measure, read) in measures.items():
        measure.step(prediction, truth)
        scores[name] = torch.tensor(float(read(measure.get_results())), dtype=torch.float64)
    return scores


def summarise(
    scores: Scores, class_names: list[str], metrics: Sequence[str] = ()
) -> dict[str, object]:
    """Averages the scores of all images: first over images, then over foreground classes.

    Args:
        scores: ``image_scores`` of N images, and ``saliency_scores`` where a metric needs them.
        class_names: the foreground classes' names.
        metrics: names of ``METRICS``.

    Returns:
        ``dice``, ``iou``, ``accuracy``, and ``per_class`` with dice and iou by class name; a class
        that no image has is None and left out of the mean. ``metrics`` by name, where any are
        asked for; ``class_iou`` among them is a dict by class name, the background first.
    """
    dice, iou = scores["dice"].nanmean(0), scores["iou"].nanmean(0)  # (C,)
    summary = {
        "dice": _number(dice.nanmean()),
        "iou": _number(iou.nanmean()),
        "accuracy": _number(scores["accuracy"].mean()),
        "per_class": {
            name: {"dice": _number(dice[i]), "iou": _number(iou[i])}
            for i, name in enumerate(class_names)
        },
    }
    if metrics:
        summary["metrics"] = {name: METRICS[name].of(scores) for name in metrics}
    if "class_iou" in metrics:
        names = ["background", *class_names]
        values = map(_number, _global_iou(scores))
        summary["metrics"]["class_iou"] = dict(zip(names, values, strict=True))
    return summary


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)


def _mean_over_classes(values: Tensor) -> float | None:
    """Of (N, C): over the images that have a class, then over the classes."""
    return _number(values.nanmean(0).nanmean())


def _thresholded_iou(scores: Scores) -> float | None:
    iou = scores["iou"]
    return _mean_over_classes(torch.where(iou < T_IOU, 0.0, iou))


def _balanced_error(confusion: Tensor) -> Tensor:
    """100 (1 - (TPR + TNR) / 2) of (..., 2, 2) counts; NaN where a class is not in the truth."""
    counts = confusion.double()
    rates = counts.diagonal(dim1=-2, dim2=-1) / counts.sum(-1)  # (..., 2): TNR, TPR
    return 100 * (1 - rates.mean(-1))


def _class_error(scores: Scores) -> float | None:
    """Trans10K's mBER: a class's error is averaged over the images that contain it.

    As in its authors' code, a pixel of another class counts as right only with its own label.
    """
    counts = scores["confusion"].double()  # (N, K, K)
    right = counts.diagonal(dim1=1, dim2=2)  # (N, K)
    own = counts.sum(2)
    others = own.sum(1, keepdim=True) - own
    positive = right / own
    negative = (right.sum(1, keepdim=True) - right) / others
    return _mean_over_classes(100 * (1 - (positive + negative)[:, 1:] / 2))


def _index_error(scores: Scores) -> float | None:
    """Mean |index of the prediction - index of the truth|, per image."""
    counts = scores["confusion"].double()
    index = torch.arange(counts.shape[1], dtype=torch.float64)
    distance = (index[:, None] - index).abs()
    return _number(((distance * counts).sum((1, 2)) / counts.sum((1, 2))).mean())


def _global_iou(scores: Scores) -> Tensor:
    """(K,) over the pixels of all images; NaN for a class that is nowhere."""
    counts = scores["confusion"].sum(0).double()
    right = counts.diagonal()
    return right / (counts.sum(0) + counts.sum(1) - right)


def _global_accuracy(scores: Scores, first: int) -> float | None:
    """Share of the pixels of the classes from ``first`` on that have the right label."""
    counts = scores["confusion"].sum(0).double()[first:]
    return _number(counts[:, first:].diagonal().sum() / counts.sum())


class Metric(NamedTuple):
    """A number that some data set is reported by."""

    label: str
    """What tables call it."""
    of: Callable[[Scores], object]
    """From the scores of all images to the number; None where it is not defined."""
    binary: bool = False
    """Whether it is defined for two classes only."""
    saliency: bool = False
    """Whether it needs ``saliency_scores``."""


def _saliency(name: str, label: str) -> Metric:
    return Metric(label, lambda scores: _number(scores[name].mean()), binary=True, saliency=True)


METRICS: dict[str, Metric] = {
    "iou": Metric("IoU (Jaccard)", lambda scores: _mean_over_classes(scores["iou"])),
    "t_iou": Metric(f"T-Jac (IoU, 0 below {T_IOU})", _thresholded_iou),
    "dice": Metric("Dice", lambda scores: _mean_over_classes(scores["dice"])),
    "accuracy": Metric("Accuracy", lambda scores: _number(scores["accuracy"].mean())),
    "ber": Metric(
        "BER, mean over images",
        lambda scores: _number(_balanced_error(scores["confusion"]).nanmean()),
        binary=True,
    ),
    "ber_pooled": Metric(
        "BER, over all pixels",
        lambda scores: _number(_balanced_error(scores["confusion"].sum(0))),
        binary=True,
    ),
    "s_alpha": _saliency("s_alpha", "S_α"),
    "e_phi": _saliency("e_phi", "E_φ, mean"),
    "f_w_beta": _saliency("f_w_beta", "F^w_β, β² = 1"),
    "f_w_beta_0.3": _saliency("f_w_beta_0.3", "F^w_β, β² = 0.3"),
    "mae": _saliency("mae", "MAE"),
    "pixel_accuracy": Metric(
        "Accuracy over all pixels", lambda scores: _global_accuracy(scores, first=0)
    ),
    "miou": Metric(
        "mIoU with the background", lambda scores: _number(_global_iou(scores).nanmean())
    ),
    "class_iou": Metric("IoU over all pixels", _global_iou),
    "foreground_accuracy": Metric(
        "Accuracy without the background", lambda scores: _global_accuracy(scores, first=1)
    ),
    "foreground_miou": Metric(
        "mIoU without the background", lambda scores: _number(_global_iou(scores)[1:].nanmean())
    ),
    "index_mae": Metric("MAE of the class index", _index_error),
    "mber": Metric("mBER", _class_error),
}


def check_metrics(names: Sequence[str], num_classes: int) -> None:
    """Refuses metrics that do not exist or are not defined for so many classes.

    Raises:
        UserError: says which.
    """
    for name in names:
        if name not in METRICS:
            raise UserError(f"metrics must be among {', '.join(METRICS)}, got {name!r}")
        if METRICS[name].binary and num_classes > 1:
            raise UserError(f"metric {name!r} is defined for binary masks only")
