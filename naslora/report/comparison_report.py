"""The report of a study: the table of its rows, and plots of their scores and costs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from naslora.report.figures import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    PURPLE,
    Drawing,
    as_array,
    figure_group,
)
from naslora.report.html import card, note, section
from naslora.report.numbers import is_known
from naslora.report.page import configuration, write_page
from naslora.report.row_plots import DOTS_CAPTION, draw_dice, draw_row_axis, plot_height
from naslora.report.tables import Table, html_table
from naslora.results import Costs, PairedDifference, RowNumbers, StudyRow

Titled = Mapping[str, RowNumbers]
"""The numbers of the methods that have any, by title, in the order of the table."""


def write_comparison(
    path: Path,
    *,
    title: str,
    config: dict[str, Any],
    tables: Mapping[str, Table],
    rows: Sequence[StudyRow],
    notes: Sequence[str],
    reference: str,
    differences: Sequence[PairedDifference],
) -> None:
    """Writes the report of a study as one self-contained HTML file, atomically.

    Args:
        path: the file to write. Its folder is made if needed.
        title: title of the page.
        config: the recipe as JSON-ready values, shown whole.
        tables: tables by heading; at least one has rows. A table without rows is left out.
        rows: one record a row, for the cards and the plots.
        notes: paragraphs below the first table, as plain text.
        reference: title of the method that the others are compared with.
        differences: what the others gain on it; those without an interval are not drawn.

    Raises:
        UserError: the file cannot be created.
        OSError: writing fails, for instance on a full disk. An older file then keeps its content.
    """
    first, *others = [
        section(name, html_table(table)) for name, table in tables.items() if table.rows
    ]
    known = {row.title: row.numbers for row in rows if row.numbers is not None}
    forest = _forest(reference, [d for d in differences if d.low is not None])
    drawings = [*forest, *_plots(known)]
    plots = section("Plots", figure_group(drawings)) if drawings else ""
    paragraphs = "".join(note(escape(text)) for text in notes)
    header = f'<h1>{escape(title)}</h1><dl class="headline">{_best(known)}</dl>'
    body = "".join((first, paragraphs, plots, *others, configuration(config)))
    write_page(path, title, header, body)


def _best(known: Titled) -> str:
    """Cards with the method of the highest Dice, and those of the lowest costs."""
    dice = {title: numbers.scores["dice"].mean for title, numbers in known.items()}
    trained = {title: 1e-6 * numbers.trainable_parameters for title, numbers in known.items()}
    costs = _costs(known)
    seconds = {title: own.training_seconds for title, own in costs.items()}
    memory = {title: 1e-6 * own.peak_memory for title, own in costs.items()}
    return (
        _best_card("Highest test Dice", dice, max, "{:.3f}")
        + _best_card("Fewest trained parameters", trained, min, "{:.2f} M")
        + _best_card("Fastest training", seconds, min, "{:.3f} s/image")
        + _best_card("Least peak memory", memory, min, "{:,.0f} MB")
    )


def _best_card(
    name: str, values: Mapping[str, float | None], choose: Callable[..., str], form: str
) -> str:
    """A card with the title that ``choose`` picks by its value; empty if none is known."""
    by_title = {title: value for title, value in values.items() if is_known(value)}
    if not by_title:
        return ""
    title = choose(by_title, key=by_title.__getitem__)
    return card(name, form.format(by_title[title]), escape(title))


def _costs(known: Titled) -> dict[str, Costs]:
    return {title: own.costs for title, own in known.items() if own.costs is not None}


def _plots(known: Titled) -> list[Drawing]:
    dice = partial(draw_dice, rows=[numbers.scores["dice"] for numbers in known.values()])
    drawings = [_by_row("dice", DOTS_CAPTION, dice, known)] if known else []
    costs = _costs(known)
    for name, caption, draw in (
        (
            "training",
            "Seconds per training image of an epoch: weight steps, and steps for α.",
            _draw_training,
        ),
        ("inference", "Seconds of one image, before and after merging.", _draw_inference),
        ("memory", "Peak memory of the process that trained.", _draw_memory),
    ):
        if costs:
            drawings.append(_by_row(name, caption, partial(draw, costs=[*costs.values()]), costs))
    return drawings


def _by_row(
    name: str, caption: str, draw: Callable[[Axes], None], titles: Collection[str]
) -> Drawing:
    """A plot with one line for each title."""
    drawn = partial(_draw_rows, titles=list(titles), draw=draw)
    return Drawing(name, caption, drawn, (4.6, plot_height(len(titles))))


def _draw_rows(axes: Axes, titles: list[str], draw: Callable[[Axes], None]) -> None:
    draw(axes)
    draw_row_axis(axes, titles)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, columnspacing=1)


def _forest(reference: str, differences: Sequence[PairedDifference]) -> list[Drawing]:
    """The forest plot of the differences; none without an interval."""
    if not differences:
        return []
    caption = (
        f"Test Dice minus that of {reference}, paired over the seeds: a dot for each seed, the "
        "mean, and its 95 % confidence interval."
    )
    draw = partial(_draw_forest, differences=differences)
    return [Drawing("differences", caption, draw, (4.6, plot_height(len(differences))))]


def _draw_forest(axes: Axes, differences: Sequence[PairedDifference]) -> None:
    axes.axvline(0, color=MUTED, linewidth=1)
    for place, difference in enumerate(differences):
        axes.plot(difference.values, [place] * len(difference.values), "o", color=BLUE, alpha=0.4)
        ends = as_array([difference.low, difference.high])
        axes.plot(ends, [place, place], color=ORANGE, linewidth=2)
        axes.plot(as_array([difference.mean]), [place], "D", color=ORANGE, markersize=6)
    draw_row_axis(axes, [difference.title for difference in differences])
    axes.set_xlabel("difference in test Dice")


def _draw_training(axes: Axes, costs: list[Costs]) -> None:
    places = range(len(costs))
    weights = as_array(own.weight_seconds for own in costs)
    architecture = as_array(own.training_seconds for own in costs) - weights
    axes.barh(places, weights, height=0.65, color=BLUE, label="weights")
    if (architecture > 0.005 * weights).any():
        axes.barh(places, architecture, 0.65, left=weights, color=PURPLE, label="α")
    axes.set_xlabel("seconds an image")


def _draw_inference(axes: Axes, costs: list[Costs]) -> None:
    marks = {
        "unmerged": (BLUE, "o"),
        "exact": (ORANGE, "D"),
        "center": (GREEN, "s"),
        "calibrated": (PURPLE, "^"),
    }
    for mode, (colour, marker) in marks.items():
        seconds = as_array(own.inference_seconds.get(mode) for own in costs)
        if np.isfinite(seconds).any():
            axes.plot(
                seconds,
                range(len(costs)),
                color=colour,
                label=mode,
                marker=marker,
                markersize=5,
                linestyle="none",
                alpha=0.8,
            )
    axes.set_xlabel("seconds an image")
    axes.set_xlim(left=0)


def _draw_memory(axes: Axes, costs: list[Costs]) -> None:
    memory = 1e-6 * as_array(own.peak_memory for own in costs)
    axes.barh(range(len(costs)), memory, height=0.65, color=GREEN)
    axes.set_xlabel("MB")
