"""The losses against NumPy in float64, also for empty maps and saturated logits."""

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.special import expit as sigmoid
from scipy.special import softmax

from naslora.sam.losses import TERMS, SegmentationLoss, parse_terms
from naslora.sam.segmentation import SegmentationOutput

# Sums over a map in float32 against float64: 256 terms, each with a relative rounding of 6e-8.
TOLERANCE = 1e-5
SIZE, CLASSES, TOKENS = 16, 3, 4


def boundary(mask, weight):
    """1 + weight |mean - mask|; the mean is over the pixels around, at most 31 x 31."""
    mask = mask.astype(float)
    near, count = (
        ndimage.uniform_filter(one, 31, mode="constant") for one in (mask, np.ones_like(mask))
    )
    return 1 + weight * np.abs(near / count - mask)


def bce(logits, mask, weight=0):
    p, w = sigmoid(logits), boundary(mask, weight)
    return -(w * (mask * np.log(p) + (1 - mask) * np.log(1 - p))).sum() / w.sum()


def dice(p, mask, weight=0):
    w = boundary(mask, weight)
    return 1 - (2 * (w * p * mask).sum() + 1) / ((w * p).sum() + (w * mask).sum() + 1)


def focal(x, y):
    right = np.where(y > 0, sigmoid(x), 1 - sigmoid(x))
    return (np.where(y > 0, 0.25, 0.75) * (1 - right) ** 2 * -np.log(right)).mean()


def tversky(x, y):
    p = sigmoid(x)
    common, extra, missed = (p * y).sum(), (p * (1 - y)).sum(), ((1 - p) * y).sum()
    return 1 - (common + 1) / (common + 0.3 * extra + 0.7 * missed + 1)


def lovasz(x, y):
    """The Lovász extension of the Jaccard loss of the pixels that are wrong, at hinge losses."""
    errors = 1 - x * (2 * y - 1)
    value, wrong, before = 0.0, np.zeros_like(y), 0.0
    for place in np.argsort(-errors, axis=None):
        wrong.flat[place] = 1
        jaccard = wrong.sum() / np.maximum(wrong, y).sum()
        value += max(errors.flat[place], 0) * (jaccard - before)
        before = jaccard
    return value


def structure(x, y):
    w, p = boundary(y, 5), sigmoid(x)
    common = (w * p * y).sum()
    return bce(x, y, 5) + 1 - (common + 1) / ((w * (p + y)).sum() - common + 1)


def cldice(x, y):
    def skeleton(image):
        found = np.zeros_like(image)
        for _ in range(10):
            cross = ndimage.generate_binary_structure(2, 1)
            eroded = ndimage.minimum_filter(image, footprint=cross, mode="nearest")
            lost = np.maximum(image - ndimage.maximum_filter(eroded, 3, mode="nearest"), 0)
            found, image = found + np.maximum(lost - found * lost, 0), eroded
        return found

    p = sigmoid(x)
    own, true = skeleton(p), skeleton(y)
    precision, sensitivity = (((a * b).sum() + 1) / (a.sum() + 1) for a, b in ((own, y), (true, p)))
    return 1 - 2 * precision * sensitivity / (precision + sensitivity)


REFERENCES = {
    "bce": bce,
    "dice": lambda x, y: dice(sigmoid(x), y),
    "focal": focal,
    "tversky": tversky,
    "focal_tversky": lambda x, y: tversky(x, y) ** 0.75,
    "lovasz": lovasz,
    "structure": structure,
    "cldice": cldice,
}


def binary(logits, target, **weights):
    masks = torch.as_tensor(np.asarray(logits), dtype=torch.float32)[:, None]
    labels = torch.as_tensor(np.asarray(target))
    return SegmentationLoss(**weights)(SegmentationOutput(masks, None), labels)


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


