"""The metrics against values computed by hand, counts in NumPy, and other libraries."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_jaccard_index

from naslora.errors import UserError
from naslora.metrics import METRICS, check_metrics, image_scores, saliency_scores, summarise

# The scores are ratios of integers, rounded to float32.
TOLERANCE = 1e-6


def score(prediction, target, num_classes):
    return image_scores(torch.tensor(prediction), torch.tensor(target), num_classes)


def test_binary_by_hand():
    scores = score([[[1, 1, 0, 0]]], [[[1, 0, 1, 0]]], num_classes=1)
    assert {name: value.tolist() for name, value in scores.items()} == {
        "dice": [[pytest.approx(0.5)]],  # 2 * 1 / (2 + 2)
        "iou": [[pytest.approx(1 / 3)]],
        "accuracy": [pytest.approx(0.5)],
        "confusion": [[[1, 1], [1, 1]]],
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
    # Class 1 is right, 2 is missed, 3 is predicted wrongly, 4 is absent.
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


def test_summarise_ignores_undefined_scores():
    nan = float("nan")
    scores = {
        "dice": torch.tensor([[0.5, nan, nan], [1.0, 0.25, nan]]),
        "iou": torch.tensor([[0.25, nan, nan], [1.0, 0.5, nan]]),
        "accuracy": torch.tensor([0.5, 1.0]),
    }
    assert summarise(scores, ["a", "b", "c"]) == {
        "dice": 0.5,  # mean of 0.75 and 0.25: first over images, then over classes
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


# --- metrics of data sets


def metrics_of(names, prediction, target, num_classes=1):
    scores = score(prediction, target, num_classes)
    classes = [f"class {k}" for k in range(1, max(num_classes, 2))]
    return summarise(scores, classes, names)["metrics"]


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


def test_balanced_error_rate_ignores_images_of_one_class():
    prediction, target = [[[1, 0]], [[0, 0]]], [[[1, 0]], [[0, 0]]]
    assert metrics_of(["ber", "ber_pooled"], prediction, target) == {"ber": 0.0, "ber_pooled": 0.0}
    assert metrics_of(["ber", "ber_pooled"], [[[0, 1]]], [[[0, 0]]]) == {
        "ber": None,
        "ber_pooled": None,
    }


THREE = (
    [[[0, 1, 1, 2, 2, 0]], [[1, 1, 0, 0, 0, 0]]],  # prediction
    [[[0, 1, 2, 2, 2, 1]], [[1, 1, 1, 0, 0, 0]]],  # truth
)


def test_trans10k_by_hand():
    # Counts over both images, rows truth: 0: [4, 0, 0]; 1: [2, 3, 0]; 2: [0, 1, 2]
    names = ["pixel_accuracy", "miou", "foreground_accuracy", "foreground_miou", "index_mae"]
    values = metrics_of([*names, "class_iou", "mber"], *THREE, num_classes=3)
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


def test_a_class_that_is_nowhere_has_no_iou():
    values = metrics_of(["miou", "class_iou"], [[[0, 1]]], [[[0, 1]]], num_classes=4)
    assert values["miou"] == 1.0
    assert list(values["class_iou"].values()) == [1.0, 1.0, None, None]


def test_global_iou_agrees_with_torchmetrics():
    rng = np.random.default_rng(0)
    prediction, target = (torch.tensor(rng.integers(0, 5, (7, 8, 8))) for _ in range(2))
    values = summarise(image_scores(prediction, target, 5), list("abcd"), ["miou", "class_iou"])
    whole = multiclass_jaccard_index(prediction, target, 5, average="none").tolist()
    assert list(values["metrics"]["class_iou"].values()) == pytest.approx(whole, abs=TOLERANCE)
    mean = float(multiclass_jaccard_index(prediction, target, 5, average="macro"))
    assert values["metrics"]["miou"] == pytest.approx(mean, abs=TOLERANCE)


def test_saliency_by_hand():
    # The map is stretched from 51 .. 204 of 255 to 0 .. 1: 0, 1/3, 2/3, 1. The error is then 1/3 at
    # four of eight pixels.
    probability = torch.tensor([[0.2, 0.4, 0.6, 0.8]] * 2)
    target = torch.tensor([[0, 0, 1, 1]] * 2)
    scores = saliency_scores(probability, target)
    assert float(scores["mae"]) == pytest.approx((0 + 1 / 3 + 1 / 3 + 0) / 4)
    assert set(scores) == {"s_alpha", "e_phi", "f_w_beta", "f_w_beta_0.3", "mae"}


def test_saliency_of_perfect_and_inverted_maps():
    target = torch.zeros(32, 32, dtype=torch.int64)
    target[8:20, 10:24] = 1
    perfect, inverted = (saliency_scores(p.float(), target) for p in (target, 1 - target))
    for name in ("s_alpha", "f_w_beta", "f_w_beta_0.3"):
        assert float(perfect[name]) == pytest.approx(1, abs=1e-6) and float(inverted[name]) < 0.1
    # The thresholded map equals the truth at 255 of the 256 thresholds. At 0 it is all foreground.
    assert 0.99 < float(perfect["e_phi"]) <= 1 and float(inverted["e_phi"]) < 0.05
    assert (float(perfect["mae"]), float(inverted["mae"])) == (0, 1)


def test_saliency_agrees_with_the_library_over_a_set():
    # The library averages over a whole set. The mean over single images must be equal.
    import py_sod_metrics as sod

    rng = np.random.default_rng(1)
    measures = {
        "s_alpha": sod.Smeasure(),
        "e_phi": sod.Emeasure(),
        "f_w_beta": sod.WeightedFmeasure(beta=1),
        "f_w_beta_0.3": sod.WeightedFmeasure(beta=0.3),
        "mae": sod.MAE(),
    }
    images = []
    for _ in range(3):
        pixels = rng.integers(0, 256, (16, 16)).astype(np.uint8)
        truth = np.zeros((16, 16), np.uint8)
        truth[4 : rng.integers(6, 15), 4:10] = 1
        for measure in measures.values():
            measure.step(pixels, 255 * truth)
        images.append(saliency_scores(torch.tensor(pixels / 255), torch.tensor(truth)))
    results = {name: measure.get_results() for name, measure in measures.items()}
    expected = {
        "s_alpha": results["s_alpha"]["sm"],
        "e_phi": results["e_phi"]["em"]["curve"].mean(),
        "f_w_beta": results["f_w_beta"]["wfm"],
        "f_w_beta_0.3": results["f_w_beta_0.3"]["wfm"],
        "mae": results["mae"]["mae"],
    }
    for name, value in expected.items():
        own = np.mean([float(image[name]) for image in images])
        assert own == pytest.approx(float(value), abs=1e-12)
    assert expected["f_w_beta"] != pytest.approx(expected["f_w_beta_0.3"], abs=1e-3)


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


def test_an_image_without_a_counted_pixel_has_no_score():
    nothing = torch.full((1, 2, 2), 77)
    ones = torch.ones(1, 2, 2, dtype=torch.int64)
    scores = image_scores(ones, nothing, 1, ignore_index=77)
    assert summarise(scores, ["a"])["accuracy"] is None
    assert summarise(scores, ["a"])["dice"] is None
