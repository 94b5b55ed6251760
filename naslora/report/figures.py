"""Plots in one style, as inline SVG or PNG.

Inline SVG uses the CSS variables of the page for colours, so it follows the light and dark scheme.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from naslora.files import replaced_file
from naslora.results import Epoch

# Name: (light, dark). Plots are drawn in the light values. Then ``inline_svg`` replaces each of
# them by its CSS variable, so no two light values may be equal.
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
STAGE_2_LABEL = "stage 2: architecture search"
MOST_MARKERS = 40  # a curve of more points has no markers
Curves = Mapping[str, tuple[str, Sequence[float | None]]]
"""The colour of each line, and its numbers, by label."""


class Drawing(NamedTuple):
    """A plot."""

    name: str
    """Unique on its page. It is also the name of the PNG file."""
    caption: str
    """Plain text below the plot; the alternative text as well."""
    draw: Callable[[Axes], None]
    """Called once with the axes to draw on."""
    size: tuple[float, float] = (4.6, 3)
    """Width and height in inches."""

    def save(self, folder: Path) -> None:
        """Writes the plot as a PNG file, atomically."""
        path = folder / f"{self.name}.png"
        with replaced_file(path) as temporary:
            self._write(temporary, format="png", dpi=150)

    def svg(self) -> str:
        """The plot as an SVG document in the light colours."""
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self._write(buffer, format="svg", transparent=True, metadata=no_metadata)
        return buffer.getvalue()

    def _write(self, file: Path | io.StringIO, **options: Any) -> None:
        with matplotlib.style.context(["default", FIGURE_STYLE]):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure.add_subplot())
            figure.savefig(file, **options)

    def inline_svg(self) -> Markup:
        """What follows the tag <svg> within a page, in the colours of the page."""
        # The style sheet of the SVG would apply to the whole page.
        svg = self.svg()
        svg = svg[svg.index(">", svg.index("<svg")) + 1 :]
        svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)
        # The ids of one plot must differ from those of another.
        svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{self.name}-", svg)
        for variable, (light, _) in PALETTE.items():
            svg = svg.replace(light, f"var(--{variable})")
        return Markup(svg)


def draw_curves(axes: Axes, curves: Curves, xlabel: str, ylabel: str) -> None:
    """Lines over 1, 2, ...; one without any number is left out."""
    for label, (colour, values) in curves.items():
        known = np.array(values, float)  # None becomes NaN, which is not drawn
        if np.isfinite(known).any():
            marker = "o" if len(known) <= MOST_MARKERS else None
            places = np.arange(1, len(known) + 1)
            axes.plot(places, known, color=colour, marker=marker, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        axes.legend()


def row_drawing(
    name: str, caption: str, titles: Sequence[str], draw: Callable[[Axes], None]
) -> Drawing:
    """A plot with a row a title, from top to bottom; ``draw`` draws the rows at 0, 1, ..."""

    def draw_rows(axes: Axes) -> None:
        draw(axes)
        axes.set_yticks(range(len(titles)), titles)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(titles) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)

    return Drawing(name, caption, draw_rows, (4.6, 0.9 + 0.3 * len(titles)))


def draw_epoch_axis(axes: Axes, history: list[Epoch]) -> None:
    """Labels the horizontal axis with whole epochs and marks the start of stage 2."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    first = next((epoch.epoch for epoch in history if epoch.stage == 2), None)
    if first is None:
        return
    # A point is the state after its epoch, so stage 2 starts half an epoch before its first point.
    position = first - 0.5
    axes.axvline(position, color=MUTED, linestyle="--", linewidth=1)
    side = "left" if position <= sum(axes.get_xlim()) / 2 else "right"
    style: dict[str, Any] = {"ha": side, "va": "bottom", "fontsize": 8, "color": MUTED}
    axes.text(position, 1.02, STAGE_2_LABEL, transform=axes.get_xaxis_transform(), **style)
