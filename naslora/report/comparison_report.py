"""The report of a comparison: the table of methods, and what they cost, as pictures."""

from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from naslora.files import replaced_file
from naslora.report.figures import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    figure_group,
    history_column,
    svg_figure,
)
from naslora.report.html import html_table, is_known, note, section
from naslora.report.page import configuration, html_page, page_title


def write_comparison(
    path: Path,
    *,
    config: dict,
    tables: dict[str, tuple[list[str], list[list[str]]]],
    rows: list[dict],
    notes: list[str],
) -> None:
    """Writes the report of ``naslora compare`` as one self-contained HTML file, atomically.

    Args:
        path: the file to write.
        config: the recipe, shown whole; ``model`` and ``dataset`` (or ``data``) make the title.
        tables: heading to head and rows of text; one without rows is left out.
        rows: one dict a method, of ``naslora.study.compare.summarise``; what the figures show.
        notes: paragraphs below the tables.

    Raises:
        OSError: as ``write_report``.
    """
    title = page_title({**config, "method": f"{len(rows)} methods"})
    first, *others = [
        section(name, html_table(*table)) for name, table in tables.items() if table[1]
    ]
    body = _comparison_figures([row for row in rows if row["seeds"]])
    sections = (first, "".join(map(note, map(escape, notes))), body, *others)
    header = f"<h1>{escape(title)}</h1>{_best(rows)}"
    page = html_page(title, header, "".join(sections) + configuration(config))
    with replaced_file(Path(path)) as temporary:
        temporary.write_bytes(page.encode("utf-8", errors="xmlcharrefreplace"))


def _best(rows: list[dict]) -> str:
    """Cards: the method with the highest Dice, and with the least of what training costs."""
    cards = (
        ("Highest test Dice", "dice", max, ".3f", 1, ""),
        ("Fewest trained parameters", "trainable_parameters", min, ".2f", 1e-6, " M"),
        ("Fastest training", "training_seconds", min, ".3f", 1, " s/image"),
        ("Least peak memory", "peak_memory", min, ",.0f", 1e-6, " MB"),
    )
    body = ""
    for name, key, choose, form, factor, unit in cards:
        known = [row for row in rows if is_known(row.get(key))]
        if known:
            row = choose(known, key=lambda row: row[key])
            value = format(factor * row[key], form) + unit
            body += (
                f"<div><dt>{name}</dt><dd>{value}<small>{escape(row['title'])}</small></dd></div>"
            )
    return f'<dl class="headline">{body}</dl>'


def _comparison_figures(rows: list[dict]) -> str:
    if not rows:
        return ""
    height = 0.9 + 0.3 * len(rows)
    figures = {
        "dice": ("Test Dice: a dot for each seed, a line at the mean.", _draw_dice),
        "training": (
            "Seconds for each training image of an epoch: weight steps, and steps for α.",
            _draw_training,
        ),
        "inference": ("Seconds of one image, before and after merging.", _draw_inference),
        "memory": ("Peak memory of the process that trained.", _draw_memory),
    }
    drawings = [
        svg_figure(name, caption, partial(_draw_by_method, rows=rows, draw=draw), (4.6, height))
        for name, (caption, draw) in figures.items()
    ]
    return section("Pictures", figure_group(*drawings))


def _draw_by_method(axes: Axes, rows: list[dict], draw: Callable[[Axes, list[dict]], None]) -> None:
    """Methods from top to bottom, in the order of the table."""
    draw(axes, rows)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, columnspacing=1)


def _draw_dice(axes: Axes, rows: list[dict]) -> None:
    for place, row in enumerate(rows):
        values = [value for value in row["dice_values"] if is_known(value)]
        axes.plot(values, [place] * len(values), "o", color=BLUE, markersize=5, alpha=0.6)
        if is_known(row["dice"]):
            axes.vlines(row["dice"], place - 0.35, place + 0.35, color=ORANGE, linewidth=2)
    axes.set_xlabel("test Dice")


def _draw_training(axes: Axes, rows: list[dict]) -> None:
    places, weights = range(len(rows)), history_column(rows, "weight_seconds")
    architecture = history_column(rows, "training_seconds") - weights
    axes.barh(places, weights, height=0.65, color=BLUE, label="weights")
    if (architecture > 0.005 * weights).any():
        axes.barh(places, architecture, 0.65, left=weights, color=PURPLE, label="α")
    axes.set_xlabel("seconds an image")


def _draw_inference(axes: Axes, rows: list[dict]) -> None:
    marks = {
        "unmerged": ("unmerged", BLUE, "o"),
        "exact": ("exact", ORANGE, "D"),
        "center": ("center", GREEN, "s"),
        "calibrated": ("calibrated", PURPLE, "^"),
    }
    for mode, (label, colour, marker) in marks.items():
        seconds = history_column(rows, f"inference_{mode}")
        if np.isfinite(seconds).any():
            style = {"marker": marker, "markersize": 5, "linestyle": "none", "alpha": 0.8}
            axes.plot(seconds, range(len(rows)), color=colour, label=label, **style)
    axes.set_xlabel("seconds an image")
    axes.set_xlim(left=0)


def _draw_memory(axes: Axes, rows: list[dict]) -> None:
    axes.barh(
        range(len(rows)), 1e-6 * history_column(rows, "peak_memory"), height=0.65, color=GREEN
    )
    axes.set_xlabel("MB")
