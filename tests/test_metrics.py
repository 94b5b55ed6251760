"""The metrics against values computed by hand and counts in NumPy."""

import math

import numpy as np
import pytest
import torch

from naslora.errors import UserError
from naslora.metrics import (
    METRICS,
    check_metrics,
    further_scores,
    image_scores,
    saliency_scores,
    shape_scores,
    summarise,
)
from naslora.results import ClassScores, SplitScores

NAN = float("nan")
# The scores are ratios of integers, rounded to float32.
TOLERANCE = 1e-6


def score(prediction, target, num_classes):
    return image_scores(torch.tensor(prediction), torch.tensor(target), num_classes)


BY_HAND = [  # prediction, target, classes, Dice, IoU, accuracy
    ([1, 1, 0, 0], [1, 0, 1, 0], 1, [1 / 2], [1 / 3], 1 / 2),  # Dice is 2 * 1 / (2 + 2)
    ([0, 1, 1, 2], [0, 1, 2, 2], 3, [2 / 3, 2 / 3], [1 / 2, 1 / 2], 3 / 4),
    ([0, 0], [0, 0], 1, [NAN], [NAN], 1),
    ([1, 1], [0, 0], 1, [0], [0], 0),
    ([0, 0], [1, 1], 1, [0], [0], 0),
    ([1, 1], [1, 1], 1, [1], [1], 1),
    # Class 1 is right, 2 is missed, 3 is predicted wrongly, 4 is absent.
    ([1, 1, 3, 0], [1, 1, 2, 0], 5, [1, 0, 0, NAN], [1, 0, 0, NAN], 3 / 4),
]


@pytest.mark.parametrize("prediction, target, num_classes, dice, iou, accuracy", BY_HAND)
def test_by_hand(prediction, target, num_classes, dice, iou, accuracy):
    scores = score([[prediction]], [[target]], num_classes)
    for name, expected in {"dice": dice, "iou": iou}.items():
        assert scores[name][0].tolist() == pytest.approx(expected, nan_ok=True)
    assert scores["accuracy"].tolist() == pytest.approx([accuracy])
    counts = np.zeros((max(num_classes, 2),) * 2, int)
    np.add.at(counts, (target, prediction), 1)
    assert scores["confusion"][0].tolist() == counts.tolist()


def test_summarise_ignores_undefined_scores():
    scores = {
        "dice": torch.tensor([[0.5, NAN, NAN], [1.0, 0.25, NAN]]),
        "iou": torch.tensor([[0.25, NAN, NAN], [1.0, 0.5, NAN]]),
        "accuracy": torch.tensor([0.5, 1.0]),
    }
    assert summarise(scores, ["a", "b", "c"]) == SplitScores(
        dice=0.5,  # mean of 0.75 and 0.25: first over images, then over classes
        iou=pytest.approx((0.625 + 0.5) / 2),
        accuracy=0.75,
        per_class={
            "a": ClassScores(0.75, 0.625),
            "b": ClassScores(0.25, 0.5),
            "c": ClassScores(None, None),
        },
    )


# --- metrics of data sets


def metrics_of(names, prediction, target, num_classes=1):
    scores = score(prediction, target, num_classes)
    classes = [f"class {k}" for k in range(1, max(num_classes, 2))]
    return summarise(scores, classes, names).metrics