@pytest.mark.parametrize("name", TERMS)
def test_terms(name):
    """Each term against its definition: a line, a square, noise, ignored pixels."""
    rng = np.random.default_rng(2)
    target = rng.integers(0, 2, (3, 20, 20))
    target[:2] = 0
    target[0, 9:11, 3:18] = target[1, 4:12, 5:13] = 1
    logits = 2 * rng.standard_normal((3, 20, 20)) + 2 * target
    expected = np.mean([REFERENCES[name](x, y) for x, y in zip(logits, 1.0 * target, strict=True)])
    loss = binary(logits, target, terms={name: 3.0, "bce": 1.0} if name != "bce" else {"bce": 4.0})
    rest = np.mean([bce(x, y) for x, y in zip(logits, target, strict=True)])
    assert float(loss) == pytest.approx(3 * expected + rest, rel=TOLERANCE)
    # All pixels of the second image are ignored, and the first has no foreground.
    target[0], target[1] = 0, 77
    output = SegmentationOutput(torch.tensor(logits[:, None], requires_grad=True), None)
    loss = SegmentationLoss(ignore_index=77, terms={name: 1.0})(output, torch.tensor(target))
    loss.backward()
    assert loss.isfinite() and output.masks.grad.isfinite().all()
    assert name == "cldice" or not output.masks.grad[1].any()


def test_parse_terms():
    """tests/reliability/bad_inputs.yaml has the terms that are refused."""
    assert parse_terms("bce,dice") == {"bce": 1, "dice": 1}
    assert parse_terms("dice = 0.5, cldice=2") == {"dice": 0.5, "cldice": 2}


@pytest.mark.parametrize("class_loss", ["binary", "pixel", "matching"])
def test_class_weights(drawn, class_loss):
    """Equal weights change nothing, and a class that weighs nothing has no part."""
    masks, classes, target, kind = of_kind(class_loss, *drawn)
    count = 2 if classes is None else CLASSES

    def loss(labels, weights=None, **changed):
        output = as_output(masks, classes)
        own = SegmentationLoss(kind, class_weights=weights, **changed)
        return own(output, torch.tensor(labels))

    torch.testing.assert_close(loss(target, [1.0] * count), loss(target))
    if class_loss == "binary":
        x, y = masks[:, 0], 1.0 * target
        w = np.where(y > 0, 3.0, 0.5)
        values = -(w * np.log(np.where(y > 0, sigmoid(x), 1 - sigmoid(x)))).sum((1, 2))
        values = np.mean(values / w.sum((1, 2)))
        assert loss(target, [0.5, 3], terms={"bce": 1.0}).item() == pytest.approx(values, rel=1e-5)
    if class_loss == "pixel":  # the mean over the classes of one term, and the cross-entropy
        one = [loss(target, np.eye(count)[k], lambda_cls=0.0).item() for k in range(count)]
        mixed = loss(target, [1.0, 2.0, 5.0], lambda_cls=0.0).item()
        assert mixed == pytest.approx(np.dot([1, 2, 5], one) / 8, rel=TOLERANCE)
        # The cross-entropy of class 2 alone is that of its pixels.
        others = np.where(target == 2, 2, 77)
        alone = loss(target, [0.0, 0.0, 1.0], lambda_seg=0.0).item()
        of_others = loss(others, lambda_seg=0.0, ignore_index=77).item()
        assert alone == pytest.approx(of_others, rel=TOLERANCE)


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_pixel_loss(drawn, weight):
    masks, classes, labels = drawn
    scores = np.einsum("bqk,bqhw->bkhw", softmax(classes, -1)[..., :-1], sigmoid(masks))
    p = scores / scores.sum(1, keepdims=True)
    y = np.stack([labels == k for k in range(CLASSES)], 1).astype(float)
    cross_entropy = -np.log((p * y).sum(1)).mean()
    maps = [(p[b, k], y[b, k]) for b in range(2) for k in range(CLASSES)]
    entropies = np.mean([bce(np.log(own / (1 - own)), true, weight) for own, true in maps])
    dices = np.mean([dice(*own, weight) for own in maps])
    output, labels = as_output(masks, classes), torch.tensor(labels)
    loss = SegmentationLoss("pixel", 0.5, 2.0, boundary_weight=weight)(output, labels)
    # The tolerance: the loss adds 1e-6 to the scores before it normalises them.
    assert loss.item() == pytest.approx(0.5 * (entropies + dices) + 2 * cross_entropy, rel=1e-4)


