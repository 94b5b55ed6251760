"""Segmentation metrics: the scores of each image, and their summaries over a data set.

Each data set has metrics of its own, which its papers report. Metrics lie in [0, 1], except for
balanced error rates, which are percentages in all papers, for ``index_mae``, and for ``hd95`` and
``size_difference``, which are in pixels. docs/losses.md says where those of shapes come from.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from naslora import shapes
from naslora.errors import UserError
from naslora.results import ClassScores, SplitScores

T_IOU = 0.65
"""The thresholded Jaccard index counts the IoU of an image as 0 below this value."""
CALIBRATION_BINS = 15

Scores = dict[str, Tensor]
"""Scores by name, from ``image_scores`` and ``further_scores``; (N, ...) tensors for N images."""

# ---- Scores of images ----------------------------------------------------------------------------


def image_scores(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int | None = None
) -> Scores:
    """Scores each image of (B, H, W) int64 labels of K classes, 2 if ``num_classes`` is 1.

    Dice and IoU are for the foreground classes. They are NaN for a class that is neither in the
    image nor in its prediction. A score of 1 would favour a model that predicts nothing, if many
    images are empty. Pixels whose target is ``ignore_index`` do not count.

    Returns:
        ``dice`` and ``iou``: (B, C) float32 for C foreground classes. ``accuracy``: (B,) float32,
        the share of pixels with the right label. ``confusion``: (B, K, K) int64, the number of
        pixels with the true class of the row and the predicted class of the column.
    """
    batch, labels = len(target), max(num_classes, 2)
    images = torch.arange(batch, device=target.device)[:, None, None]
    pairs = (images * labels + target) * labels + prediction  # (B, H, W)
    if ignore_index is not None:
        pairs = pairs[target != ignore_index]
    confusion = pairs.flatten().bincount(minlength=batch * labels**2).view(batch, labels, labels)
    counts = confusion.float()
    right = counts.diagonal(dim1=1, dim2=2)  # (B, K)
    both = counts.sum(1) + counts.sum(2)
    return {
        "dice": (2 * right / both)[:, 1:],  # 0 / 0 is NaN: the class is in neither
        "iou": (right / (both - right))[:, 1:],
        "accuracy": right.sum(1) / counts.sum((1, 2)),
        "confusion": confusion,
    }


def saliency_scores(probability: Tensor, target: Tensor) -> Scores:
    """Scores one image by the measures of salient object detection, with PySODMetrics.

    As in that field, the (H, W) map of probabilities is rounded to 8 bits and stretched to its full
    range. The target is (H, W) labels 0 and 1.

    Returns:
        () float64 each: ``s_alpha``, the structure measure; ``e_phi``, the alignment measure, mean
        over the thresholds; ``f_w_beta`` and ``f_w_beta_0.3``, the weighted F-measure with beta
        squared 1, the library's default, and 0.3, as in Conv-LoRA's tables; ``mae``.
    """
    import py_sod_metrics as sod  # imported here: it takes a second, and few data sets need it

    prediction = (255 * probability.cpu().float().numpy()).round().astype(np.uint8)
    truth = 255 * target.cpu().numpy().astype(np.uint8)

    def results(measure: Any) -> dict[str, Any]:
        measure.step(prediction, truth)
        return measure.get_results()

    found = {
        "s_alpha": results(sod.Smeasure())["sm"],
        "e_phi": results(sod.Emeasure())["em"]["curve"].mean(),
        "f_w_beta": results(sod.WeightedFmeasure(beta=1))["wfm"],
        "f_w_beta_0.3": results(sod.WeightedFmeasure(beta=0.3))["wfm"],
        "mae": results(sod.MAE())["mae"],
    }
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}


def _calibration_bins(probability: Tensor, target: Tensor) -> Tensor:
    """Sums of the pixels by their confidence, of (K, P) scores and (P,) labels.

    Returns:
        (CALIBRATION_BINS, 3) float64: the number of a bin's pixels, and the sums of their
        confidence and of what is right. If binary these are the foreground's probability and share.
    """
    confidence, right = probability[0], target
    if len(probability) > 1:
        confidence, likeliest = (probability / probability.sum(0).clamp(min=1e-6)).max(0)
        right = likeliest == target
    values = torch.stack([torch.ones_like(confidence), confidence, right], 1).double()
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    return values.new_zeros(CALIBRATION_BINS, 3).index_add_(0, bins, values)


# ---- Metrics of a data set -----------------------------------------------------------------------


class Metric(NamedTuple):
    """A metric that a data set is reported by."""

    label: str
    """Its name in tables."""
    of: Callable[[Scores], Tensor]
    """Computes it from the scores of all images: () for a number, or (K,) for one number a class.
    NaN where it is undefined."""
    binary: bool = False
    """Whether it is defined for binary masks only."""
    of_map: Literal["saliency", "calibration"] | None = None
    """Which scores of the class map it needs."""
    shape: Callable[[np.ndarray, np.ndarray, shapes.Spacing], float] | None = None
    """What it measures of the predicted and the true shape of a class, by the size of a pixel."""


def _mean_over_classes(values: Tensor) -> Tensor:
    """Means of (N, C) values: first over the images that have a class, then over the classes."""
    return values.nanmean(0).nanmean()


def _balanced_error(confusion: Tensor) -> Tensor:
    """Computes 100 (1 - (TPR + TNR) / 2) of (..., 2, 2) counts; NaN if a class has no pixel."""
    counts = confusion.double()
    rates = counts.diagonal(dim1=-2, dim2=-1) / counts.sum(-1)  # (..., 2): TNR, TPR
    return 100 * (1 - rates.mean(-1))


def _class_error(scores: Scores) -> Tensor:
    """Computes Trans10K's mBER: the mean over the classes of their balanced error rates.

    The error rate of a class is averaged over the images that contain the class. As in the code of
    Trans10K's authors, a pixel of another class is right only if it has its own label.
    """
    counts = scores["confusion"].double()  # (N, K, K)
    right = counts.diagonal(dim1=1, dim2=2)  # (N, K)
    own = counts.sum(2)
    others = own.sum(1, keepdim=True) - own
    positive = right / own
    negative = (right.sum(1, keepdim=True) - right) / others
    return _mean_over_classes(100 * (1 - (positive + negative)[:, 1:] / 2))


def _index_error(scores: Scores) -> Tensor:
    """Computes |predicted index - true index|, mean over the pixels, then over the images."""
    counts = scores["confusion"].double()  # (N, K, K)
    index = torch.arange(counts.shape[1], dtype=torch.float64)
    distance = (index[:, None] - index).abs()
    return ((distance * counts).sum((1, 2)) / counts.sum((1, 2))).nanmean()


def _global_iou(scores: Scores) -> Tensor:
    """Computes (K,) IoU over the pixels of all images; NaN for a class without pixels."""
    counts = scores["confusion"].sum(0).double()  # (K, K)
    right = counts.diagonal()
    return right / (counts.sum(0) + counts.sum(1) - right)


def _global_accuracy(scores: Scores, first: int) -> Tensor:
    """Computes the share of right labels among the pixels of the classes ``first`` .. K-1."""
    counts = scores["confusion"].sum(0).double()[first:]
    return counts[:, first:].diagonal().sum() / counts.sum()


def _calibration_error(scores: Scores) -> Tensor:
    """The expected calibration error, mean over the images; NaN for one without a pixel."""
    counts, confidence, right = scores["calibration"].unbind(-1)  # (N, B)
    return ((confidence - right).abs().sum(-1) / counts.sum(-1)).nanmean()


def _saliency(name: str, label: str) -> Metric:
    return Metric(label, lambda scores: scores[name].mean(), binary=True, of_map="saliency")


def _shape(name: str, label: str) -> Metric:
    own = getattr(shapes, name)
    return Metric(label, lambda scores: _mean_over_classes(scores[name]), shape=own)


METRICS: dict[str, Metric] = {
    "iou": Metric("IoU (Jaccard)", lambda scores: _mean_over_classes(scores["iou"])),
    "t_iou": Metric(
        f"T-Jac (IoU, 0 below {T_IOU})",
        lambda scores: _mean_over_classes(
            torch.where(scores["iou"] < T_IOU, 0.0, scores["iou"])  # NaN stays
        ),
    ),
    "dice": Metric("Dice", lambda scores: _mean_over_classes(scores["dice"])),
    "accuracy": Metric("Accuracy", lambda scores: scores["accuracy"].nanmean()),
    "ber": Metric(
        "BER, mean over images",
        lambda scores: _balanced_error(scores["confusion"]).nanmean(),
        binary=True,
    ),
    "ber_pooled": Metric(
        "BER, over all pixels",
        lambda scores: _balanced_error(scores["confusion"].sum(0)),
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
    "miou": Metric("mIoU with the background", lambda scores: _global_iou(scores).nanmean()),
    "class_iou": Metric("IoU over all pixels", _global_iou),
    "foreground_accuracy": Metric(
        "Accuracy without the background", lambda scores: _global_accuracy(scores, first=1)
    ),
    "foreground_miou": Metric(
        "mIoU without the background", lambda scores: _global_iou(scores)[1:].nanmean()
    ),
    "index_mae": Metric("MAE of the class index", _index_error),
    "mber": Metric("mBER", _class_error),
    "hd95": _shape("hd95", "HD95, pixels"),
    "nsd": _shape("nsd", f"NSD, {shapes.TOLERANCE:g} pixels"),
    "boundary_iou": _shape("boundary_iou", "Boundary IoU"),
    "cldice": _shape("cldice", "clDice"),
    "size_difference": _shape("size_difference", "Difference in size, pixels"),
    "lesion_f1": _shape("lesion_f1", "F1 of lesions"),
    "ece": Metric("ECE", _calibration_error, of_map="calibration"),
}


def further_scores(
    names: Sequence[str], class_map: Tensor, labels: Tensor, target: Tensor, ignore_index: int
) -> Scores:
    """The scores of one image that metrics need, beside those of ``image_scores``.

    The (K, H, W) class map is empty unless a metric has ``of_map``. Labels and target are (H, W).
    Pixels whose target is ``ignore_index`` do not count, and are in no shape.

    Returns:
        Scores by name. Those of shapes are (C,) float64: NaN for a class that is neither in the
        image nor in its prediction, the worst value for a class that is in one of them.
    """
    own: Scores = {}
    kinds = {METRICS[name].of_map for name in names}
    counted = target != ignore_index
    if "saliency" in kinds:
        own |= saliency_scores(class_map[0], target)
    if "calibration" in kinds:
        own["calibration"] = _calibration_bins(class_map[:, counted].float(), target[counted])
    found, truth = (values.where(counted, 0).cpu().numpy() for values in (labels, target))
    return own | shape_scores(names, found, truth, max(len(class_map), 2))


def shape_scores(
    names: Sequence[str],
    found: np.ndarray,
    truth: np.ndarray,
    count: int,
    spacing: shapes.Spacing = None,
) -> Scores:
    """The scores of an image or a volume that measure the shapes of its classes: (C,) by name.

    ``found`` are the predicted labels, ``truth`` the true ones, of ``count`` classes with the
    background. ``spacing`` is the size of an element along each axis, 1 if None. Metrics of other
    kinds are left out.
    """
    measures = {name: METRICS[name].shape for name in names}
    return {
        name: torch.tensor(
            [measure(found == k, truth == k, spacing) for k in range(1, count)], dtype=torch.float64
        )
        for name, measure in measures.items()
        if measure is not None
    }


def label_of(name: str, unit: str = "pixels") -> str:
    """The name of a metric in tables, in a unit of length."""
    label, cubic = METRICS[name].label, unit if unit in ("pixels", "voxels") else f"{unit}³"
    return label.replace("pixels", cubic if name == "size_difference" else unit)


def check_metrics(names: Sequence[str], num_classes: int) -> None:
    """Refuses metrics for binary masks only unless ``num_classes`` is 1, and not K."""
    for name in names:
        if METRICS[name].binary and num_classes > 1:
            raise UserError(f"metric {name!r} is defined for binary masks only")


# ---- The summary ---------------------------------------------------------------------------------


def stacked(scores: Sequence[Scores]) -> Scores:
    """The scores of several images in one tensor each."""
    return {name: torch.stack([own[name] for own in scores]) for name in scores[0]}


def summarise(
    scores: Scores, class_names: Sequence[str], metrics: Sequence[str] = ()
) -> SplitScores:
    """Averages the scores of all images: first over the images, then over the foreground classes.

    A class that no image has does not count. Without any foreground there is neither Dice nor IoU.
    The scores are ``image_scores`` of N images, and ``further_scores`` if a metric needs them.
    """
    image_dice = scores["dice"].nanmean(1)  # (N,)
    if "confusion" in scores and not scores["confusion"][:, 1:].any():
        # Dice and IoU of no foreground are no results.
        undefined = {name: torch.full_like(scores[name], torch.nan) for name in ("dice", "iou")}
        scores = {**scores, **undefined}
    dice, iou = scores["dice"].nanmean(0), scores["iou"].nanmean(0)  # (C,)
    both = zip(class_names, dice, iou, strict=True)
    values = {name: METRICS[name].of(scores) for name in metrics}
    names = ["background", *class_names]
    bins = scores["calibration"].sum(0).tolist() if "calibration" in scores else []
    return SplitScores(
        dice=known(dice.nanmean()),
        iou=known(iou.nanmean()),
        accuracy=known(scores["accuracy"].nanmean()),
        per_class={name: ClassScores(known(d), known(i)) for name, d, i in both},
        metrics={
            name: dict(zip(names, map(known, value), strict=True)) if value.dim() else known(value)
            for name, value in values.items()
        },
        calibration=[(count, confidence, right) for count, confidence, right in bins],
        image_dice=[known(value) for value in image_dice],
    )


def known(value: Tensor) -> float | None:
    """A () tensor as a number, NaN as None."""
    return None if value.isnan() else float(value)
