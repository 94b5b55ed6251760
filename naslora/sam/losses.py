"""The training loss, lambda_seg (BCE + Dice) + lambda_cls CE (paper, Eq. 4 and 8-10).

``TERMS`` can replace BCE + Dice. docs/losses.md has the source of each. Those of a region and of
hard pixels are the functions of segmentation_models_pytorch.

``boundary_weight`` weighs the pixels of BCE and Dice as the structure loss of F3Net does (Wei et
al., AAAI 2020) and, after it, PraNet (Fan et al., MICCAI 2020): by 1 + w |mean - mask|, where the
mean is the mask's over 31 x 31 pixels, and w is 5. They use the weighted IoU in place of Dice, as
the term ``structure`` does. Here the mean is over the pixels that count, so that the image's border
is no boundary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from naslora.choices import ClassLoss
from naslora.errors import UserError

if TYPE_CHECKING:  # it imports packages of models, and configurations name a loss without them
    from naslora.sam.segmentation import SegmentationOutput

NO_OBJECT_WEIGHT = 0.1
"""Weight of the class "no object" in the cross-entropy, as in Mask2Former."""
EPSILON = 1e-6
"""Added to the scores of the class map, and the distance of their probabilities from 0 and 1."""
FOCAL_WEIGHT = 20.0
"""Of the focal loss beside Dice, as SAM has it."""
BOUNDARY_WINDOW = 31
"""Side in pixels of the window that says how near a boundary is."""
STRUCTURE_WEIGHT = 5.0
"""Boundary weight of the structure loss."""
SKELETON_STEPS = 10
"""Erosions of the soft skeleton: half the width in pixels of the widest structure."""
SKIPPED = 255
"""In place of 0 or 1 where a pixel does not count, for the library."""
PAPER_TERMS: Mapping[str, float] = MappingProxyType({"bce": 1.0, "dice": 1.0})
"""The paper's loss of masks."""


