"""The training loss (paper, Eq. 4 and 8-10): lambda_seg (BCE + Dice) + lambda_cls CE."""

from typing import Literal

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from naslora.sam.segmentation import SegmentationOutput

ClassLoss = Literal["pixel", "matching"]
NO_OBJECT_WEIGHT = 0.1  # of unmatched tokens in the classification loss, as in Mask2Former
EPSILON = 1e-6


def segmentation_loss(
    output: SegmentationOutput,
    target: Tensor,
    class_loss: ClassLoss = "matching",
    lambda_seg: float = 1.0,
    lambda_cls: float = 1.0,
) -> Tensor:
    """Computes the loss of a batch, a mean over its images.

    Args:
        output: what the model predicted for B images of S x S pixels.
        target: (B, S, S) int64 labels; 0/1 if binary, else 0..K-1.
        class_loss: how several classes are compared. "pixel" follows the paper's words: the class
            map, normalised over the classes, gets BCE, Dice and a cross-entropy at every pixel.
            "matching" follows Conv-LoRA and Mask2Former: every class present is assigned the mask
            token that fits it best, and the tokens' classes get the cross-entropy.
        lambda_seg: weight of BCE + Dice.
        lambda_cls: weight of the cross-entropy; binary segmentation has none.
    """
    if output.classes is None:
        mask = target.float()  # (B, S, S)
        return lambda_seg * _bce_dice(output.masks[:, 0].float(), mask).mean()
    if class_loss == "pixel":
        return _pixel_loss(output, target, lambda_seg, lambda_cls)
    return _matching_loss(output, target, lambda_seg, lambda_cls)


def _bce_dice(logits: Tensor, mask: Tensor) -> Tensor:
    """BCE plus Dice of (..., S, S) logits, one value per map."""
    bce = F.binary_cross_entropy_with_logits(logits, mask, reduction="none").mean((-2, -1))
    return bce + _dice(logits.sigmoid(), mask)


def _dice(probability: Tensor, mask: Tensor) -> Tensor:
    """Eq. 10, 1 - 2 sum(y p) / (sum y + sum p), smoothed by one pixel so that empty maps count."""
    overlap = 2 * (probability * mask).sum((-2, -1)) + 1
    return 1 - overlap / (probability.sum((-2, -1)) + mask.sum((-2, -1)) + 1)


def _pixel_loss(
    output: SegmentationOutput, target: Tensor, lambda_seg: float, lambda_cls: float
) -> Tensor:
    scores = output.class_map()  # (B, K, S, S)
    probability = (scores + EPSILON) / (scores + EPSILON).sum(1, keepdim=True)
    mask = F.one_hot(target, scores.shape[1]).permute(0, 3, 1, 2).float()  # (B, K, S, S)
    # By hand, as F.binary_cross_entropy refuses NaN, which the training loop is to see and tell.
    right = torch.where(mask > 0, probability, 1 - probability)
    bce = -right.clamp(EPSILON, 1 - EPSILON).log().mean()
    dice = _dice(probability, mask).mean()
    cross_entropy = F.nll_loss(probability.log(), target)
    return lambda_seg * (bce + dice) + lambda_cls * cross_entropy


def _matching_loss(
    output: SegmentationOutput, target: Tensor, lambda_seg: float, lambda_cls: float
) -> Tensor:
    losses = [
        _matched_image(masks, classes, labels, lambda_seg, lambda_cls)
        for masks, classes, labels in zip(
            output.masks.float(), output.classes.float(), target, strict=True
        )
    ]
    return torch.stack(losses).mean()


def _matched_image(
    masks: Tensor, classes: Tensor, labels: Tensor, lambda_seg: float, lambda_cls: float
) -> Tensor:
    """The loss of one image: (Q, S, S) masks, (Q, K + 1) classes, (S, S) labels."""
    present = labels.unique()
    truth = (labels == present[:, None, None]).float()  # (P, S, S)
    with torch.no_grad():
        cost = lambda_seg * torch.stack([_bce_dice(masks, mask.expand_as(masks)) for mask in truth])
        cost = cost - lambda_cls * classes.softmax(-1)[:, present].T  # (P, Q)
        # A loss that is not finite is told by whoever trains; it must not fail in the assignment.
        cost = cost.nan_to_num(posinf=0.0, neginf=0.0)
        which, token = linear_sum_assignment(cost.cpu().numpy())
    token = torch.as_tensor(token, device=masks.device)
    which = torch.as_tensor(which, device=masks.device)
    no_object = classes.shape[-1] - 1
    wanted = torch.full((len(classes),), no_object, device=masks.device)
    wanted[token] = present[which]
    weight = torch.ones(classes.shape[-1], device=masks.device)
    weight[no_object] = NO_OBJECT_WEIGHT
    segmentation = _bce_dice(masks[token], truth[which]).mean()
    return lambda_seg * segmentation + lambda_cls * F.cross_entropy(classes, wanted, weight)
