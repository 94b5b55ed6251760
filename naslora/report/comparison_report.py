"""The report of a comparison: the table of methods, and plots of their scores and costs."""

from collections.abc import Callable, Mapping, Sequence
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
from naslora.report.page import configuration, page_title, write_page
from naslora.report.row_plots import DOTS_CAPTION, draw_dice, draw_row_axis, plot_height
from naslora.report.tables import Table, html_table
from naslora.results import ComparisonRow, MethodNumbers, PairedDifference

Titled = Mapping[str, MethodNumbers]
"""The numbers of the methods that have any, by title, in the order of the table."""


def write_comparison(
    path: Path,
    *,
    config: dict[str, Any],
    tables: Mapping[str, Table],
    rows: Sequence[ComparisonRow],
    notes: Sequence[str],
    reference: str,
    differences: Sequence[PairedDifference],
) -> None:
    """Writes the report of ``naslora compare`` as one self-contained HTML file, atomically.

    Args:
        path: the file to write. Its folder is made if needed.
        config: the recipe as JSON-ready values, shown whole. ``model`` and ``dataset`` (or
            ``data``) make the title.
        tables: tables by heading; at least one has rows. A table without rows is left out.
        rows: one record a method, for the cards and the plots.
        notes: paragraphs below the first table, as plain text.
        reference: title of the method that the others are compared with.
        differences: what the others gain on it; those without an interval are not drawn.

    Raises:
        UserError: the file cannot be created.
        OSError: writing fails, for instance on a full disk. An older file then keeps its content.
    """
    title = page_title({**config, "method": f"{len(rows)} methods"})
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
    dice = {title: numbers.dice.mean for title, numbers in known.items()}
    trained = {title: 1e-6 * numbers.trainable_parameters for title, numbers in known.items()}
    seconds = {title: numbers.training_seconds for title, numbers in known.items()}
    memory = {title: 1e-6 * numbers.peak_memory for title, numbers in known.items()}
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


def _plots(known: Titled) -> list[Drawing]:
    if not known:
        return []
    plots = (
        ("dice", DOTS_CAPTION, _draw_dice),
        (
            "training",
            "Seconds per training image of an epoch: weight steps, and steps for α.",
            _draw_training,
        ),
        ("inference", "Seconds of one image, before and after merging.", _draw_inference),
        ("memory", "Peak memory of the process that trained.", _draw_memory),
    )
    size = (4.6, plot_height(len(known)))
    return [
        Drawing(name, caption, partial(_draw_by_method, known=known, draw=draw), size)
        for name, caption, draw in plots
    ]


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


def _draw_by_method(
    axes: Axes, known: Titled, draw: Callable[[Axes, list[MethodNumbers]], None]
) -> None:
    draw(axes, list(known.values()))
    draw_row_axis(axes, list(known))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, columnspacing=1)


def _draw_dice(axes: Axes, methods: list[MethodNumbers]) -> None:
    draw_dice(axes, [numbers.dice for numbers in methods])


def _draw_training(axes: Axes, methods: list[MethodNumbers]) -> None:
    places = range(len(methods))
    weights = as_array(numbers.weight_seconds for numbers in methods)
    architecture = as_array(numbers.training_seconds for numbers in methods) - weights
    axes.barh(places, weights, height=0.65, color=BLUE, label="weights")
    if (architecture > 0.005 * weights).any():
        axes.barh(places, architecture, 0.65, left=weights, color=PURPLE, label="α")
    axes.set_xlabel("seconds an image")


def _draw_inference(axes: Axes, methods: list[MethodNumbers]) -> None:
    marks = {
        "unmerged": (BLUE, "o"),
        "exact": (ORANGE, "D"),
        "center": (GREEN, "s"),
        "calibrated": (PURPLE, "^"),
    }
    for mode, (colour, marker) in marks.items():
        seconds = as_array(numbers.inference_seconds.get(mode) for numbers in methods)
        if np.isfinite(seconds).any():
            axes.plot(
                seconds,
                range(len(methods)),
                color=colour,
                label=mode,
                marker=marker,
                markersize=5,
                linestyle="none",
                alpha=0.8,
            )
    axes.set_xlabel("seconds an image")
    axes.set_xlim(left=0)


def _draw_memory(axes: Axes, methods: list[MethodNumbers]) -> None:
    memory = 1e-6 * as_array(numbers.peak_memory for numbers in methods)
    axes.barh(range(len(methods)), memory, height=0.65, color=GREEN)
    axes.set_xlabel("MB")
