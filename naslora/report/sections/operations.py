"""Section "Operations": which operations the search prefers (paper, Fig. C2).

The weight of an operation is its share in softmax(alpha).
"""

from functools import partial
from itertools import compress

import numpy as np
from matplotlib.axes import Axes

from naslora.report.figures import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    Drawing,
    draw_epoch_axis,
    draw_row_axis,
)
from naslora.report.page import Part
from naslora.report.tables import Table
from naslora.results import Epoch, OperationHistory

# One colour a family of operations, one dash a member, in the order of alpha.
OPERATION_LINES = [(colour, dash) for colour in (BLUE, ORANGE, GREEN) for dash in ("-", "--")]
OPERATION_LINES += [(PURPLE, "-"), (MUTED, ":")]


def operations_parts(operations: OperationHistory | None, history: list[Epoch]) -> list[Part]:
    """Plots of the weights, and a table of them by layer; nothing if ``operations`` is None."""
    if operations is None:
        return []
    names, layers = operations.operations, operations.layers
    path = np.array([state.softmax for state in operations.epochs])  # (epochs, layers, operations)
    steps = np.array([state.epoch for state in operations.epochs])
    last = int(steps[-1])
    return [
        Drawing(
            "mean",
            f"Mean weight over the {len(layers)} layers after epoch {last}. Thin lines span "
            "the range over the layers, dashed ones mark the mean at the start.",
            partial(_draw_mean_weights, names=names, start=path[0], weights=path[-1]),
        ),
        Drawing(
            "path",
            "Mean weight over the layers by epoch, from the start (epoch 0).",
            partial(_draw_path, names=names, history=history, steps=steps, path=path),
        ),
        *_heat_map(names, layers, path[0], path[-1], last),
    ]


def _draw_mean_weights(
    axes: Axes, names: list[str], start: np.ndarray, weights: np.ndarray
) -> None:
    mean, least, most = weights.mean(0), weights.min(0), weights.max(0)
    rows = np.arange(len(names))
    axes.barh(rows, mean, height=0.72, color=BLUE)
    axes.hlines(rows, least, most, color=INK, linewidth=1)
    for row, (value, end) in enumerate(zip(mean, most, strict=True)):
        text = f"{value:.3f}"
        axes.annotate(text, (end, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.vlines(
        start.mean(0), rows - 0.45, rows + 0.45, ORANGE, "--", linewidth=1, label="at the start"
    )
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    draw_row_axis(axes, names)
    axes.set_xlim(0, 1.18 * max(most.max(), start.mean(0).max()))  # room for the numbers
    axes.set_xlabel("mean of softmax(α) over the layers")


def _draw_path(
    axes: Axes, names: list[str], history: list[Epoch], steps: np.ndarray, path: np.ndarray
) -> None:
    lines = zip(names, OPERATION_LINES, path.mean(1).T, strict=True)
    for name, (colour, dash), weights in lines:
        alone = "o" if len(steps) == 1 else None  # a line needs two points to be seen
        axes.plot(steps, weights, dash, color=colour, marker=alone, label=name)
    axes.set_ylabel("mean weight")
    axes.figure.legend(loc="outside lower center", ncols=3, handlelength=2.6, columnspacing=1.2)
    draw_epoch_axis(axes, history)


def _heat_map(
    names: list[str], layers: list[str], start: np.ndarray, weights: np.ndarray, epoch: int
) -> list[Part]:
    """A table of layers by operations, tinted by how the weights changed since the start."""
    change = weights - start
    # A change below 0.01 is hardly a preference. The floor keeps the tint of it faint.
    reach = max(0.01, float(np.abs(change).max()))
    caption = (
        f"softmax(α) per layer after epoch {epoch}. Blue weights grew since the start, orange ones "
        f"shrank. The full tint is a change of {reach:.3f}."
    )
    rows = [
        [name, *(f"{weight:.3f}" for weight in own)]
        for name, own in zip(short_names(layers), weights, strict=True)
    ]
    tints = [
        # A tint of more than 60 percent would hide the number.
        [
            f"--hue: var(--{'blue' if v > 0 else 'orange'}); --heat: {60 * abs(v) / reach:.0f}%"
            for v in own
        ]
        for own in change
    ]
    return [caption, Table(["Layer", *names], rows, tints=tints)]


def short_names(names: list[str]) -> list[str]:
    """The parts in which dotted names differ; the names themselves if one has more parts."""
    parts = [name.split(".") for name in names]
    differs = [len(set(column)) > 1 for column in zip(*parts, strict=False)]
    short = [".".join(compress(part, differs)) for part in parts]
    return short if all(short) and len(set(map(len, parts))) == 1 else names
