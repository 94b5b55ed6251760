"""The numbers of a study over its seeds: one row a method or variant, and their differences.

A row of the study is a row of table.csv: a dictionary of row, title, seeds, missing, refused,
reason, and, once a run is finished, of its numbers in parameters, shares, seconds and bytes. A
score has a mean over the seeds, NAME, and a standard deviation, NAME_spread.

Runs with equal seeds share the order of the images and the start of the adapters. So the difference
of two rows is taken seed by seed: it varies less over the seeds than their scores do.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from naslora.adapter.merging.report import MODES
from naslora.metrics import METRICS
from naslora.report.tables import Table, number
from naslora.results import RunNumbers

LEVEL = 0.95
UNMERGED = "unmerged"

Runs = Mapping[str, Mapping[int, RunNumbers]]
"""The finished runs by row and seed."""
ImageScores = Mapping[int, Sequence[float | None]]
"""The score of each test image, by seed; None where it is undefined."""

# ---- Rows ----------------------------------------------------------------------------------------


class MeanAndSpread(NamedTuple):
    """A number over the seeds."""

    mean: float | None
    """None if the number of a seed is unknown."""
    spread: float | None
    """Standard deviation with n - 1 degrees of freedom; None for a single seed."""


def mean_and_spread(values: Sequence[float | None]) -> MeanAndSpread:
    """Mean and standard deviation of one number a seed."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return MeanAndSpread(None, None)
    return MeanAndSpread(
        statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None
    )


def mean_text(value: MeanAndSpread, form: str = ".3f") -> str:
    """``mean ± spread`` for a table; the spread has three decimals."""
    return number(value.mean, form) + ("" if value.spread is None else f" ± {value.spread:.3f}")


def row_numbers(runs: Sequence[RunNumbers]) -> dict[str, Any]:
    """The numbers of a row's runs, by column of table.csv; none without a run."""
    if not runs:
        return {}
    first = runs[0]
    found: dict[str, Any] = {
        "trainable_parameters": first.trainable_parameters,
        "share_of_parameters": first.trainable_parameters / first.parameters,
    }
    scores = {name: [run.scores[name] for run in runs] for name in first.scores}
    scores["entropy"] = [run.entropy for run in runs]
    for mode in first.merged_dice:
        scores[f"dice_{mode}"] = [run.merged_dice.get(mode) for run in runs]
    for name, values in scores.items():
        found[name], found[f"{name}_spread"] = mean_and_spread(values)
    costs = [run.costs for run in runs if run.costs is not None]
    if costs:
        for name in ("weight_seconds", "training_seconds"):
            found[name] = statistics.median(getattr(own, name) for own in costs)
        found["peak_memory"] = max(own.peak_memory for own in costs)
        for mode in costs[0].inference_seconds:
            seconds = statistics.median(own.inference_seconds[mode] for own in costs)
            found[f"inference_{mode}"] = seconds
    return found


# ---- Differences ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedDifference:
    """What a row gains in test Dice on another row, paired over the seeds of both."""

    title: str
    """The row's title."""
    seeds: list[int]
    """The seeds that both rows have."""
    values: list[float]
    """One difference a seed."""
    mean: float | None = None
    """None without a shared seed."""
    low: float | None = None
    """Lower end of Student's 95 % confidence interval of the mean; None for less than two seeds."""
    high: float | None = None
    """Upper end of the interval."""
    over_images: float | None = None
    """Standard error of the mean over the test images; None if their Dice is not known."""


def paired_difference(
    title: str,
    own: Mapping[int, float],
    other: Mapping[int, float],
    over_images: float | None = None,
) -> PairedDifference:
    """The differences over the shared seeds.

    Args:
        title: the row's title.
        own: the row's score of each seed.
        other: the scores of the row that it is compared with.
        over_images: as ``error_over_images``.
    """
    from scipy.special import stdtrit  # what other commands should not wait for

    seeds = sorted(own.keys() & other.keys())
    values = [own[seed] - other[seed] for seed in seeds]
    mean = statistics.mean(values) if seeds else None
    if mean is None or len(seeds) < 2:
        return PairedDifference(title, seeds, values, mean, over_images=over_images)
    error = statistics.stdev(values) / math.sqrt(len(seeds))
    half = float(stdtrit(len(seeds) - 1, (1 + LEVEL) / 2)) * error
    return PairedDifference(title, seeds, values, mean, mean - half, mean + half, over_images)


def error_over_images(own: ImageScores, other: ImageScores) -> float | None:
    """The standard error of a paired difference over the test images.

    The differences of an image are averaged over the shared seeds. What is left varies with the
    image, not with the seed, so more seeds do not lower it.

    Returns:
        The error; None if fewer than two images have a score in all runs.
    """
    seeds = own.keys() & other.keys()
    differences = np.array([own[seed] for seed in seeds], float)  # (seeds, images), None as NaN
    differences -= np.array([other[seed] for seed in seeds], float)
    means = differences.mean(0) if seeds else np.array([])
    means = means[~np.isnan(means)]
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None