@dataclass(frozen=True)
class SegmentationLoss:
    """The loss of a batch: the mean over its images."""

    class_loss: ClassLoss = "matching"
    """The loss for several classes; binary segmentation ignores it. "pixel" follows the paper's
    text: BCE, Dice and the cross-entropy compare the class map, normalised over the classes, with
    the labels at every pixel. "matching" follows Conv-LoRA and Mask2Former: each class in the image
    is assigned to the mask token that fits best, by BCE + Dice. The loss of masks compares the
    masks of these tokens, and the cross-entropy the classes of all tokens."""
    lambda_seg: float = 1.0
    """Weight of the loss of masks, BCE + Dice."""
    lambda_cls: float = 1.0
    """Weight of the cross-entropy. Binary segmentation has no cross-entropy."""
    ignore_index: int | None = None
    """Label of the pixels that do not count; None if all count."""
    boundary_weight: float = 0.0
    """How much more pixels at the boundary of a mask weigh in BCE and Dice, at most; 0 weighs all
    alike."""
    terms: Mapping[str, float] = field(default_factory=lambda: PAPER_TERMS)
    """Weights of the loss of masks, by names of ``TERMS``."""
    class_weights: Sequence[float] | None = None
    """What each class weighs, the background first; None if all weigh alike. They weigh the masks
    and the cross-entropy of classes. If binary they weigh the pixels of BCE and Dice."""

    def __call__(self, output: "SegmentationOutput", target: Tensor) -> Tensor:
        """Computes the loss of the prediction for B images of S x S pixels: () float32.

        ``target`` is (B, S, S) int64 labels: 0 and 1 if binary, else 0 .. K-1.
        """
        counted, ignored = None, self.ignore_index
        compiling = torch.compiler.is_compiling()  # then nothing is read back from the device
        if ignored is not None and (compiling or (target == ignored).any()):  # few have any
            counted = (target != ignored).float()
            target = target.where(counted > 0, 0)
        classes = None
        if self.class_weights is not None:
            classes = torch.tensor(self.class_weights, dtype=torch.float32, device=target.device)
        if output.classes is None:
            mask = target.float()  # (B, S, S)
            weights = _pixel_weights(mask, counted, self.boundary_weight)
            if classes is not None:
                weights = classes[target] if weights is None else weights * classes[target]
            logits = output.masks[:, 0].float()
            return self.lambda_seg * _mask_loss(logits, mask, counted, weights, self.terms).mean()
        if self.class_loss == "pixel":
            return self._of_pixels(output.class_map(), target, counted, classes)
        own = [None] * len(target) if counted is None else counted
        images = zip(output.masks.float(), output.classes.float(), target, own, strict=True)
        return torch.stack([self._matched(*image, classes) for image in images]).mean()

    def _of_pixels(
        self, scores: Tensor, target: Tensor, counted: Tensor | None, of_class: Tensor | None
    ) -> Tensor:
        """The loss of a class map (B, K, S, S) with classes of (K,) weights."""
        probability = (scores + EPSILON) / (scores + EPSILON).sum(1, keepdim=True)
        count = scores.shape[1]
        mask = F.one_hot(target, count).permute(0, 3, 1, 2).float().flatten(0, 1)  # (B K, S, S)
        own = None if counted is None else counted.repeat_interleave(count, 0)
        weights = _pixel_weights(mask, own, self.boundary_weight)
        logits = probability.flatten(0, 1).logit(EPSILON)
        values = _mask_loss(logits, mask, own, weights, self.terms).view(-1, count)
        segmentation = _class_mean(values, of_class).mean()
        entropy = F.nll_loss(probability.log(), target, reduction="none")
        if of_class is not None:
            counted = of_class[target] * (1.0 if counted is None else counted)
        return self.lambda_seg * segmentation + self.lambda_cls * _mean(entropy, counted).mean()

    def _matched(
        self,
        masks: Tensor,
        classes: Tensor,
        labels: Tensor,
        counted: Tensor | None,
        of_class: Tensor | None,
    ) -> Tensor:
        """The loss of one image: (Q, S, S) masks, (Q, K + 1) classes, (S, S) labels."""
        from scipy.optimize import linear_sum_assignment  # not for the help

        present = labels.unique() if counted is None else labels[counted > 0].unique()
        if not len(present):  # no pixel counts
            return 0.0 * (masks.sum() + classes.sum())
        truth = (labels == present[:, None, None]).float()  # (P, S, S)
        weights = _pixel_weights(truth, counted, self.boundary_weight)
        with torch.no_grad():
            own = zip(truth, [None] * len(truth) if weights is None else weights, strict=True)
            fits = [_mask_loss(masks, mask.expand_as(masks), None, weight) for mask, weight in own]
            cost = self.lambda_seg * torch.stack(fits)
            cost = cost - self.lambda_cls * classes.softmax(-1)[:, present].T  # (P, Q)
            # The assignment raises on values that are not finite. The training loop must get them
            # in the loss, because it reports them.
            cost = cost.nan_to_num(posinf=0.0, neginf=0.0)
            pairs = linear_sum_assignment(cost.cpu().numpy())
        which, token = (torch.as_tensor(side, device=masks.device) for side in pairs)
        wanted = torch.full((len(classes),), classes.shape[-1] - 1, device=masks.device)
        wanted[token] = present[which]
        weight = torch.ones(classes.shape[-1], device=masks.device)
        weight[-1] = NO_OBJECT_WEIGHT
        if of_class is not None:
            weight[:-1] = of_class
            of_class = of_class[present[which]]
        weights = None if weights is None else weights[which]
        counted = None if counted is None else counted.expand_as(truth)
        values = _mask_loss(masks[token], truth[which], counted, weights, self.terms)
        entropy = F.cross_entropy(classes, wanted, weight)
        return self.lambda_seg * _class_mean(values, of_class) + self.lambda_cls * entropy


def _class_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted mean of (..., K) values over the classes."""
    if weights is None:
        return values.mean(-1)
    return (values * weights).sum(-1) / weights.sum().clamp(min=EPSILON)


# ---- Masks ---------------------------------------------------------------------------------------


def object_loss(logits: Tensor, masks: Tensor, counted: Tensor) -> Tensor:
    """SAM's loss of masks (Kirillov et al., 2023, A): focal loss times 20, plus Dice.

    Logits, masks in [0, 1] and ``counted``, 1 where a pixel counts, else 0, are (N, h, w), the
    result (N,) float32.
    """
    logits = logits.float()
    probability = logits.sigmoid()
    wrong = probability + masks - 2 * masks * probability  # the probability of the other label
    bce = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    focal = (0.75 - 0.5 * masks) * wrong.square() * bce
    return FOCAL_WEIGHT * _mean(focal, counted) + _dice(probability, masks, counted)


def _pixel_weights(mask: Tensor, counted: Tensor | None, boundary_weight: float) -> Tensor | None:
    """What each pixel of a (N, S, S) mask weighs in BCE and Dice; None if all weigh alike.

    ``counted`` is 1 where a pixel counts, of a shape that broadcasts to the mask's; None if all do.
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


def _mask_loss(
    logits: Tensor,
    mask: Tensor,
    counted: Tensor | None,
    weights: Tensor | None,
    terms: Mapping[str, float] = PAPER_TERMS,
) -> Tensor:
    """The weighted sum of the terms of (N, S, S) logits, as ``TERMS``."""
    values = [w * TERMS[name](logits, mask, counted, weights) for name, w in terms.items()]
    return torch.stack(values).sum(0)


