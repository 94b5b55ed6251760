"""Plots with one row for each method or variant, in the order of the table beside them."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from naslora.report.figures import BLUE, INK, ORANGE
from naslora.report.numbers import is_known
from naslora.results import MeanAndSpread

DOTS_CAPTION = "Test Dice: a dot for each seed, a line at the mean."


def plot_height(rows: int) -> float:
    """Height in inches of a plot with so many rows."""
    return 0.9 + 0.3 * rows


def draw_row_axis(axes: Axes, titles: Sequence[str]) -> None:
    """Labels the vertical axis with the rows' titles, from top to bottom."""
    axes.set_yticks(range(len(titles)), titles)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def draw_dice(axes: Axes, rows: Sequence[MeanAndSpread | None]) -> None:
    """Draws a dot for each seed and a line at the mean; nothing for None."""
    for place, dice in enumerate(rows):
        values = [value for value in dice.values if is_known(value)] if dice else []
        axes.plot(values, [place] * len(values), "o", color=BLUE, markersize=5, alpha=0.6)
        if dice and is_known(dice.mean):
            axes.vlines(dice.mean, place - 0.35, place + 0.35, color=ORANGE, linewidth=2)
    axes.set_xlabel("test Dice")
