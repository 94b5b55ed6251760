"""The numbers of a study over its seeds: one row a method or variant, and their differences.

Runs with equal seeds share the order of the images and the start of the adapters. So the difference
of two rows is taken seed by seed: it varies less over the seeds than their scores do.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from naslora.adapter.merging.report import MODES
from naslora.metrics import METRICS
from naslora.report.numbers import MISSING, number
from naslora.report.tables import Table, markdown_table
from naslora.results import Costs, MeanAndSpread, PairedDifference, RowNumbers, RunNumbers, StudyRow

LEVEL = 0.95
UNMERGED = "unmerged"

Scores = Mapping[int, float]
"""A score of each seed."""

ImageScores = Mapping[int, Sequence[float | None]]
"""The score of each test image, by seed; None where it is undefined."""

# ---- Rows ----------------------------------------------------------------------------------------


def mean_and_spread(values: Sequence[float | None]) -> MeanAndSpread:
    """Mean and standard deviation (n - 1) of one number a seed.

    There is no mean if a value is None, and no spread of a single value.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return MeanAndSpread(None, None, list(values))
    spread = statistics.stdev(known) if len(known) > 1 else None
    return MeanAndSpread(statistics.mean(known), spread, list(values))


def row_numbers(runs: Sequence[RunNumbers]) -> RowNumbers:
    """The numbers of a row's runs, at least one."""
    first = runs[0]
    costs = [run.costs for run in runs if run.costs is not None]
    return RowNumbers(
        first.trainable_parameters,
        first.trainable_parameters / first.parameters,
        {name: mean_and_spread([run.scores[name] for run in runs]) for name in first.scores},
        {
            mode: mean_and_spread([run.merged_dice.get(mode) for run in runs])
            for mode in first.merged_dice
        },
        mean_and_spread([run.entropy for run in runs]),
        _median_costs(costs) if costs else None,
    )


def _median_costs(costs: Sequence[Costs]) -> Costs:
    return replace(
        costs[0],
        weight_seconds=statistics.median(own.weight_seconds for own in costs),
        training_seconds=statistics.median(own.training_seconds for own in costs),
        peak_memory=max(own.peak_memory for own in costs),
        inference_seconds={
            mode: statistics.median(own.inference_seconds[mode] for own in costs)
            for mode in costs[0].inference_seconds
        },
        load=max(own.load for own in costs),
    )


# ---- Differences ---------------------------------------------------------------------------------


def paired_difference(title: str, own: Scores, other: Scores) -> PairedDifference:
    """The mean of the differences over the shared seeds, with Student's confidence interval.

    Args:
        title: the row's title.
        own: the row's scores.
        other: the scores of the row that it is compared with.

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
    if statistics.stdev(values) == 0:  # for which the test has no statistic
        return PairedDifference(title, seeds, values, mean, mean, mean)
    from scipy.stats import ttest_1samp  # half a second, which other commands should not wait

    interval = ttest_1samp(values, 0).confidence_interval(LEVEL)
    return PairedDifference(title, seeds, values, mean, float(interval.low), float(interval.high))


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


def differences_from(
    reference: str, runs: Mapping[str, Mapping[int, RunNumbers]], titles: Mapping[str, str]
) -> list[PairedDifference]:
    """What each row gains in test Dice on the row ``reference``; none if that has no run.

    Args:
        reference: a row's name.
        runs: the finished runs by row and seed.
        titles: the rows' titles, by name.
    """
    dice = {
        name: {s: run.scores["dice"] for s, run in own.items() if run.scores["dice"] is not None}
        for name, own in runs.items()
    }
    images = {
        name: {seed: run.image_dice or [] for seed, run in own.items() if seed in dice[name]}
        for name, own in runs.items()
    }
    if not dice.get(reference):
        return []
    return [
        replace(
            paired_difference(titles[name], own, dice[reference]),
            over_images=error_over_images(images[name], images[reference]),
        )
        for name, own in dice.items()
        if name != reference and own
    ]


# ---- Tables --------------------------------------------------------------------------------------


def mean_text(value: MeanAndSpread | None, form: str = ".3f") -> str:
    """``mean ± spread`` for a table; ``MISSING`` without a mean.

    Args:
        value: None if there is none.
        form: format of the mean; the spread has three decimals.
    """
    if value is None or value.mean is None:
        return MISSING
    mean = format(value.mean, form)
    return mean if value.spread is None else f"{mean} ± {value.spread:.3f}"


def main_table(rows: Sequence[StudyRow], first_column: str) -> Table:
    """Parameters, scores and costs of every row, in the shape of the paper's Tables 1 and 2."""
    known = [row.numbers for row in rows if row.numbers is not None]
    metrics = list(known[0].scores) if known else []
    costs = [numbers.costs for numbers in known if numbers.costs is not None]
    modes = [m for m in (UNMERGED, *MODES) if any(m in own.inference_seconds for own in costs)]
    entropy = any(numbers.entropy.mean is not None for numbers in known)
    head = [first_column, "Seeds", "Trainable, M", "Of all, %"]
    head += [METRICS[name].label for name in metrics] + ["Entropy of α"] * entropy
    if costs:
        head += ["Weight steps, s/image", "Training, s/image", "Peak memory, MB"]
    head += ["Inference, s/image" if m == UNMERGED else f"merged, {m}" for m in modes]
    table = []
    for row in rows:
        mark = " (refused)" if row.refused else f" ({row.missing} failed)" if row.missing else ""
        cells = [row.title + mark, str(row.seeds)]
        if row.numbers is not None:
            cells += _number_cells(row.numbers, metrics, entropy, modes)
        table.append(cells + [MISSING] * (len(head) - len(cells)))
    return Table(head, table)


