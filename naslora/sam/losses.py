"""The training loss, lambda_seg (BCE + Dice) + lambda_cls CE (paper, Eq. 4 and 8-10).

``boundary_weight`` weighs the pixels of BCE and Dice as the structure loss of F3Net does (Wei et
al., AAAI 2020) and, after it, PraNet (Fan et al., MICCAI 2020): by 1 + w |mean - mask|, where the
mean is the mask's over 31 x 31 pixels, and w is 5. They use the weighted IoU in place of Dice. Here
the mean is over the pixels that count, so that the image's border is no boundary.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from naslora.choices import ClassLoss

if TYPE_CHECKING:  # it imports packages of models, and configurations name a loss without them
    from naslora.sam.segmentation import SegmentationOutput

NO_OBJECT_WEIGHT = 0.1
"""Weight of the class "no object" in the cross-entropy, as in Mask2Former."""
EPSILON = 1e-6
"""Added to the scores of the class map, and the distance of BCE's probabilities from 0 and 1."""
FOCAL_WEIGHT = 20.0
"""Of the focal loss beside Dice, as SAM has it."""
BOUNDARY_WINDOW = 31
"""Side in pixels of the window that says how near a boundary is."""


def segmentation_loss(
    output: "SegmentationOutput",
    target: Tensor,
    class_loss: ClassLoss = "matching",
    lambda_seg: float = 1.0,
    lambda_cls: float = 1.0,
    ignore_index: int | None = None,
    boundary_weight: float = 0.0,
) -> Tensor:
    """Computes the loss of a batch: the mean over its images.

    Args:
        output: the prediction for B images of S x S pixels.
        target: (B, S, S) int64 labels: 0 and 1 if binary, else 0 .. K-1.
        class_loss: the loss for several classes; binary segmentation ignores it. "pixel" follows
            the paper's text: BCE, Dice and the cross-entropy compare the class map, normalised over
            the classes, with the labels at every pixel. "matching" follows Conv-LoRA and
            Mask2Former: each class in the image is assigned to the mask token that fits best. BCE
            and Dice compare the masks of these tokens, and the cross-entropy the classes of all
            tokens.
        lambda_seg: weight of BCE + Dice.
        lambda_cls: weight of the cross-entropy. Binary segmentation has no cross-entropy.
        ignore_index: label of the pixels that do not count; None if all count.
        boundary_weight: how much more pixels at the boundary of a mask weigh in BCE and Dice, at
            most; 0 weighs all alike.

    Returns:
        () float32.
    """
    counted = None
    compiling = torch.compiler.is_compiling()  # then nothing is read back from the device
    if ignore_index is not None and (compiling or (target == ignore_index).any()):  # few have any
        counted = (target != ignore_index).float()
        target = target.where(counted > 0, 0)
    if output.classes is None:
        mask = target.float()  # (B, S, S)
        weights = _pixel_weights(mask, counted, boundary_weight)
        return lambda_seg * _bce_dice(output.masks[:, 0].float(), mask, weights).mean()
    weighing = lambda_seg, lambda_cls, boundary_weight
    if class_loss == "pixel":
        return _pixel_loss(output, target, counted, *weighing)
    own = [None] * len(target) if counted is None else counted
    images = zip(output.masks.float(), output.classes.float(), target, own, strict=True)
    return torch.stack([_matched_image(*image, *weighing) for image in images]).mean()


def object_loss(logits: Tensor, masks: Tensor, counted: Tensor) -> Tensor:
    """SAM's loss of masks (Kirillov et al., 2023, A): focal loss times 20, plus Dice.

    Args:
        logits: (N, h, w).
        masks: the same shape, in [0, 1].
        counted: the same shape, 1 where a pixel counts, else 0.

    Returns:
        (N,) float32.
    """
    logits = logits.float()
    probability = logits.sigmoid()
    wrong = probability + masks - 2 * masks * probability  # the probability of the other label
    bce = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    focal = (0.75 - 0.5 * masks) * wrong.square() * bce
    return FOCAL_WEIGHT * _mean(focal, counted) + _dice(probability, masks, counted)


def _pixel_weights(mask: Tensor, counted: Tensor | None, boundary_weight: float) -> Tensor | None:
    """What each pixel of a mask weighs in BCE and Dice; None if all weigh alike.

    Args:
        mask: (N, S, S) or (B, K, S, S), 0 or 1.
        counted: 1 where a pixel counts, of a shape that broadcasts to the mask's; None if all do.
        boundary_weight: as in ``segmentation_loss``.
    """
    counted = None if counted is None else counted.expand_as(mask)
    if not boundary_weight:
        return counted
    if counted is None:
        return 1 + boundary_weight * (_blurred(mask) - mask).abs()
    mean = _blurred(mask * counted) / _blurred(counted).clamp(min=EPSILON)
    return counted * (1 + boundary_weight * (mean - mask).abs())