def _bce(logits: Tensor, mask: Tensor, _: Tensor | None, weights: Tensor | None) -> Tensor:
    """Eq. 9, one value a map."""
    return _mean(F.binary_cross_entropy_with_logits(logits, mask, reduction="none"), weights)


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


def _structure(logits: Tensor, mask: Tensor, counted: Tensor | None, _: Tensor | None) -> Tensor:
    """F3Net's loss: BCE and IoU, both weighted by the boundary, one value a map."""
    weights = _pixel_weights(mask, counted, STRUCTURE_WEIGHT)
    assert weights is not None
    probability = logits.sigmoid()
    common = (weights * probability * mask).sum((-2, -1))
    either = (weights * (probability + mask)).sum((-2, -1)) - common
    return _bce(logits, mask, None, weights) + 1 - (common + 1) / (either + 1)


def _cldice(logits: Tensor, mask: Tensor, counted: Tensor | None, _: Tensor | None) -> Tensor:
    """1 - soft clDice (Shit et al., CVPR 2021), one value a map: how much of the skeleton of each
    lies in the other."""
    probability = logits.sigmoid()
    if counted is not None:
        probability, mask = probability * counted, mask * counted
    scores = []
    for own, other in ((probability, mask), (mask, probability)):
        skeleton = _skeleton(own)
        area = skeleton.sum((-2, -1)) + 1
        scores.append(((skeleton * other).sum((-2, -1)) + 1) / area)
    precision, sensitivity = scores
    return 1 - 2 * precision * sensitivity / (precision + sensitivity)


def _skeleton(maps: Tensor) -> Tensor:
    """The soft skeleton of (N, S, S) maps in [0, 1]: what the openings of their erosions lose."""
    maps = maps[:, None]
    skeleton = torch.zeros_like(maps)
    for _ in range(SKELETON_STEPS):
        eroded = -torch.maximum(
            F.max_pool2d(-maps, (3, 1), 1, (1, 0)), F.max_pool2d(-maps, (1, 3), 1, (0, 1))
        )
        lost = F.relu(maps - F.max_pool2d(eroded, 3, 1, 1))
        skeleton = skeleton + F.relu(lost - skeleton * lost)
        maps = eroded
    return skeleton[:, 0]


def _by_library(name: str, exponent: float = 1.0, **options: float) -> Callable[..., Tensor]:
    """A loss of segmentation_models_pytorch as a term, one value a map."""

    def term(logits: Tensor, mask: Tensor, counted: Tensor | None, _: Tensor | None) -> Tensor:
        from segmentation_models_pytorch import losses  # not for the help

        own: Any = getattr(losses, name)("binary", ignore_index=SKIPPED, **options)
        target = mask if counted is None else mask.where(counted > 0, SKIPPED)
        values = [  # map by map, because the library pools the maps of a batch
            own(maps, truth) if (truth != SKIPPED).any() else 0.0 * maps.sum()
            for maps, truth in zip(logits[:, None, None], target[:, None, None], strict=True)
        ]
        # Below an exponent of 1 the slope at a loss of 0, as of an empty map, is infinite.
        stacked = torch.stack(values)
        return stacked if exponent == 1 else stacked.clamp(min=EPSILON) ** exponent

    return term


TERMS: dict[str, Callable[..., Tensor]] = {
    "bce": _bce,
    "dice": lambda logits, mask, _, weights: _dice(logits.sigmoid(), mask, weights),
    "focal": _by_library("FocalLoss", alpha=0.25, gamma=2.0),
    "tversky": _by_library("TverskyLoss", alpha=0.3, beta=0.7, smooth=1.0),
    "focal_tversky": _by_library("TverskyLoss", 0.75, alpha=0.3, beta=0.7, smooth=1.0),
    "lovasz": _by_library("LovaszLoss"),
    "structure": _structure,
    "cldice": _cldice,
}
"""Losses of (N, S, S) logits, masks of 0 and 1, 1 where a pixel counts or None, and the weights of
pixels or None. They return (N,)."""
WEIGHED = ("bce", "dice")
"""The terms that use the weights of pixels."""


def parse_terms(text: str) -> dict[str, float]:
    """Reads the weights of terms, such as "dice=1,focal=20"; a name alone weighs 1.

    Raises:
        UserError: a term is unknown or given twice, or a weight is no number above 0.
    """
    terms: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = (word.strip() for word in part.partition("="))
        if name not in TERMS or name in terms:
            what = "is given twice" if name in terms else f"is none of {', '.join(TERMS)}"
            raise UserError(f"loss: {name!r} {what}; write NAME=WEIGHT,NAME=WEIGHT")
        try:
            terms[name] = float(weight or 1)
        except ValueError:
            terms[name] = 0.0
        if not 0 < terms[name] < math.inf:
            raise UserError(f"loss: the weight of {name} must be a number above 0, got {weight!r}")
    return terms
