"""Curves over the epochs of a run."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from naslora.report.figures import MUTED, as_array
from naslora.results import Epoch

STAGE_2_LABEL = "stage 2: architecture search"
MOST_MARKERS = 40  # a curve of more points has no markers


class Curve(NamedTuple):
    """A line in a plot over epochs."""

    label: str
    colour: str
    values: Iterable[float | None]
    """One number an epoch."""


def draw_curves(axes: Axes, history: list[Epoch], curves: Iterable[Curve]) -> None:
    """Draws the curves that have at least one known value."""
    epochs = as_array(epoch.epoch for epoch in history)
    for curve in curves:
        values = as_array(curve.values)
        if np.isfinite(values).any():
            axes.plot(
                epochs, values, color=curve.colour, marker=marker(len(history)), label=curve.label
            )


def marker(points: int) -> str | None:
    """The marker of a curve of that many points; None for no marker."""
    return "o" if points <= MOST_MARKERS else None


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
