"""The test images of the report: the worst and the best, and how merging changes them."""

import pytest

from naslora.records import to_json
from naslora.results import SplitScores
from naslora.training.run_results import choose


@pytest.mark.parametrize(
    ("dice", "chosen"),
    [
        ([0.5, 0.1, 0.9, 0.3, 0.7, 0.2], [1, 5, 4, 2]),
        ([0.5, None, 0.9], [0, 2]),  # few images: all that have a Dice, the worst first
        ([0.9, 0.5, 0.7, 0.1], [3, 1, 2, 0]),
        ([None] * 7, [0, 2, 4, 6]),  # no foreground: spread over the split
        ([None, None], [0, 1]),
        ([0.5, 0.5, 0.5, 0.5, 0.5], [0, 1, 3, 4]),  # ties keep the order of the split
        ([], []),
    ],
)
def test_the_worst_and_the_best_are_chosen(dice, chosen):
    assert choose(dice, 4) == chosen


def test_the_dice_of_the_images_is_not_stored():
    scores = SplitScores(dice=0.5, image_dice=[0.25, None, 0.75])
    assert to_json(scores) == {"loss": None, "dice": 0.5, "iou": None, "accuracy": None}
    assert scores == SplitScores(dice=0.5)
