"""Section "Operations": which operations the search prefers (paper, Fig. C2).

The weight of an operation is its share in softmax(alpha).
"""

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
    row_drawing,
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
    path = np.array([state.softmax for state in operations.epochs])  # (epochs, layers, operations)
    plots = [_means(operations, path), _path(operations, path, history)]
    return [*plots, *_heat_map(operations, path)]


def _means(operations: OperationHistory, path: np.ndarray) -> Drawing:
    start, weights = path[0].mean(0), path[-1]
    mean, least, most = weights.mean(0), weights.min(0), weights.max(0)
    rows = np.arange(len(mean))

    def draw(axes: Axes) -> None:
        axes.barh(rows, mean, height=0.72, color=BLUE)
        axes.hlines(rows, least, most, color=INK, linewidth=1)
        for row, (value, end) in enumerate(zip(mean, most, strict=True)):
            axes.text(end, row, f"  {value:.3f}", va="center", fontsize=8)
        axes.vlines(
            start, rows - 0.45, rows + 0.45, ORANGE, "--", linewidth=1, label="at the start"
        )
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
        axes.set_xlim(0, 1.18 * max(most.max(), start.max()))  # room for the numbers
        axes.set_xlabel("mean of softmax(α) over the layers")

    caption = (
        f"Mean weight over the {len(weights)} layers after epoch {operations.epochs[-1].epoch}. "
        "Thin lines span the range over the layers, dashed ones mark the mean at the start."
    )
    return row_drawing("mean", caption, operations.operations, draw)


def _path(operations: OperationHistory, path: np.ndarray, history: list[Epoch]) -> Drawing:
    steps = [state.epoch for state in operations.epochs]

    def draw(axes: Axes) -> None:
        alone = "o" if len(steps) == 1 else None  # a line needs two points to be seen
        lines = zip(operations.operations, OPERATION_LINES, path.mean(1).T, strict=True)
        for name, (colour, dash), weights in lines:
            axes.plot(steps, weights, dash, color=colour, marker=alone, label=name)
        axes.set_ylabel("mean weight")
        style = {"ncols": 3, "handlelength": 2.6, "columnspacing": 1.2}
        axes.figure.legend(loc="outside lower center", **style)
        draw_epoch_axis(axes, history)

    return Drawing("path", "Mean weight over the layers by epoch, from the start (epoch 0).", draw)


def _heat_map(operations: OperationHistory, path: np.ndarray) -> list[Part]:
    """A table of layers by operations, tinted by how the weights changed since the start."""
    change = path[-1] - path[0]
    # A change below 0.01 is hardly a preference. The floor keeps the tint of it faint.
    reach = max(0.01, float(np.abs(change).max()))
    caption = (
        f"softmax(α) per layer after epoch {operations.epochs[-1].epoch}. Blue weights grew since "
        f"the start, orange ones shrank. The full tint is a change of {reach:.3f}."
    )
    names = short_names(operations.layers)
    rows = [[n, *(f"{v:.3f}" for v in own)] for n, own in zip(names, path[-1], strict=True)]
    # A tint of more than 60 percent would hide the number.
    hues, heats = np.where(change > 0, "blue", "orange"), 60 * np.abs(change) / reach
    tints = [
        [f"--hue: var(--{hue}); --heat: {heat:.0f}%" for hue, heat in zip(*own, strict=True)]
        for own in zip(hues, heats, strict=True)
    ]
    return [caption, Table(["Layer", *operations.operations], rows, tints=tints)]


def short_names(names: list[str]) -> list[str]:
    """The parts in which dotted names differ; the names themselves if one has more parts."""
    parts = [name.split(".") for name in names]
    differs = [len(set(column)) > 1 for column in zip(*parts, strict=False)]
    short = [".".join(compress(part, differs)) for part in parts]
    return short if all(short) and len(set(map(len, parts))) == 1 else names