def differences_from(
    reference: str, runs: Runs, titles: Mapping[str, str]
) -> list[PairedDifference]:
    """What each row gains in test Dice on the row ``reference``; none if that has no run.

    Args:
        reference: a row's name.
        runs: the finished runs.
        titles: the rows' titles, by name.
    """
    dice = {
        name: {s: run.scores["dice"] for s, run in own.items() if run.scores["dice"] is not None}
        for name, own in runs.items()
    }
    images = {
        name: {seed: runs[name][seed].image_dice or [] for seed in own}
        for name, own in dice.items()
    }
    return [
        paired_difference(
            titles[name],
            own,
            dice[reference],
            error_over_images(images[name], images[reference]),
        )
        for name, own in dice.items()
        if name != reference and own and dice.get(reference)
    ]


# ---- Tables --------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of a table to read."""

    title: str
    form: str = ".3f"
    scale: float = 1

    def cell(self, row: Mapping[str, Any], name: str) -> str:
        """The number of the column ``name`` of table.csv; ``MISSING`` without one."""
        value = row.get(name)
        scaled = None if value is None else self.scale * value
        return mean_text(MeanAndSpread(scaled, row.get(f"{name}_spread")), self.form)


COLUMNS = {
    "trainable_parameters": Column("Trainable, M", scale=1e-6),
    "share_of_parameters": Column("Of all, %", ".2f", 100),
    **{name: Column(METRICS[name].label) for name in ("dice", *METRICS)},
    "entropy": Column("Entropy of α"),
    "weight_seconds": Column("Weight steps, s/image"),
    "training_seconds": Column("Training, s/image"),
    "peak_memory": Column("Peak memory, MB", ",.0f", 1e-6),
    f"inference_{UNMERGED}": Column("Inference, s/image"),
    **{f"inference_{mode}": Column(f"merged, {mode}") for mode in MODES},
}
MERGED = {"dice": Column("Dice"), **{f"dice_{mode}": Column(f"merged, {mode}") for mode in MODES}}


def number_table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column], first: str
) -> Table:
    """The columns that a row has, after the rows' titles and their numbers of seeds.

    Args:
        rows: as in table.csv.
        columns: by the name of the column of table.csv.
        first: title of the first column.
    """
    always = {"trainable_parameters", "share_of_parameters", "dice"}
    shown = [name for name in columns if any(row.get(name) is not None for row in rows)]
    shown = [name for name in columns if name in always or name in shown]
    table = []
    for row in rows:
        failed = f" ({row['missing']} failed)" if row["missing"] else ""
        title = row["title"] + (" (refused)" if row["refused"] else failed)
        cells = [columns[name].cell(row, name) for name in shown]
        table.append([title, str(row["seeds"]), *cells])
    return Table([first, "Seeds", *(columns[name].title for name in shown)], table)


def differences_table(reference: str, differences: Sequence[PairedDifference]) -> Table:
    """The differences from the row with the title ``reference``."""
    head = ["Method", f"Dice − {reference}", f"{LEVEL:.0%} interval", "± over images", "Seeds"]
    rows = []
    for own in differences:
        interval = f"{number(own.low, '+.4f')} to {number(own.high, '+.4f')}"
        if own.low is None:
            interval = "one seed has no interval" if own.seeds else "no seed is shared"
        cells = [own.title, number(own.mean, "+.4f"), interval, number(own.over_images)]
        rows.append([*cells, str(len(own.seeds))])
    return Table(head, rows)


def notes_on(rows: Sequence[Mapping[str, Any]], runs: Sequence[RunNumbers]) -> list[str]:
    """What the numbers of a table are, under what load they were taken, and what is missing."""
    notes = [
        "Scores are means over the test images, then mean ± standard deviation over the seeds. "
        "Differences are taken seed by seed."
    ]
    costs = [run.costs for run in runs if run.costs is not None]
    if costs:
        loads = [own.load for own in costs]
        notes.append(
            "Times are medians over the seeds, memory is the maximum. Training seconds are those "
            "of all steps of an epoch, steps for α included, per training image. Times were taken "
            f"with one run at a time, {costs[0].threads} threads each, on {costs[0].processors} "
            f"processors ({costs[0].device}) at a load average of {min(loads):.1f} to "
            f"{max(loads):.1f}. They compare only if little else ran beside the runs."
        )
    if any(run.image_dice for run in runs):
        notes.append(
            "All seeds share the test images, and a difference's interval knows the seeds only. "
            "± over images is its standard error over the images. A difference smaller than twice "
            "that may not hold on other images."
        )
    return notes + [f"{row['title']}: {row['reason']}." for row in rows if row["missing"]]