def test_thresholded_jaccard_counts_a_failure_as_zero():
    # IoU of the images: 1/1, 2/3 = 0.67 (kept), 3/5 = 0.6 (a failure)
    prediction = [[[1, 0, 0, 0, 0]], [[1, 1, 0, 0, 0]], [[1, 1, 1, 0, 0]]]
    target = [[[1, 0, 0, 0, 0]], [[1, 1, 1, 0, 0]], [[1, 1, 1, 1, 1]]]
    values = metrics_of(["iou", "t_iou"], prediction, target)
    assert values["iou"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert values["t_iou"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_balanced_error_rate_both_ways():
    # First image: TPR 1/1, TNR 2/3; second: TPR 1/3, TNR 1/1. All pixels: TPR 2/4, TNR 3/4.
    prediction, target = [[[1, 1, 0, 0]], [[1, 0, 0, 0]]], [[[1, 0, 0, 0]], [[1, 1, 1, 0]]]
    values = metrics_of(["ber", "ber_pooled"], prediction, target)
    first, second = 1 - (1 + 2 / 3) / 2, 1 - (1 / 3 + 1) / 2
    assert values["ber"] == pytest.approx(100 * (first + second) / 2)
    assert values["ber_pooled"] == pytest.approx(100 * (1 - (2 / 4 + 3 / 4) / 2))
    # An image of one class has no rate.
    for prediction, target, rate in (([1, 0], [1, 0], 0.0), ([0, 1], [0, 0], None)):
        found = metrics_of(["ber", "ber_pooled"], [[prediction]], [[target]])
        assert found == {"ber": rate, "ber_pooled": rate}


def test_trans10k_by_hand():
    # Counts over both images, rows truth: 0: [4, 0, 0]; 1: [2, 3, 0]; 2: [0, 1, 2]
    names = ["pixel_accuracy", "miou", "foreground_accuracy", "foreground_miou", "index_mae"]
    prediction = [[[0, 1, 1, 2, 2, 0]], [[1, 1, 0, 0, 0, 0]]]
    target = [[[0, 1, 2, 2, 2, 1]], [[1, 1, 1, 0, 0, 0]]]
    values = metrics_of([*names, "class_iou", "mber"], prediction, target, num_classes=3)
    iou = [4 / 6, 3 / 6, 2 / 3]
    assert values["pixel_accuracy"] == pytest.approx(9 / 12)
    assert values["foreground_accuracy"] == pytest.approx(5 / 8)
    assert values["miou"] == pytest.approx(sum(iou) / 3)
    assert values["foreground_miou"] == pytest.approx(sum(iou[1:]) / 2)
    assert list(values["class_iou"].values()) == pytest.approx(iou)
    assert list(values["class_iou"]) == ["background", "class 1", "class 2"]
    # First image: |1-2| + |0-1| over 6 pixels; second: |0-1| over 6
    assert values["index_mae"] == pytest.approx((2 / 6 + 1 / 6) / 2)
    # Class 1: first image TP 1 of 2, others right 3 of 4; second TP 2 of 3, others 3 of 3.
    # Class 2: in the first image only, TP 2 of 3, others right 2 of 3.
    one = ((1 - (1 / 2 + 3 / 4) / 2) + (1 - (2 / 3 + 3 / 3) / 2)) / 2
    two = 1 - (2 / 3 + 2 / 3) / 2
    assert values["mber"] == pytest.approx(100 * (one + two) / 2)
    values = metrics_of(["miou", "class_iou"], [[[0, 1]]], [[[0, 1]]], num_classes=4)
    assert values["miou"] == 1.0  # of the classes that are anywhere
    assert list(values["class_iou"].values()) == [1.0, 1.0, None, None]


# --- shapes and calibration


def drawn(*parts):
    """(8, 8) labels: 1 in the given rows and columns."""
    labels = torch.zeros(8, 8, dtype=torch.int64)
    for rows, columns in parts:
        labels[rows, columns] = 1
    return labels


SHAPES = {
    # Squares of 4 x 4, one pixel apart. Of the 12 pixels of each ring 6 are in the other ring, and
    # 6 are 1 away. Their union has 18.
    "squares": (
        drawn((slice(2, 6), slice(3, 7))),
        drawn((slice(2, 6), slice(2, 6))),
        {"hd95": 1, "nsd": 1, "boundary_iou": 6 / 18, "lesion_f1": 1},
    ),
    # Half of a line, and a pixel 3 below its end. Distances are 0, 0, 0, 3 and 0, 0, 0, 1, 2, 3,
    # whose 95th percentiles are 2.55 and 2.75; 8 of the 10 are at most 2. 3 of 4 and 3 of 6 pixels
    # of the skeletons are in the other mask. The pixel is a second part, which is wrong.
    "half a line": (
        drawn((3, slice(1, 4)), (6, 6)),
        drawn((3, slice(1, 7))),
        {"hd95": 2.75, "nsd": 0.8, "boundary_iou": 3 / 7, "cldice": 0.6, "lesion_f1": 2 / 3},
    ),
    "lines side by side": (
        drawn((slice(0, 8), 3)),
        drawn((slice(0, 8), 2)),
        {"hd95": 1, "nsd": 1, "boundary_iou": 0, "cldice": 0, "lesion_f1": 0},
    ),
    "missed": (
        drawn(),
        drawn((2, 2)),
        {"hd95": 128**0.5, "nsd": 0, "boundary_iou": 0, "cldice": 0, "lesion_f1": 0},
    ),
    "both empty": (
        drawn(),
        drawn(),
        dict.fromkeys(("hd95", "nsd", "boundary_iou", "cldice", "lesion_f1"), NAN),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_by_hand(name):
    prediction, target, expected = SHAPES[name]
    for k, classes in ((1, 1), (2, 3)):  # binary, and as the second class of three
        nothing = torch.zeros(classes, 0, 0)  # no class map is needed
        scores = further_scores([*expected], nothing, k * prediction, k * target, 9)
        found = {metric: float(values[k - 1]) for metric, values in scores.items()}
        assert found == pytest.approx(expected, nan_ok=True)
    # What lies in ignored pixels is in neither mask.
    wider = torch.cat([target, torch.full_like(target, 9)], 1)
    both = torch.cat([prediction, torch.ones_like(target)], 1)
    if name != "missed":  # of which the image's diagonal is a score
        scores = further_scores([*expected], torch.zeros(1, 0, 0), both, wider, 9)
        assert {m: float(v[0]) for m, v in scores.items()} == pytest.approx(expected, nan_ok=True)


VOXELS = {  # of (5, 9, 9) voxels of 2 x 1 x 0.5: by their slice, row and column
    # 3 slices of 2 and 8 rows of 1 away: 10.
    "far": ([(0, 0, 0)], [(3, 8, 0)], {"hd95": 10, "nsd": 0, "size_difference": 0}),
    # One more voxel, 4 columns of 0.5 away: distances 0, 2 and 0, of which the 95th percentiles are
    # 1.9 and 0. All are at most 2. Its size is 2 * 1 * 0.5.
    "row": ([(1, 1, 1), (1, 1, 5)], [(1, 1, 1)], {"hd95": 1.9, "nsd": 1, "size_difference": 1}),
    # One more voxel, 2 slices of 2 away: 3.8. Two of three surface voxels are at most 2 away.
    "slice": ([(0, 4, 4), (2, 4, 4)], [(0, 4, 4)], {"hd95": 3.8, "nsd": 2 / 3}),
    # The diagonal of 10 x 9 x 4.5, and two voxels.
    "missed": ([], [(1, 1, 1), (4, 8, 8)], {"hd95": 201.25**0.5, "nsd": 0, "size_difference": 2}),
    "both empty": ([], [], {"hd95": NAN, "nsd": NAN, "size_difference": NAN}),
}


@pytest.mark.parametrize("name", VOXELS)
def test_shapes_by_the_size_of_a_voxel(name):
    found, true, expected = VOXELS[name]
    prediction, truth = np.zeros((2, 5, 9, 9), np.uint8)
    for volume, places in ((prediction, found), (truth, true)):
        for place in places:
            volume[place] = 2
    scores = shape_scores([*expected, "dice"], prediction, truth, 3, (2.0, 1.0, 0.5))
    assert {name: float(own[1]) for name, own in scores.items()} == pytest.approx(
        expected, nan_ok=True
    )
    assert all(own[0].isnan() for own in scores.values())  # of a class that is nowhere


@pytest.mark.parametrize(
    "class_map, target, expected",
    [
        # Two pixels of 0.9, one of them right; single ones of 0.1 and 0.2 without foreground.
        ([[0.9, 0.9, 0.1, 0.2]], [1, 0, 0, 0], (0.4 * 2 + 0.1 + 0.2) / 4),
        ([[0.5, 0.5, 0.5, 0.5]], [1, 0, 1, 0], 0.0),
        # Divided by the sums: 0.8 for the right class, 0.6 for a wrong one; the third is ignored.
        ([[0.4, 0.1, 0.3], [0.1, 0.3, 0.0], [0.0, 0.1, 0.0]], [0, 2, 9], (0.2 + 0.6) / 2),
        ([[0.5]], [9], NAN),
    ],
)
def test_calibration_by_hand(class_map, target, expected):
    class_map, target = torch.tensor(class_map)[:, None], torch.tensor([target])
    scores = further_scores(["ece"], class_map, class_map.argmax(0), target, 9)
    found = METRICS["ece"].of({name: own[None] for name, own in scores.items()})
    assert float(found) == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_saliency_by_hand():
    # The map is stretched from 51 .. 204 of 255 to 0 .. 1: 0, 1/3, 2/3, 1. The error is then 1/3 at
    # four of eight pixels.
    probability = torch.tensor([[0.2, 0.4, 0.6, 0.8]] * 2)
    scores = saliency_scores(probability, torch.tensor([[0, 0, 1, 1]] * 2))
    assert float(scores["mae"]) == pytest.approx((0 + 1 / 3 + 1 / 3 + 0) / 4)
    target = torch.zeros(32, 32, dtype=torch.int64)
    target[8:20, 10:24] = 1
    perfect, inverted = (saliency_scores(p.float(), target) for p in (target, 1 - target))
    for name in ("s_alpha", "f_w_beta", "f_w_beta_0.3"):
        assert float(perfect[name]) == pytest.approx(1, abs=1e-6) and float(inverted[name]) < 0.1
    # The thresholded map equals the truth at 255 of the 256 thresholds. At 0 it is all foreground.
    assert 0.99 < float(perfect["e_phi"]) <= 1 and float(inverted["e_phi"]) < 0.05
    assert (float(perfect["mae"]), float(inverted["mae"])) == (0, 1)


def test_structure_by_hand():
    """Eight columns, of which the last four are foreground. The map has one more."""
    truth = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]] * 6)
    probability = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1.0]] * 6)
    # 2 mean / (mean² + 1 + deviation) of the map on the foreground, and of its complement beside:
    # a quarter of those 24 pixels is 0.
    objects = [1, 1.5 / (0.75**2 + 1 + math.sqrt(24 * 0.75 * 0.25 / 23))]
    # The centre of the foreground divides the columns 7 : 1. Left the means are 4/7 and 3/7, the
    # variances 12/49 both, the covariance 9/49. Right both are 1.
    left = 4 * 12 / 49 * 9 / 49 / (25 / 49 * 24 / 49)
    expected = (sum(objects) / 2 + (7 * left + 1) / 8) / 2
    assert float(saliency_scores(probability, truth)["s_alpha"]) == pytest.approx(expected)


