"""Paired differences: what a method gains on another one, seed by seed.

Runs with equal seeds share the order of the images and the start of the adapters. So their
difference varies less over the seeds than their scores do.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.stats import t as student

from naslora.report.numbers import MISSING, number
from naslora.report.tables import Table
from naslora.results import PairedDifference

LEVEL = 0.95
REFERENCE = "lora"
"""The method that others are compared with, if it is among them."""

Scores = Mapping[int, float]
"""A score of each seed."""

ImageScores = Mapping[int, Sequence[float | None]]
"""The score of each test image, by seed; None where it is undefined."""


def paired_difference(title: str, own: Scores, other: Scores) -> PairedDifference:
    """The mean of the differences over the shared seeds, with its confidence interval.

    The interval is Student's, for n - 1 degrees of freedom. It assumes that the differences are
    about normally distributed.

    Args:
        title: the method's name in tables.
        own: the method's scores.
        other: the scores of the method that it is compared with.

    Returns:
        The difference; without an interval, and with the reason, if fewer than two seeds are
        shared.
    """
    seeds = sorted(own.keys() & other.keys())
    values = [own[seed] - other[seed] for seed in seeds]
    if not seeds:
        return PairedDifference(title, seeds, values, reason="no seed is shared")
    mean = statistics.mean(values)
    if len(seeds) == 1:
        return PairedDifference(title, seeds, values, mean, reason="one seed has no interval")
    half = float(student.ppf((1 + LEVEL) / 2, len(seeds) - 1)) * statistics.stdev(values)
    half /= math.sqrt(len(seeds))
    return PairedDifference(title, seeds, values, mean, mean - half, mean + half)


def error_over_images(own: ImageScores, other: ImageScores) -> float | None:
    """The standard error of a paired difference over the test images.

    The differences of an image are averaged over the shared seeds. What is left varies with the
    image, not with the seed, so more seeds do not lower it.

    Returns:
        The error; None without a shared seed, if the seeds have other numbers of images, or if
        fewer than two images have a score in all runs.
    """
    seeds = own.keys() & other.keys()
    runs = [scores[seed] for scores in (own, other) for seed in seeds]
    if len({len(run) for run in runs}) != 1:
        return None
    differences = np.array([own[seed] for seed in seeds], float)  # (seeds, images), None as NaN
    differences -= np.array([other[seed] for seed in seeds], float)
    means = differences.mean(0)
    means = means[~np.isnan(means)]
    if len(means) < 2:
        return None
    return float(means.std(ddof=1) / math.sqrt(len(means)))


def paired_differences(
    scores: Mapping[str, Scores],
    titles: Mapping[str, str],
    images: Mapping[str, ImageScores] | None = None,
) -> tuple[str, list[PairedDifference]]:
    """Each method against LoRA, or against the first method if LoRA is not among them.

    Args:
        scores: the finished methods' scores.
        titles: the methods' names in tables.
        images: the methods' scores of each test image, where they are known.

    Returns:
        The method that the others are compared with, and one difference for each of the others.
    """
    if not scores:
        return REFERENCE, []
    reference = REFERENCE if REFERENCE in scores else next(iter(scores))
    images = images or {}
    return reference, [
        replace(
            paired_difference(titles[method], own, scores[reference]),
            over_images=error_over_images(images.get(method, {}), images.get(reference, {})),
        )
        for method, own in scores.items()
        if method != reference
    ]


def paired_table(reference: str, differences: Sequence[PairedDifference]) -> Table:
    """The differences as a table of text.

    Args:
        reference: title of the method that the others are compared with.
        differences: as ``paired_differences`` returns them.
    """
    head = ["Method", f"Dice − {reference}", f"{LEVEL:.0%} interval", "Seeds"]
    rows = [_row(difference) for difference in differences]
    errors = [difference.over_images for difference in differences]
    if any(error is not None for error in errors):
        head.insert(3, "± over images")
        for row, error in zip(rows, errors, strict=True):
            row.insert(3, number(error))
    return Table(head, rows)


def _row(difference: PairedDifference) -> list[str]:
    interval = difference.reason
    if difference.low is not None:
        interval = f"{number(difference.low, '+.4f')} to {number(difference.high, '+.4f')}"
    mean = number(difference.mean, "+.4f")
    return [difference.title, mean, interval or MISSING, str(len(difference.seeds))]