def _number_cells(
    numbers: RowNumbers, metrics: Sequence[str], entropy: bool, modes: Sequence[str]
) -> list[str]:
    cells = [
        f"{1e-6 * numbers.trainable_parameters:.3f}",
        f"{100 * numbers.share_of_parameters:.2f}",
    ]
    cells += [mean_text(numbers.scores.get(name)) for name in metrics]
    cells += [mean_text(numbers.entropy)] * entropy
    if numbers.costs is None:
        return cells
    costs = numbers.costs
    cells += [f"{costs.weight_seconds:.3f}", f"{costs.training_seconds:.3f}"]
    cells.append(f"{1e-6 * costs.peak_memory:,.0f}")
    return cells + [number(costs.inference_seconds.get(mode), ".3f") for mode in modes]


def differences_table(reference: str, differences: Sequence[PairedDifference]) -> Table:
    """The differences from the row with the title ``reference``."""
    head = ["Method", f"Dice − {reference}", f"{LEVEL:.0%} interval", "Seeds"]
    rows = []
    for own in differences:
        interval = own.reason or MISSING
        if own.low is not None:
            interval = f"{number(own.low, '+.4f')} to {number(own.high, '+.4f')}"
        rows.append([own.title, number(own.mean, "+.4f"), interval, str(len(own.seeds))])
    if any(own.over_images is not None for own in differences):
        head.insert(3, "± over images")
        for row, own in zip(rows, differences, strict=True):
            row.insert(3, number(own.over_images))
    return Table(head, rows)


def merged_table(rows: Sequence[StudyRow]) -> Table:
    """Test Dice before and after each way of merging, of the rows that can be merged."""
    merged = {row.title: row.numbers for row in rows if row.numbers and row.numbers.merged_dice}
    modes = [mode for mode in MODES if any(mode in n.merged_dice for n in merged.values())]
    return Table(
        ["Method", "Dice", *(f"merged, {mode}" for mode in modes)],
        [
            [
                title,
                mean_text(numbers.scores["dice"]),
                *(mean_text(numbers.merged_dice.get(mode)) for mode in modes),
            ]
            for title, numbers in merged.items()
        ],
    )


def as_markdown(tables: Mapping[str, Table], notes: Sequence[str]) -> str:
    """The tables that have rows, with a heading from the second on, and the notes below them."""
    filled = [(name, markdown_table(table)) for name, table in tables.items() if table.rows]
    (_, first), *others = filled
    sections = [first, *(f"**{name}**\n\n{text}" for name, text in others)]
    return "\n\n".join([*sections, *notes]) + "\n"


def csv_row(row: StudyRow) -> dict[str, Any]:
    """A row of table.csv, in seconds, bytes and shares. Numbers that are unknown are absent."""
    columns: dict[str, Any] = {
        "row": row.name,
        "title": row.title,
        "seeds": row.seeds,
        "missing": row.missing,
        "refused": row.refused,
        "reason": row.reason,
    }
    numbers = row.numbers
    if numbers is None:
        return columns
    columns["trainable_parameters"] = numbers.trainable_parameters
    columns["share_of_parameters"] = numbers.share_of_parameters
    values = {**numbers.scores, "entropy": numbers.entropy}
    values |= {f"dice_{mode}": dice for mode, dice in numbers.merged_dice.items()}
    for name, value in values.items():
        columns |= {name: value.mean, f"{name}_spread": value.spread}
    if numbers.costs is not None:
        for name in ("weight_seconds", "training_seconds", "peak_memory"):
            columns[name] = getattr(numbers.costs, name)
        for mode, seconds in numbers.costs.inference_seconds.items():
            columns[f"inference_{mode}"] = seconds
    return columns


def notes_on(rows: Sequence[StudyRow], runs: Sequence[RunNumbers]) -> list[str]:
    """What the numbers of a table are, under what load they were taken, and what is missing."""
    notes = [
        "Scores are means over the test images, then mean ± standard deviation over the seeds. "
        "Differences are taken seed by seed."
    ]
    costs = [run.costs for run in runs if run.costs is not None]
    if costs:
        notes.append(
            "Times are medians over the seeds, memory is the maximum. Training seconds are those "
            "of all steps of an epoch, steps for α included, per training image. "
            + _load_note(costs)
        )
    if any(run.image_dice for run in runs):
        notes.append(
            "All seeds share the test images, and a difference's interval knows the seeds only. "
            "± over images is its standard error over the images. A difference smaller than twice "
            "that may not hold on other images."
        )
    return notes + [f"{row.title}: {row.reason}." for row in rows if row.missing]


def _load_note(costs: Sequence[Costs]) -> str:
    threads, loads = max(own.threads for own in costs), [own.load for own in costs]
    note = (
        f"Times were taken with one run at a time, {threads} threads each on a machine of "
        f"{costs[0].processors} processors ({costs[0].device}), while its load average was "
        f"{min(loads):.1f} to {max(loads):.1f}"
    )
    # A run adds one to the load for each of its threads. Half a one covers the system.
    if max(loads) > threads + 0.5:
        return f"{note}: other work ran beside the runs, so the times are only roughly comparable."
    return f"{note}: little else ran beside the runs, so the times are comparable."
