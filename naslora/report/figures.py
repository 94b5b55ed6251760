"""Figures: plots as inline SVG in the colours of the page, so that they follow light and dark."""

import io
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from naslora.files import replaced_file

STAGE_2_LABEL = "stage 2: architecture search"


# Name: (light, dark). Figures are drawn in the light values, which are then replaced by the
# variables; so no two light values may be equal.
PALETTE = {
    "page": ("#fcfcfd", "#14171c"),
    "card": ("#f1f4f7", "#1d2229"),
    "grid": ("#d9dee5", "#363d48"),
    "muted": ("#5a6573", "#a0abb8"),
    "ink": ("#1c2430", "#e5e9ef"),
    "blue": ("#2463b4", "#72adf5"),
    "orange": ("#bf5a0b", "#f2a055"),
    "green": ("#2b7a4b", "#62c48d"),
    "purple": ("#7747ad", "#bb98ee"),
}


INK, MUTED, GRID, BLUE, ORANGE, GREEN, PURPLE = (
    PALETTE[name][0] for name in ("ink", "muted", "grid", "blue", "orange", "green", "purple")
)


# One colour per family of operations, one dash per member, in the order of alpha.
OPERATION_LINES = (
    (BLUE, "-"),
    (BLUE, "--"),
    (ORANGE, "-"),
    (ORANGE, "--"),
    (GREEN, "-"),
    (GREEN, "--"),
    (PURPLE, "-"),
    (MUTED, ":"),
)


FIGURE_STYLE = {
    "svg.fonttype": "none",  # real text: small, selectable, in the font of the page
    "svg.hashsalt": "naslora",  # the same run gives the same bytes
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 3,
}


class Drawing(NamedTuple):
    """A plot."""

    name: str
    """Unique on its page, and its file's."""
    caption: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (4.6, 3)
    """In inches."""

    def save(self, path: Path) -> None:
        """Writes it as a PNG file."""
        with matplotlib.style.context(["default", FIGURE_STYLE]):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure.add_subplot())
            with replaced_file(path) as temporary:
                figure.savefig(temporary, format="png", dpi=150)


def svg_figure(
    name: str,
    caption: str,
    draw: Callable[[Axes], None],
    size: tuple[float, float] = (4.3, 3),
) -> str:
    """What ``draw`` puts on its axes, as a <figure> with inline SVG in the page's colours.

    Args:
        name: unique on the page; it keeps the ids of one drawing apart from another's.
        caption: plain text below the drawing, and its alternative text.
        draw: called once with the axes.
        size: width and height in inches.
    """
    with matplotlib.style.context(["default", FIGURE_STYLE]):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    # Inline, the drawing needs neither its preamble nor its namespaces, and its style sheet
    # would apply to the whole page.
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index(">", drawing.index("<svg")) + 1 :]
    drawing = re.sub(r"<style.*?</style>", "", drawing, count=1, flags=re.DOTALL)
    drawing = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", drawing)
    for variable, (light, _) in PALETTE.items():
        drawing = drawing.replace(light, f"var(--{variable})")
    width, height = (72 * inches for inches in size)
    caption = escape(caption)
    return (
        f'<figure><svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{caption}">'
        f"{drawing}<figcaption>{caption}</figcaption></figure>"
    )


def figure_group(*figures: str) -> str:
    return f'<div class="figures">{"".join(figures)}</div>'


def history_column(history: list[dict], key: str) -> np.ndarray:
    values = [row.get(key) for row in history]
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def epoch_axis(axes: Axes, history: list[dict]) -> None:
    """Whole epochs along the bottom, and a line where the architecture search begins."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    first = next((row["epoch"] for row in history if row.get("stage") == 2), None)
    if first is None:
        return
    # A point is the state after its epoch, so stage 2 begins half-way before its first point.
    position = first - 0.5
    axes.axvline(position, color=MUTED, linestyle="--", linewidth=1)
    on_the_left = position <= sum(axes.get_xlim()) / 2
    axes.text(
        position,
        1.02,
        STAGE_2_LABEL,
        transform=axes.get_xaxis_transform(),
        ha="left" if on_the_left else "right",
        va="bottom",
        fontsize=8,
        color=MUTED,
    )


def draw_lines(axes: Axes, history: list[dict], lines: dict[str, tuple[str, str, str]]) -> None:
    """Columns of the history by epoch; ``lines`` is column to (label, colour, line style)."""
    epochs = history_column(history, "epoch")
    marker = "o" if len(history) <= 40 else None
    for key, (label, colour, style) in lines.items():
        values = history_column(history, key)
        if np.isfinite(values).any():
            axes.plot(epochs, values, style, color=colour, marker=marker, label=label)