def _blurred(maps: Tensor) -> Tensor:
    """Means over BOUNDARY_WINDOW, by columns and then by rows, which takes less time."""
    side, half = BOUNDARY_WINDOW, BOUNDARY_WINDOW // 2
    for window, padding in (((side, 1), (half, 0)), ((1, side), (0, half))):
        maps = F.avg_pool2d(maps, window, 1, padding, count_include_pad=False)
    return maps


def _bce_dice(logits: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    """Eq. 9 and 10: BCE plus Dice of (..., S, S) logits, one value a map.

    Args:
        logits: (..., S, S).
        mask: the same shape, 0 or 1.
        weights: what a pixel weighs, of a shape that broadcasts to this; None if all weigh alike.
    """
    bce = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    return _mean(bce, weights) + _dice(logits.sigmoid(), mask, weights)


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted mean of (..., S, S); 0 if no pixel counts."""
    if weights is None:
        return values.mean((-2, -1))
    return (values * weights).sum((-2, -1)) / weights.sum((-2, -1)).clamp(min=1)


def _dice(probability: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    """Eq. 10: 1 - 2 sum(y p) / (sum y + sum p), one value a map.

    One pixel is added to the numerator and the denominator, so that an empty map has a loss.
    """
    area = mask
    if weights is not None:
        probability, area = probability * weights, mask * weights
    overlap = 2 * (probability * mask).sum((-2, -1)) + 1
    return 1 - overlap / (probability.sum((-2, -1)) + area.sum((-2, -1)) + 1)


def _pixel_loss(
    output: "SegmentationOutput",
    target: Tensor,
    counted: Tensor | None,
    lambda_seg: float,
    lambda_cls: float,
    boundary_weight: float,
) -> Tensor:
    scores = output.class_map()  # (B, K, S, S)
    probability = (scores + EPSILON) / (scores + EPSILON).sum(1, keepdim=True)
    mask = F.one_hot(target, scores.shape[1]).permute(0, 3, 1, 2).float()  # (B, K, S, S)
    own = None if counted is None else counted[:, None]  # for all classes
    own = _pixel_weights(mask, own, boundary_weight)
    # F.binary_cross_entropy raises on NaN. The training loop must get NaN, because it reports it.
    right = torch.where(mask > 0, probability, 1 - probability)
    bce = _mean(-right.clamp(EPSILON, 1 - EPSILON).log(), own).mean()
    dice = _dice(probability, mask, own).mean()
    cross_entropy = _mean(F.nll_loss(probability.log(), target, reduction="none"), counted).mean()
    return lambda_seg * (bce + dice) + lambda_cls * cross_entropy


def _matched_image(
    masks: Tensor,
    classes: Tensor,
    labels: Tensor,
    counted: Tensor | None,
    lambda_seg: float,
    lambda_cls: float,
    boundary_weight: float,
) -> Tensor:
    """Computes the loss of one image: (Q, S, S) masks, (Q, K + 1) classes, (S, S) labels."""
    from scipy.optimize import linear_sum_assignment  # not for the help

    present = labels.unique() if counted is None else labels[counted > 0].unique()
    if not len(present):  # no pixel counts
        return 0.0 * (masks.sum() + classes.sum())
    truth = (labels == present[:, None, None]).float()  # (P, S, S)
    weights = _pixel_weights(truth, counted, boundary_weight)
    with torch.no_grad():
        own = zip(truth, [None] * len(truth) if weights is None else weights, strict=True)
        fits = [_bce_dice(masks, mask.expand_as(masks), weight) for mask, weight in own]
        cost = lambda_seg * torch.stack(fits)
        cost = cost - lambda_cls * classes.softmax(-1)[:, present].T  # (P, Q)
        # The assignment raises on values that are not finite. The training loop must get them in
        # the loss, because it reports them.
        cost = cost.nan_to_num(posinf=0.0, neginf=0.0)
        which, token = linear_sum_assignment(cost.cpu().numpy())
    token = torch.as_tensor(token, device=masks.device)
    which = torch.as_tensor(which, device=masks.device)
    no_object = classes.shape[-1] - 1
    wanted = torch.full((len(classes),), no_object, device=masks.device)
    wanted[token] = present[which]
    weight = torch.ones(classes.shape[-1], device=masks.device)
    weight[no_object] = NO_OBJECT_WEIGHT
    weights = None if weights is None else weights[which]
    segmentation = _bce_dice(masks[token], truth[which], weights).mean()
    return lambda_seg * segmentation + lambda_cls * F.cross_entropy(classes, wanted, weight)