def matching_by_brute_force(
    masks, classes, labels, lambda_seg, lambda_cls, weight=0, of_class=(1, 1, 1)
):
    """Computes the loss of one image by trying every assignment of tokens to its classes."""
    present = np.unique(labels)
    truth = [(labels == k).astype(float) for k in present]
    fit = [[bce(m, y, weight) + dice(sigmoid(m), y, weight) for m in masks] for y in truth]
    fit = np.array(fit)
    probability = softmax(classes, -1)
    price = lambda_seg * fit - lambda_cls * probability[:, present].T

    def cost(tokens):
        return sum(price[i, q] for i, q in enumerate(tokens))

    tokens = min(itertools.permutations(range(len(masks)), len(present)), key=cost)
    wanted = np.full(len(masks), CLASSES)
    wanted[list(tokens)] = present
    weight = np.append(of_class, 0.1)[wanted]
    nll = -np.log(probability[np.arange(len(masks)), wanted])
    own = [fit[i, q] for i, q in enumerate(tokens)]
    segmentation = np.average(own, weights=np.array(of_class)[present])
    return lambda_seg * segmentation + lambda_cls * (weight * nll).sum() / weight.sum()


@pytest.mark.parametrize(
    "weights", [(1.0, 1.0), (0.5, 2.0, 5.0, (1, 2, 5)), (1.0, 0.0), (0.0, 1.0)]
)
@pytest.mark.parametrize("absent", [None, 0, 2])
def test_matching_finds_the_best_assignment(drawn, weights, absent):
    masks, classes, labels = drawn
    if absent is not None:
        labels[labels == absent] = 1
    images = zip(masks, classes, labels, strict=True)
    expected = np.mean([matching_by_brute_force(*image, *weights) for image in images])
    output, labels = as_output(masks, classes), torch.tensor(labels)
    more = dict(zip(("boundary_weight", "class_weights"), weights[2:], strict=False))
    loss = SegmentationLoss("matching", *weights[:2], **more)(output, labels)
    assert loss.item() == pytest.approx(expected, rel=TOLERANCE)
    assert SegmentationLoss()(output, labels) == SegmentationLoss("matching")(output, labels)


@pytest.mark.parametrize("class_loss", ["binary", "pixel", "matching"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("one_class", [False, True])
def test_gradients_are_finite(drawn, class_loss, dtype, scale, one_class):
    masks, classes, labels, kind = of_kind(class_loss, *drawn)
    output = as_output(scale * masks, None if classes is None else scale * classes, dtype)
    labels = torch.tensor(labels) * (0 if one_class else 1)
    loss = SegmentationLoss(kind)(output, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    for tensor in (output.masks, output.classes):
        assert tensor is None or tensor.grad.isfinite().all()
    nan = as_output(np.full_like(masks, np.nan), classes)
    assert SegmentationLoss(kind)(nan, labels).isnan()


@pytest.mark.parametrize("class_loss", ["binary", "pixel", "matching"])
@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_ignored_pixels_do_not_count(drawn, class_loss, weight):
    """The loss of maps whose right half is ignored is that of their left half."""
    masks, classes, target, kind = of_kind(class_loss, *drawn)
    half = masks.shape[-1] // 2
    left, labels = as_output(masks[..., :half], classes), torch.tensor(target[..., :half])
    expected = SegmentationLoss(kind, boundary_weight=weight)(left, labels)
    ignored = target.copy()
    ignored[..., half:] = 77
    loss = SegmentationLoss(kind, ignore_index=77, boundary_weight=weight)
    labels, nothing = torch.tensor(ignored), torch.full(target.shape, 77)
    whole = loss(as_output(masks, classes), labels)
    torch.testing.assert_close(whole, expected)
    assert loss(as_output(masks, classes), nothing).isfinite()
