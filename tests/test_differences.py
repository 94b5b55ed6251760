"""Differences between methods: intervals, tests and ranks by hand."""

import numpy as np
import pytest
from conftest import error_of

from naslora.records import write_rows
from naslora.study.differences import (
    OverImages,
    differences_table,
    mean_ranks,
    over_images,
    paired_difference,
    verdict,
)

MARGIN = 0.005


# The differences of each seed, the groups of the images, and the interval. A mean of n images of
# which one differs by 1 is Binomial(n, 1/n) / n under resampling.
BOOTSTRAPS = [
    ([[0, 0, 3]], None, (0, 3)),  # P(0) = 0.296, P(<= 2 of 3) = 0.963 < 0.975
    ([[0, 0, 0, 0, 0, 1]], None, (0, 3 / 6)),  # P(0) = 0.335, P(<= 2) = 0.938, P(<= 3) = 0.991
    ([[0, 0, 0, 1, 1, 1]], None, (1 / 6, 5 / 6)),  # P(0 of 6) = 0.016 < 0.025 < P(<= 1) = 0.109
    ([[0, 0, 0, 1, 1, 1]], "aaabbb", (0, 1)),  # of two groups, P(both a) = 0.25
    ([[0, 0, 0, 1]], "aaab", (0, 1)),  # a mean over images, not over groups, but P(both b) = 0.25
    ([[1, -1], [-1, 1]], None, (0, 0)),  # an image is drawn in all seeds together
    ([[0, None, 1]], None, (0, 1)),  # an image without a score does not count
]


@pytest.mark.parametrize("differences, groups, interval", BOOTSTRAPS)
def test_intervals_by_resampling_images(differences, groups, interval):
    own = dict(enumerate(differences))
    other = {seed: [0.0] * len(scores) for seed, scores in own.items()}
    found = over_images(own, other, MARGIN, groups and [*groups])
    assert (found.low, found.high) == pytest.approx(interval, abs=1e-12)


def test_the_mean_of_groups_is_that_of_the_images():
    """With a margin at the mean, the test against it has p = 1/2."""
    found = over_images({0: [0.0, 0.0, 0.0, 1.0]}, {0: [0.0] * 4}, 0.25, [*"aaab"])
    assert found.equivalence == pytest.approx(0.5)


@pytest.mark.parametrize("sign", [1, -1])
def test_two_one_sided_tests(sign):
    # Mean 0.001, standard error 0.001 / sqrt(3): the nearer bound is 4 sqrt(3) errors away.
    differences = [sign * value for value in (0.0, 0.001, 0.002)]
    found = over_images({0: differences}, {0: [0.0] * 3}, MARGIN)
    # Student's t with two degrees of freedom.
    assert found.equivalence == pytest.approx(0.0101, abs=1e-4)


@pytest.mark.parametrize("scores", [{}, {0: []}, {0: [0.5]}, {0: [0.5, None]}])
def test_too_few_images_have_no_interval(scores):
    assert over_images(scores, scores, MARGIN) is None
    difference = paired_difference("Mona", {0: 0.5}, {0: 0.25})
    (row,) = differences_table("LoRA", [difference], MARGIN).rows
    assert row == ["Mona", "+0.2500", "–", "one seed has no interval", "–", "–", "1"]


def test_a_method_is_level_with_itself(recwarn):
    scores = {seed: list(np.random.default_rng(seed).random(9)) for seed in (0, 1)}
    expected = OverImages(0, 0, 0, "level, within ± 0.005")
    assert over_images(scores, scores, MARGIN) == expected and not recwarn.list


@pytest.mark.parametrize(
    "low, high, p, words",
    [
        (0.01, 0.03, 0.9, "ahead"),
        (-0.03, -0.01, 0.9, "behind"),
        (0.001, 0.004, 0.01, "ahead, by less than 0.005"),
        (-0.001, 0.002, 0.049, "level, within ± 0.005"),
        (-0.001, 0.002, 0.051, "undecided"),
    ],
)
def test_verdicts(low, high, p, words):
    assert verdict(low, high, p, MARGIN) == words


def test_seeds_have_students_interval():
    found = paired_difference("Mona", {0: 0.5, 1: 0.6, 2: 0.9}, {1: 0.5, 2: 0.6, 3: 0.1})
    assert found.seeds == [1, 2] and found.mean == pytest.approx(0.2)
    # Of two values the error is half their distance, and the quantile 12.706.
    assert (found.low, found.high) == pytest.approx((0.2 - 1.2706, 0.2 + 1.2706), abs=1e-4)


def test_mean_ranks(tmp_path):
    dice = {
        "polyps": {"LoRA": 0.8, "Mona": 0.7, "VPT": 0.9, "DoRA": 0.95},
        "leaves": {"LoRA": 0.6, "Mona": 0.6, "VPT": 0.5, "DoRA": None},
    }
    for name, own in dice.items():
        rows = [{"row": title.lower(), "title": title, "dice": d} for title, d in own.items()]
        write_rows(tmp_path / name / "table.csv", rows)
    table = mean_ranks([tmp_path / name for name in dice])
    assert table.head == ["Method", "polyps", "leaves", "Mean rank"]
    # Ranks 2, 3, 1 and, with a tie, 1.5, 1.5, 3. DoRA has no score on the leaves.
    assert table.rows == [
        ["LoRA", "0.800", "0.600", "1.75"],
        ["VPT", "0.900", "0.500", "2.00"],
        ["Mona", "0.700", "0.600", "2.25"],
    ]
    write_rows(tmp_path / "none/table.csv", [{"row": "full", "title": "Full", "dice": 0.5}])
    message = error_of(mean_ranks, [tmp_path / "polyps", tmp_path / "none"])
    assert "no method has a score in all of" in message
