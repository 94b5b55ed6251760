"""Plots as inline SVG or PNG.

Inline SVG uses the CSS variables of the page for colours, so it follows the light and dark scheme.
"""

import io
import re
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from naslora.files import replaced_file

# Name: (light, dark). Plots are drawn in the light values. Then svg_figure replaces each of them by
# its CSS variable, so no two light values may be equal.
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


class Drawing(NamedTuple):
    """A plot."""

    name: str
    """Unique on its page. It is also the name of the PNG file."""
    caption: str
    """Plain text below the plot; the alternative text as well."""
    draw: Callable[[Axes], None]
    """Called once with the axes to draw on."""
    size: tuple[float, float] = (4.3, 3)
    """Width and height in inches."""

    def save(self, path: Path) -> None:
        """Writes the plot as a PNG file, atomically."""
        with matplotlib.style.context(["default", FIGURE_STYLE]), replaced_file(path) as temporary:
            self._figure().savefig(temporary, format="png", dpi=150)

    def svg(self) -> str:
        """The plot as an SVG document in the light colours."""
        with matplotlib.style.context(["default", FIGURE_STYLE]):
            buffer = io.StringIO()
            no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            self._figure().savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
        return buffer.getvalue()

    def _figure(self) -> Figure:
        figure = Figure(figsize=self.size, layout="constrained")
        self.draw(figure.add_subplot())
        return figure


def svg_figure(drawing: Drawing) -> str:
    """The plot as a <figure> with inline SVG in the colours of the page."""
    # Inside a page, the SVG needs neither its preamble nor its namespaces, and its style sheet
    # would apply to the whole page.
    svg = drawing.svg()
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :]
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)
    # The ids of one plot must differ from those of another.
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{drawing.name}-", svg)
    for variable, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{variable})")
    width, height = (72 * inches for inches in drawing.size)
    caption = escape(drawing.caption)
    return (
        f'<figure><svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{caption}">'
        f"{svg}<figcaption>{caption}</figcaption></figure>"
    )


def figure_group(figures: Iterable[Drawing]) -> str:
    """Plots side by side, as many in a line as fit."""
    return f'<div class="figures">{"".join(map(svg_figure, figures))}</div>'


def as_array(values: Iterable[float | None]) -> np.ndarray:
    """(N,) float64 of N numbers; None becomes NaN, which is not drawn."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)
