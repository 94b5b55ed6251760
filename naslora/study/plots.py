"""The report of a study: headline cards, the tables, and plots of scores and costs."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from naslora.adapter.merging.report import MODES
from naslora.report.figures import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    PURPLE,
    Drawing,
    as_array,
    draw_row_axis,
    row_size,
)
from naslora.report.numbers import is_known
from naslora.report.page import Cards, Part, write_page
from naslora.report.tables import Table
from naslora.study.summary import COLUMNS, UNMERGED, PairedDifference, Runs

Rows = Sequence[Mapping[str, Any]]
"""Rows of table.csv."""

CARDS = {
    "dice": ("Highest test Dice", max, "{:.3f}"),
    "trainable_parameters": ("Fewest trained parameters", min, "{:.2f} M"),
    "training_seconds": ("Fastest training", min, "{:.3f} s/image"),
    "peak_memory": ("Least peak memory", min, "{:,.0f} MB"),
}


def write_comparison(
    path: Path,
    *,
    title: str,
    config: dict[str, Any],
    tables: Mapping[str, Table],
    rows: Rows,
    runs: Runs,
    notes: Sequence[str],
    reference: str,
    differences: Sequence[PairedDifference],
) -> None:
    """Writes the report of a study as one self-contained HTML file, atomically.

    Args:
        path: the file to write. Its folder is made if needed.
        title: title of the page.
        config: the recipe as JSON-ready values, shown whole.
        tables: tables by heading. A table without rows is left out.
        rows: as in table.csv.
        runs: the finished runs.
        notes: paragraphs below the first table, as plain text.
        reference: title of the method that the others are compared with.
        differences: what the others gain on it; those without an interval are not drawn.

    Raises:
        UserError: the file cannot be created.
        OSError: writing fails, for instance on a full disk. An older file then keeps its content.
    """
    cards = []
    for name, (label, choose, form) in CARDS.items():
        known = [row for row in rows if is_known(row.get(name))]
        if known:
            best = choose(known, key=itemgetter(name))
            cards.append((label, form.format(COLUMNS[name].scale * best[name]), best["title"]))
    (first, main), *others = tables.items()
    sections: dict[str, Sequence[Part]] = {
        first: [main, *notes],
        "Plots": [*_forest(reference, differences), *_drawings(rows, runs)],
        **{name: [table] for name, table in others if table.rows},
    }
    write_page(path, title, config, [Cards(cards)], sections)


def _forest(reference: str, differences: Sequence[PairedDifference]) -> list[Drawing]:
    """The forest plot of the differences; none without an interval."""
    drawn = [own for own in differences if own.low is not None]
    caption = (
        f"Test Dice minus that of {reference}, paired over the seeds: a dot for each seed, the "
        "mean, and its 95 % confidence interval."
    )
    draw = partial(_draw_forest, differences=drawn)
    return [Drawing("differences", caption, draw, row_size(len(drawn)))] if drawn else []


def _draw_forest(axes: Axes, differences: Sequence[PairedDifference]) -> None:
    axes.axvline(0, color=MUTED, linewidth=1)
    for place, difference in enumerate(differences):
        axes.plot(difference.values, [place] * len(difference.values), "o", color=BLUE, alpha=0.4)
        ends = as_array([difference.low, difference.high])
        axes.plot(ends, [place, place], color=ORANGE, linewidth=2)
        axes.plot(as_array([difference.mean]), [place], "D", color=ORANGE, markersize=6)
    draw_row_axis(axes, [difference.title for difference in differences])
    axes.set_xlabel("difference in test Dice")


def _drawings(rows: Rows, runs: Runs) -> list[Drawing]:
    """One line for each row that has the numbers."""
    drawings = []
    plots: list[tuple[str, str, str, Callable[[Axes, Rows], None]]] = [
        (
            "dice",
            "Test Dice: a dot for each seed, a line at the mean.",
            "trainable_parameters",
            partial(_draw_dice, runs=runs),
        ),
        (
            "training",
            "Seconds per training image of an epoch: weight steps, and steps for α.",
            "weight_seconds",
            _draw_training,
        ),
        (
            "inference",
            "Seconds of one image, before and after merging.",
            "weight_seconds",
            _draw_inference,
        ),
        (
            "memory",
            "Peak memory of the process that trained.",
            "weight_seconds",
            _draw_memory,
        ),
    ]
    for name, caption, needed, draw in plots:
        known = [row for row in rows if needed in row]
        if known:
            drawn = partial(_draw_rows, rows=known, draw=draw)
            drawings.append(Drawing(name, caption, drawn, row_size(len(known))))
    return drawings


def _draw_rows(axes: Axes, rows: Rows, draw: Callable[[Axes, Rows], None]) -> None:
    draw(axes, rows)
    draw_row_axis(axes, [row["title"] for row in rows])
    if axes.get_legend_handles_labels()[1]:
        axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, columnspacing=1)


def _column(rows: Rows, name: str) -> np.ndarray:
    return as_array(row.get(name) for row in rows)


def _draw_dice(axes: Axes, rows: Rows, runs: Runs) -> None:
    for place, row in enumerate(rows):
        dice = as_array(run.scores["dice"] for run in runs[row["row"]].values())
        axes.plot(dice, [place] * len(dice), "o", color=BLUE, markersize=5, alpha=0.6)
        axes.vlines(dice.mean(), place - 0.35, place + 0.35, color=ORANGE, linewidth=2)
    axes.set_xlabel("test Dice")


def _draw_training(axes: Axes, rows: Rows) -> None:
    weights = _column(rows, "weight_seconds")
    architecture = _column(rows, "training_seconds") - weights
    places = range(len(rows))
    axes.barh(places, weights, height=0.65, color=BLUE, label="weights")
    if (architecture > 0.005 * weights).any():
        axes.barh(places, architecture, 0.65, left=weights, color=PURPLE, label="α")
    axes.set_xlabel("seconds an image")


def _draw_inference(axes: Axes, rows: Rows) -> None:
    marks = ((BLUE, "o"), (ORANGE, "D"), (GREEN, "s"), (PURPLE, "^"))
    for mode, (colour, marker) in zip((UNMERGED, *MODES), marks, strict=True):
        seconds = _column(rows, f"inference_{mode}")
        if np.isfinite(seconds).any():
            places = range(len(rows))
            axes.plot(seconds, places, marker, color=colour, label=mode, markersize=5, alpha=0.8)
    axes.set_xlabel("seconds an image")
    axes.set_xlim(left=0)


def _draw_memory(axes: Axes, rows: Rows) -> None:
    memory = 1e-6 * _column(rows, "peak_memory")
    axes.barh(range(len(rows)), memory, height=0.65, color=GREEN)
    axes.set_xlabel("MB")
