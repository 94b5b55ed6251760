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
from naslora.report.tables import number, reduce_known
from naslora.results import CLICK_SCORES, RunNumbers

UNMERGED = "unmerged"


def mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean of one number a seed, None if one is unknown, and the standard deviation with n - 1
    degrees of freedom, None for a single seed."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None, None
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None


def mean_text(mean: float | None, spread: float | None, form: str = ".3f") -> str:
    """``mean ± spread`` for a table; the spread has three decimals."""
    return number(mean, form) + ("" if spread is None else f" ± {spread:.3f}")


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
        return mean_text(scaled, row.get(f"{name}_spread"), self.form)


COLUMNS = {
    "trainable_parameters": Column(
        "Trainable, M", scale=1e-6, over=lambda values: round(statistics.fmean(values))
    ),
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
        if over := _OVER[name]:
            found[name] = reduce_known(over, values)
        else:
            found[name], found[f"{name}_spread"] = mean_and_spread(values)
    return found


def pooled(parts: Sequence[RunNumbers]) -> RunNumbers:
    """The numbers of one row and seed over its folds: means, weighted by the folds' test images."""
    if len(parts) == 1:
        return parts[0]
    weights = [max(1, sum(dice is not None for dice in part.image_dice)) for part in parts]
    numbers: dict[str, int | float | None] = {}
    for name in parts[0].numbers:
        values = [part.numbers.get(name) for part in parts]
        known = [value for value in values if value is not None]
        if over := _OVER[name]:
            numbers[name] = reduce_known(over, values)
        else:
            numbers[name] = statistics.fmean(known, weights) if known == values else None
    image_dice = [dice for part in parts for dice in part.image_dice]
    return RunNumbers(numbers, image_dice, parts[0].machine, max(part.load for part in parts))
