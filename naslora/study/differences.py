"""What a row of a study gains on another in test Dice: over the seeds, and over the images.

Runs with equal seeds share the order of the images and the start of the adapters, and all runs
share the test images. So differences are taken seed by seed and image by image: they vary less than
the scores do.
"""

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from naslora.errors import UserError
from naslora.records import read_rows
from naslora.report.figures import BLUE, GRID, MUTED, Drawing, row_drawing
from naslora.report.tables import MISSING, Table, number
from naslora.results import RunNumbers

LEVEL = 0.95
RESAMPLES = 9999
"""Of the bootstrap."""

Runs = Mapping[str, Mapping[int, RunNumbers]]
"""The finished runs by the row's title and seed."""
ImageScores = Mapping[int, Sequence[float | None]]
"""The score of each test image, by seed; None where it is undefined."""


class OverImages(NamedTuple):
    """How sure a difference is for images like the tested ones."""

    low: float
    """Lower end of the 95 % interval, by resampling the images."""
    high: float
    """Upper end."""
    equivalence: float
    """p-value of the two one-sided tests (TOST) against a difference of the margin or more."""
    verdict: str
    """What these say, in words."""


@dataclass(frozen=True)
class PairedDifference:
    """What a row gains in test Dice on another row, paired over the seeds of both."""

    title: str
    """The row's title."""
    seeds: list[int]
    """The seeds that both rows have."""
    values: list[float]
    """One difference a seed."""
    mean: float | None
    """None without a shared seed."""
    low: float | None
    """Lower end of Student's 95 % confidence interval of the mean; None for less than two seeds."""
    high: float | None
    """Upper end of the interval."""
    images: OverImages | None
    """None if the Dice of the images is not known."""

    def row(self) -> dict[str, Any]:
        """The row of differences.csv."""
        images = self.images._asdict() if self.images else {}
        own = {name: value for name, value in vars(self).items() if name != "images"}
        return own | {f"images_{name}": value for name, value in images.items()}


Differences = Sequence[PairedDifference]


def paired_difference(
    title: str,
    own: Mapping[int, float],
    other: Mapping[int, float],
    images: OverImages | None = None,
) -> PairedDifference:
    """The differences of two rows' scores by seed, over the seeds that both have."""
    from scipy.special import stdtrit  # what other commands should not wait for

    seeds = sorted(own.keys() & other.keys())
    values = [own[seed] - other[seed] for seed in seeds]
    mean, low, high = statistics.mean(values) if seeds else None, None, None
    if mean is not None and len(seeds) > 1:
        error = statistics.stdev(values) / math.sqrt(len(seeds))
        half = float(stdtrit(len(seeds) - 1, (1 + LEVEL) / 2)) * error
        low, high = mean - half, mean + half
    return PairedDifference(title, seeds, values, mean, low, high, images)


