"""The losses against NumPy in float64, also for empty maps and saturated logits."""

import itertools

import numpy as np
import pytest
import torch

from naslora.sam.losses import segmentation_loss
from naslora.sam.segmentation import SegmentationOutput

# Sums over a map in float32 against float64: 256 terms, each with a relative rounding of 6e-8.
TOLERANCE = 1e-5
SIZE, CLASSES, TOKENS = 16, 3, 4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def boundary(mask, weight):
    """1 + weight |mean - mask|; the mean is over the pixels around, at most 31 x 31."""
    if not weight:
        return np.ones_like(mask)
    rows, columns = mask.shape
    near = [
        [mask[max(y - 15, 0) : y + 16, max(x - 15, 0) : x + 16].mean() for x in range(columns)]
        for y in range(rows)
    ]
    return 1 + weight * np.abs(np.array(near) - mask)


def bce(logits, mask, weight=0):
    p, w = sigmoid(logits), boundary(mask, weight)
    return -(w * (mask * np.log(p) + (1 - mask) * np.log(1 - p))).sum() / w.sum()


def dice(p, mask, weight=0):
    w = boundary(mask, weight)
    return 1 - (2 * (w * p * mask).sum() + 1) / ((w * p).sum() + (w * mask).sum() + 1)


def binary(logits, target, **weights):
    masks = torch.as_tensor(np.asarray(logits), dtype=torch.float32)[:, None]
    labels = torch.as_tensor(np.asarray(target))
    return segmentation_loss(SegmentationOutput(masks, None), labels, **weights)


@pytest.fixture
def drawn():
    """Random mask logits (2, Q, S, S), class logits (2, Q, K + 1) and labels (2, S, S)."""
    rng = np.random.default_rng(0)
    masks = 3 * rng.standard_normal((2, TOKENS, SIZE, SIZE))
    classes = 2 * rng.standard_normal((2, TOKENS, CLASSES + 1))
    return masks, classes, rng.integers(0, CLASSES, (2, SIZE, SIZE))


def as_output(masks, classes, dtype=torch.float32):
    tensors = (
        None if values is None else torch.tensor(values, dtype=dtype, requires_grad=True)
        for values in (masks, classes)
    )
    return SegmentationOutput(*tensors)


def of_kind(class_loss, masks, classes, labels):
    """What was drawn for a loss, and the argument that asks for it."""
    if class_loss == "binary":
        return masks[:, :1], None, (labels > 0).astype(labels.dtype), "pixel"
    return masks, classes, labels, class_loss


