"""The metrics by hand and against counts in NumPy, and what they say about absent classes."""

import numpy as np
import pytest
import torch

from naslora.metrics import image_scores, summarise

# Scores are ratios of whole numbers in float32.
TOLERANCE = 1e-6


def score(prediction, target, num_classes):
    return image_scores(torch.tensor(prediction), torch.tensor(target), num_classes)


def test_binary_by_hand():
    scores = score([[[1, 1, 0, 0]]], [[[1, 0, 1, 0]]], num_classes=1)
    assert {name: value.tolist() for name, value in scores.items()} == {
        "dice": [[pytest.approx(0.5)]],  # 2 * 1 / (2 + 2)
        "iou": [[pytest.approx(1 / 3)]],
        "accuracy": [pytest.approx(0.5)],
    }


def test_several_classes_by_hand():
    scores = score([[[0, 1, 1, 2]]], [[[0, 1, 2, 2]]], num_classes=3)
    assert scores["dice"].tolist() == [[pytest.approx(2 / 3), pytest.approx(2 / 3)]]
    assert scores["iou"].tolist() == [[pytest.approx(1 / 2), pytest.approx(1 / 2)]]
    assert scores["accuracy"].tolist() == [pytest.approx(3 / 4)]


@pytest.mark.parametrize(
    "prediction, target, expected",
    [(0, 0, float("nan")), (1, 0, 0.0), (0, 1, 0.0), (1, 1, 1.0)],
)
def test_binary_full_and_empty(prediction, target, expected):
    shape = (1, 4, 4)
    scores = image_scores(torch.full(shape, prediction), torch.full(shape, target), 1)
    for name in ("dice", "iou"):
        assert scores[name].tolist() == [[pytest.approx(expected, nan_ok=True)]]


def test_a_class_absent_from_both_has_no_score():
    # Class 1 is right, 2 is missed, 3 is made up, 4 is nowhere.
    scores = score([[[1, 1, 3, 0]]], [[[1, 1, 2, 0]]], num_classes=5)
    for name in ("dice", "iou"):
        values = scores[name][0].tolist()
        assert values[:3] == [1.0, 0.0, 0.0] and np.isnan(values[3])


@pytest.mark.parametrize("num_classes", [1, 2, 3, 7])
def test_agrees_with_counts(num_classes):
    rng = np.random.default_rng(num_classes)
    labels = max(num_classes, 2)
    prediction, target = rng.integers(0, labels, (2, 5, 6, 6))
    target[0] = 0
    scores = score(prediction, target, num_classes)
    assert scores["dice"].shape == scores["iou"].shape == (5, labels - 1)
    for image in range(5):
        for k in range(1, labels):
            p, t = prediction[image] == k, target[image] == k
            dice, iou = 2 * (p & t).sum() / (p.sum() + t.sum()), (p & t).sum() / (p | t).sum()
            assert float(scores["dice"][image, k - 1]) == pytest.approx(dice, abs=TOLERANCE)
            assert float(scores["iou"][image, k - 1]) == pytest.approx(iou, abs=TOLERANCE)
        accuracy = (prediction[image] == target[image]).mean()
        assert float(scores["accuracy"][image]) == pytest.approx(accuracy, abs=TOLERANCE)


def test_summarise_leaves_out_what_has_no_score():
    nan = float("nan")
    scores = {
        "dice": torch.tensor([[0.5, nan, nan], [1.0, 0.25, nan]]),
        "iou": torch.tensor([[0.25, nan, nan], [1.0, 0.5, nan]]),
        "accuracy": torch.tensor([0.5, 1.0]),
    }
    assert summarise(scores, ["a", "b", "c"]) == {
        "dice": 0.5,  # of 0.75 and 0.25: over images first, then over classes
        "iou": pytest.approx((0.625 + 0.5) / 2),
        "accuracy": 0.75,
        "per_class": {
            "a": {"dice": 0.75, "iou": 0.625},
            "b": {"dice": 0.25, "iou": 0.5},
            "c": {"dice": None, "iou": None},
        },
    }


def test_summarise_without_any_class():
    scores = {
        "dice": torch.full((2, 1), torch.nan),
        "iou": torch.full((2, 1), torch.nan),
        "accuracy": torch.ones(2),
    }
    summary = summarise(scores, ["a"])
    assert (summary["dice"], summary["iou"], summary["accuracy"]) == (None, None, 1.0)