def over_images(
    own: ImageScores, other: ImageScores, margin: float, groups: Sequence[str] | None = None
) -> OverImages | None:
    """How sure a paired difference is for other images than the tested ones.

    The differences of an image are averaged over the shared seeds, and an image is drawn in all
    seeds together: seeds that share it are no further images. Images of a group are drawn together.

    Differences smaller than ``margin`` count as none. ``groups`` has the group of each image; None
    if each is one of its own. Returns None if fewer than two images, or groups, have a score in all
    runs.
    """
    from scipy import stats  # what other commands should not wait for

    seeds = own.keys() & other.keys()
    if not seeds:
        return None
    differences = np.array([own[seed] for seed in seeds], float)  # (seeds, images), None as NaN
    differences -= np.array([other[seed] for seed in seeds], float)
    means = differences.mean(0)
    known = ~np.isnan(means)
    places = np.arange(len(means)) if groups is None else np.unique(groups, return_inverse=True)[1]
    counts = np.bincount(places[known])
    sums = np.bincount(places[known], means[known])[counts > 0]
    counts = counts[counts > 0]
    if len(counts) < 2:
        return None
    interval = stats.bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        n_resamples=RESAMPLES,
        batch=100,
        vectorized=True,
        paired=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=0,
    ).confidence_interval
    # Their mean is the images'. Their spread is that of a ratio of sums, to first order.
    mean = sums.sum() / counts.sum()
    values = mean + (sums - mean * counts) / counts.mean()
    bounds = ((-margin, "greater"), (margin, "less"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of differences that are all equal, as in a row by itself
        p = max(stats.ttest_1samp(values, m, alternative=side).pvalue for m, side in bounds)
    low, high = map(float, interval)
    return OverImages(low, high, float(p), verdict(low, high, float(p), margin))


def verdict(low: float, high: float, equivalence: float, margin: float) -> str:
    """What the interval and the test of ``OverImages`` say, in words."""
    level = equivalence < 1 - LEVEL
    if low > 0 or high < 0:
        return ("ahead" if low > 0 else "behind") + f", by less than {margin:g}" * level
    return f"level, within ± {margin:g}" if level else "undecided"


def differences_from(
    reference: str, runs: Runs, margin: float, groups: Sequence[str] | None = None
) -> list[PairedDifference]:
    """What each row gains in test Dice on the row ``reference``; none if that has no run.

    Margin and groups are those of ``over_images``.
    """

    def scores(title: str) -> tuple[dict[int, float], ImageScores]:
        own = runs[title]
        dice = {seed: d for seed, run in own.items() if (d := run.numbers["dice"]) is not None}
        return dice, {seed: own[seed].image_dice for seed in dice}

    other, other_images = scores(reference)
    found = []
    for title in runs:
        dice, images = scores(title)
        if title != reference and dice and other:
            interval = over_images(images, other_images, margin, groups)
            found.append(paired_difference(title, dice, other, interval))
    return found


def differences_table(reference: str, differences: Differences, margin: float) -> Table:
    """The differences from the row ``reference``."""
    head = ["Method", f"Dice − {reference}", f"{LEVEL:.0%} over images", f"{LEVEL:.0%} over seeds"]
    rows = []
    for own in differences:
        seeds = "one seed has no interval" if own.seeds else "no seed is shared"
        if own.low is not None:
            seeds = f"{number(own.low, '+.4f')} to {number(own.high, '+.4f')}"
        images, p, words = MISSING, MISSING, MISSING
        if own.images is not None:
            images = f"{number(own.images.low, '+.4f')} to {number(own.images.high, '+.4f')}"
            p, words = f"{own.images.equivalence:.2g}", own.images.verdict
        count = str(len(own.seeds))
        rows.append([own.title, number(own.mean, "+.4f"), images, seeds, p, words, count])
    return Table([*head, f"p, level within ± {margin:g}", "Verdict", "Seeds"], rows)


def differences_drawing(reference: str, differences: Differences, margin: float) -> Drawing:
    """A row a method: a dot for the difference, and a line for the interval over the images."""

    def draw(axes: Axes) -> None:
        axes.axvspan(-margin, margin, color=GRID, linewidth=0)
        axes.axvline(0, color=MUTED, linewidth=1)
        for place, own in enumerate(differences):
            if own.images is not None:
                axes.hlines(place, own.images.low, own.images.high, color=BLUE, linewidth=2)
            axes.plot([own.mean or 0.0], [place], "o", color=BLUE, markersize=6)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(f"test Dice − {reference}")

    caption = (
        "Difference in test Dice: a dot, with a line for the 95 % interval over the images. In "
        f"the band are differences below {margin:g}."
    )
    return row_drawing("differences", caption, [own.title for own in differences], draw)


# ---- Several data sets ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A row of table.csv."""

    title: str
    dice: float | None = None


def mean_ranks(folders: Sequence[Path | str]) -> Table:
    """Ranks the methods by test Dice in several folders of ``naslora compare``.

    Returns:
        The methods that have a score in all of them, the best first, with their Dice in each and
        the mean of their ranks. The best has rank 1; equal scores share the mean of their ranks.

    Raises:
        UserError: a folder has no table, or no method is in all of them.
    """
    from scipy.stats import rankdata

    tables = [read_rows(Path(folder) / "table.csv", Score) for folder in folders]
    known = [{row.title: row.dice for row in table if row.dice is not None} for table in tables]
    titles = [title for title in known[0] if all(title in dice for dice in known)]
    if not titles:
        raise UserError(f"no method has a score in all of {' '.join(map(str, folders))}")
    dice = np.array([[own[title] for title in titles] for own in known])  # (comparisons, methods)
    ranks = rankdata(-dice, axis=1).mean(0)
    rows = [
        [titles[i], *(number(value, ".3f") for value in dice[:, i]), number(ranks[i], ".2f")]
        for i in np.argsort(ranks, kind="stable")
    ]
    names = [Path(folder).resolve().name for folder in folders]
    return Table(["Method", *names, "Mean rank"], rows)