@pytest.mark.parametrize("weight, size", [(0.0, 8), (5.0, 8), (5.0, 40)])
def test_binary_is_the_mean_of_bce_plus_dice(weight, size):
    rng = np.random.default_rng(1)
    logits, target = rng.standard_normal((3, size, size)), rng.integers(0, 2, (3, size, size))
    target[0, :, size // 2 :] = 0
    images = zip(logits, target, strict=True)
    expected = np.mean([bce(x, y, weight) + dice(sigmoid(x), y, weight) for x, y in images])
    loss = binary(logits, target, lambda_seg=0.5, lambda_cls=7.0, boundary_weight=weight)
    assert float(loss) == pytest.approx(0.5 * expected, rel=TOLERANCE)


@pytest.mark.parametrize(
    "logit, label, expected",
    [
        (40.0, 1, 0.0),  # all right: BCE 0, Dice 1 - (2 n + 1) / (2 n + 1)
        (-40.0, 0, 0.0),  # all right and empty: Dice 1 - 1 / 1
        (40.0, 0, 40 + 1 - 1 / 65),  # all n = 64 pixels wrong: BCE is the logit
        (-40.0, 1, 40 + 1 - 1 / 65),
        (0.0, 1, np.log(2) + 1 - 65 / 97),  # undecided: overlap 2 * 32 + 1 over 32 + 64 + 1
    ],
)
def test_binary_by_hand(logit, label, expected):
    loss = binary(np.full((1, 8, 8), logit), np.full((1, 8, 8), label))
    assert float(loss) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_pixel_loss(drawn, weight):
    masks, classes, labels = drawn
    scores = np.einsum("bqk,bqhw->bkhw", softmax(classes)[..., :-1], sigmoid(masks))
    p = scores / scores.sum(1, keepdims=True)
    y = np.stack([labels == k for k in range(CLASSES)], 1).astype(float)
    cross_entropy = -np.log((p * y).sum(1)).mean()
    maps = [(p[b, k], y[b, k]) for b in range(2) for k in range(CLASSES)]
    logits = np.log(p / (1 - p))
    entropies = np.mean(
        [bce(logits[b, k], y[b, k], weight) for b in range(2) for k in range(CLASSES)]
    )
    dices = np.mean([dice(*own, weight) for own in maps])
    output, labels = as_output(masks, classes), torch.tensor(labels)
    loss = segmentation_loss(output, labels, "pixel", 0.5, 2.0, boundary_weight=weight)
    # The tolerance: the loss adds 1e-6 to the scores before it normalises them.
    assert loss.item() == pytest.approx(0.5 * (entropies + dices) + 2 * cross_entropy, rel=1e-4)


def matching_by_brute_force(masks, classes, labels, lambda_seg, lambda_cls, weight=0):
    """Computes the loss of one image by trying every assignment of tokens to its classes."""
    present = np.unique(labels)
    truth = [(labels == k).astype(float) for k in present]
    fit = [[bce(m, y, weight) + dice(sigmoid(m), y, weight) for m in masks] for y in truth]
    fit = np.array(fit)
    probability = softmax(classes)

    price = lambda_seg * fit - lambda_cls * probability[:, present].T

    def cost(tokens):
        return sum(price[i, q] for i, q in enumerate(tokens))

    tokens = min(itertools.permutations(range(len(masks)), len(present)), key=cost)
    wanted = np.full(len(masks), CLASSES)
    wanted[list(tokens)] = present
    weight = np.where(wanted == CLASSES, 0.1, 1.0)
    nll = -np.log(probability[np.arange(len(masks)), wanted])
    segmentation = np.mean([fit[i, q] for i, q in enumerate(tokens)])
    return lambda_seg * segmentation + lambda_cls * (weight * nll).sum() / weight.sum()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0, 5.0), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("absent", [None, 0, 2])
def test_matching_finds_the_best_assignment(drawn, weights, absent):
    masks, classes, labels = drawn
    if absent is not None:
        labels[labels == absent] = 1
    images = zip(masks, classes, labels, strict=True)
    expected = np.mean([matching_by_brute_force(*image, *weights) for image in images])
    output, labels = as_output(masks, classes), torch.tensor(labels)
    loss = segmentation_loss(output, labels, "matching", *weights[:2], None, *weights[2:])
    assert loss.item() == pytest.approx(expected, rel=TOLERANCE)
    assert segmentation_loss(output, labels) == segmentation_loss(output, labels, "matching")


@pytest.mark.parametrize("class_loss", ["binary", "pixel", "matching"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("one_class", [False, True])
def test_gradients_are_finite(drawn, class_loss, dtype, scale, one_class):
    masks, classes, labels, kind = of_kind(class_loss, *drawn)
    output = as_output(scale * masks, None if classes is None else scale * classes, dtype)
    labels = torch.tensor(labels) * (0 if one_class else 1)
    loss = segmentation_loss(output, labels, kind)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    for tensor in (output.masks, output.classes):
        assert tensor is None or tensor.grad.isfinite().all()
    nan = as_output(np.full_like(masks, np.nan), classes)
    assert segmentation_loss(nan, labels, kind).isnan()


@pytest.mark.parametrize("class_loss", ["binary", "pixel", "matching"])
@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_ignored_pixels_do_not_count(drawn, class_loss, weight):
    """The loss of maps whose right half is ignored is that of their left half."""
    masks, classes, target, kind = of_kind(class_loss, *drawn)
    half = masks.shape[-1] // 2
    left, labels = as_output(masks[..., :half], classes), torch.tensor(target[..., :half])
    expected = segmentation_loss(left, labels, kind, boundary_weight=weight)
    ignored = target.copy()
    ignored[..., half:] = 77
    settings = {"ignore_index": 77, "boundary_weight": weight}
    labels, nothing = torch.tensor(ignored), torch.full(target.shape, 77)
    whole = segmentation_loss(as_output(masks, classes), labels, kind, **settings)
    torch.testing.assert_close(whole, expected)
    assert segmentation_loss(as_output(masks, classes), nothing, kind, **settings).isfinite()