def test_alignment_by_hand():
    # The thresholds 1-51, 52-153 and 154-255 find columns 2-4, 3-4 and 4; the truth is 3-4. At 0
    # all is foreground, and not aligned: (1 + 0)² / 4. The sums are divided by one pixel less.
    probability = torch.tensor([[0, 0.2, 0.6, 1]] * 2)
    scores = saliency_scores(probability, torch.tensor([[0, 0, 1, 1]] * 2))
    # 2 a b / (a² + b²) of the maps minus their means, 3/4 and 1/2: four, two and two pixels.
    aligned = [0.25 * 0.5, 0.25 * -0.5, -0.75 * -0.5], [0.3125, 0.3125, 0.8125]
    found, wrong, free = ((1 + 2 * a / b) ** 2 / 4 for a, b in zip(*aligned, strict=True))
    one_more = 4 * found + 2 * wrong + 2 * free
    expected = (8 / 4 + 51 * one_more + 102 * 8 + 102 * one_more) / 7 / 256
    assert float(scores["e_phi"]) == pytest.approx(expected)


def test_weighted_f_by_hand():
    # The foreground is found with 0.4. One pixel is wrong, ten pixels away from it: it weighs
    # 2 - 0.5 ** (10 / 5).
    truth = torch.zeros(32, 32, dtype=torch.int64)
    truth[8:20, 4:14] = 1
    probability = 0.4 * truth.float()
    probability[13, 23] = 1
    scores = saliency_scores(probability, truth)
    hits = 0.4 * 12 * 10
    precision, recall = hits / (hits + 1.75), 0.4
    for name, beta in (("f_w_beta", 1), ("f_w_beta_0.3", 0.3)):
        expected = (1 + beta) * precision * recall / (recall + beta * precision)
        assert float(scores[name]) == pytest.approx(expected)


def test_metrics_that_do_not_fit_are_refused():
    check_metrics(list(METRICS), num_classes=1)
    with pytest.raises(UserError, match="'ber' is defined for binary masks only"):
        check_metrics(["dice", "ber"], num_classes=3)


def test_ignored_pixels_do_not_count():
    """Scores of a map whose right half is ignored are those of its left half."""
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 3, (2, 6, 8), generator=generator)
    target = torch.randint(0, 3, (2, 6, 8), generator=generator)
    left = image_scores(prediction[..., :4], target[..., :4], 3)
    target[..., 4:] = 77
    whole = image_scores(prediction, target, 3, ignore_index=77)
    for name, values in left.items():
        torch.testing.assert_close(whole[name], values, msg=name)
    nothing = image_scores(prediction, torch.full_like(target, 77), 1, ignore_index=77)
    summary = summarise(nothing, ["a"])
    assert (summary.accuracy, summary.dice, summary.iou) == (None, None, None)
