"""The numbers of a study over its seeds: one row a method or variant.

A row of the study is a row of table.csv: a dictionary of row, title, seeds, missing, refused,
reason, and, once a run is finished, of its numbers in parameters, shares, seconds and bytes. A
score has a mean over the seeds, NAME, and a standard deviation, NAME_spread.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from naslora.adapter.merging.report import MODES
from naslora.metrics import METRICS
from naslora.report.tables import Table, number
from naslora.results import CLICK_SCORES, RunNumbers

UNMERGED = "unmerged"

# ---- Numbers -------------------------------------------------------------------------------------


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


def _rounded_mean(values: Sequence[float]) -> int:
    return round(statistics.fmean(values))


class Column(NamedTuple):
    """A number of a run, and how tables show it."""

    title: str
    form: str = ".3f"
    scale: float = 1
    over: Callable[[Sequence[float]], float] | None = None
    """Makes one number of those of several runs; None for a score, which is averaged."""

    def cell(self, row: Mapping[str, Any], name: str) -> str:
        """The number, or the text, of the column ``name`` of table.csv; ``MISSING`` without."""
        value = row.get(name)
        if isinstance(value, str):
            return value
        scaled = None if value is None else self.scale * value
        return mean_text(MeanAndSpread(scaled, row.get(f"{name}_spread")), self.form)


COLUMNS = {
    "trainable_parameters": Column("Trainable, M", scale=1e-6, over=_rounded_mean),
    "share_of_parameters": Column("Of all, %", ".2f", 100, statistics.fmean),
    **{name: Column(METRICS[name].label) for name in ("dice", *METRICS)},
    **{name: Column(name) for name in CLICK_SCORES},
    "entropy": Column("Entropy of α"),
    "weight_seconds": Column("Weight steps, s/image", over=statistics.median),
    "training_seconds": Column("Training, s/image", over=statistics.median),
    "peak_memory": Column("Peak memory, MB", ",.0f", 1e-6, max),
    f"inference_{UNMERGED}": Column("Inference, s/image", over=statistics.median),
    **{f"inference_{mode}": Column(f"merged, {mode}", over=statistics.median) for mode in MODES},
}
MERGED = {"dice": Column("Dice"), **{f"dice_{mode}": Column(f"merged, {mode}") for mode in MODES}}
_OVER = {name: column.over for name, column in {**MERGED, **COLUMNS}.items()}
"""How the numbers of several runs become one; None for a score."""


def row_numbers(runs: Sequence[RunNumbers]) -> dict[str, Any]:
    """The numbers of a row's runs, by column of table.csv; none without a run."""
    found: dict[str, Any] = {}
    for name in runs[0].numbers if runs else ():
        values = [run.numbers.get(name) for run in runs]
        over = _OVER[name]
        if over is None:
            found[name], found[f"{name}_spread"] = mean_and_spread(values)
        else:
            found[name] = over([value for value in values if value is not None])
    return found


def pooled(parts: Sequence[RunNumbers]) -> RunNumbers:
    """The numbers of one row and seed over its folds: means, weighted by the folds' test images."""
    if len(parts) == 1:
        return parts[0]
    weights = [max(1, sum(dice is not None for dice in part.image_dice)) for part in parts]
    numbers: dict[str, int | float | None] = {}
    for name in parts[0].numbers:
        known = [v for part in parts if (v := part.numbers.get(name)) is not None]
        over = _OVER[name]
        if over is not None:
            numbers[name] = over(known)
        else:
            complete = len(known) == len(parts)
            numbers[name] = statistics.fmean(known, weights) if complete else None
    image_dice = [dice for part in parts for dice in part.image_dice]
    return RunNumbers(numbers, image_dice, parts[0].machine, max(part.load for part in parts))


# ---- Tables --------------------------------------------------------------------------------------


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
    shown = [
        name for name in columns if name in always or any(row.get(name) is not None for row in rows)
    ]
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
    timed = [run for run in runs if run.machine]
    if timed:
        loads = [run.load for run in timed]
        notes.append(
            "Times are medians over the seeds, memory is the maximum. Training seconds are those "
            "of all steps of an epoch, steps for α included, per training image. Times were taken "
            f"with one run at a time, {timed[0].machine} at a load average of {min(loads):.1f} to "
            f"{max(loads):.1f}. They compare only if little else ran beside the runs."
        )
    if any(run.image_dice for run in runs):
        notes.append(
            "All seeds share the test images. The interval over the images says what other images "
            "may change, that over the seeds what another training may change. Read the wider one."
        )
    return notes + [f"{row['title']}: {row['reason']}." for row in rows if row["missing"]]
