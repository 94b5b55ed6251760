"""The numbers of a study over its seeds: one row a method or variant.

A row of the study is a row of table.csv: a dictionary of row, title, seeds, missing, refused,
reason, and, once a run is finished, of its numbers in parameters, shares, seconds and bytes. A
score has a mean over the seeds, NAME, and a standard deviation, NAME_spread.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from naslora.adapter.merging.report import MODES
from naslora.metrics import METRICS
from naslora.report.tables import Table, number
from naslora.results import CLICK_SCORES, Costs, RunNumbers

UNMERGED = "unmerged"

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
        over = pooled_costs(costs)
        found |= {name: getattr(over, name) for name in ("weight_seconds", "training_seconds")}
        found["peak_memory"] = over.peak_memory
        found |= {f"inference_{mode}": value for mode, value in over.inference_seconds.items()}
    return found


def pooled(parts: Sequence[RunNumbers]) -> RunNumbers:
    """The numbers of one row and seed over its folds: means, weighted by the folds' test images."""
    if len(parts) == 1:
        return parts[0]
    images = [part.image_dice or [None] for part in parts]
    weights = [max(1, sum(dice is not None for dice in own)) for own in images]

    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known, weights) if len(known) == len(weights) else None

    first, costs = parts[0], [part.costs for part in parts if part.costs is not None]
    return replace(
        first,
        trainable_parameters=round(statistics.fmean(part.trainable_parameters for part in parts)),
        scores={name: mean(part.scores.get(name) for part in parts) for name in first.scores},
        merged_dice={
            mode: mean(part.merged_dice.get(mode) for part in parts) for mode in first.merged_dice
        },
        entropy=mean(part.entropy for part in parts),
        image_dice=[dice for own in images for dice in own],
        costs=pooled_costs(costs) if costs else None,
    )


def pooled_costs(costs: Sequence[Costs]) -> Costs:
    """Medians of the seconds, and the largest memory and load."""
    return replace(
        costs[0],
        weight_seconds=statistics.median(own.weight_seconds for own in costs),
        training_seconds=statistics.median(own.training_seconds for own in costs),
        peak_memory=max(own.peak_memory for own in costs),
        inference_seconds={
            mode: statistics.median(own.inference_seconds.get(mode, math.nan) for own in costs)
            for mode in costs[0].inference_seconds
        },
        load=max(own.load for own in costs),
    )


# ---- Tables --------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of a table to read."""

    title: str
    form: str = ".3f"
    scale: float = 1

    def cell(self, row: Mapping[str, Any], name: str) -> str:
        """The number, or the text, of the column ``name`` of table.csv; ``MISSING`` without."""
        value = row.get(name)
        if isinstance(value, str):
            return value
        scaled = None if value is None else self.scale * value
        return mean_text(MeanAndSpread(scaled, row.get(f"{name}_spread")), self.form)


COLUMNS = {
    "trainable_parameters": Column("Trainable, M", scale=1e-6),
    "share_of_parameters": Column("Of all, %", ".2f", 100),
    **{name: Column(METRICS[name].label) for name in ("dice", *METRICS)},
    **{name: Column(name) for name in CLICK_SCORES},
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
            "All seeds share the test images. The interval over the images says what other images "
            "may change, that over the seeds what another training may change. Read the wider one."
        )
    return notes + [f"{row['title']}: {row['reason']}." for row in rows if row["missing"]]
