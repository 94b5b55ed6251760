"""Section "Training": curves of losses and scores, and a table of the epochs."""

from functools import partial

from matplotlib.axes import Axes

from naslora.report.figures import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    Curves,
    Drawing,
    draw_curves,
    draw_epoch_axis,
)
from naslora.report.numbers import is_known, number
from naslora.report.page import Folded, Part
from naslora.report.tables import Table
from naslora.results import Epoch


def training_parts(history: list[Epoch], kept: int | None) -> list[Part]:
    """Curves and a table.

    Args:
        history: one record an epoch; may be empty.
        kept: the epoch that the run kept, to be marked; None if unknown.
    """
    if not history:
        return ["No epoch was finished, so there are no curves."]
    scores = "Dice and IoU on the validation images by epoch. A star marks the kept epoch."
    return [
        Drawing("loss", "Loss by epoch.", partial(_draw_losses, history=history)),
        Drawing("score", scores, partial(_draw_scores, history=history, kept=kept)),
        Folded("Every epoch as numbers", _epochs(history)),
    ]


def _draw_losses(axes: Axes, history: list[Epoch]) -> None:
    curves: Curves = {
        "training": (BLUE, [epoch.train_loss for epoch in history]),
        "validation": (ORANGE, [epoch.val_loss for epoch in history]),
        "architecture": (PURPLE, [epoch.arch_loss for epoch in history]),
    }
    draw_curves(axes, history, curves)
    axes.set_ylabel("loss")
    if axes.lines:
        axes.legend()
    draw_epoch_axis(axes, history)


def _draw_scores(axes: Axes, history: list[Epoch], kept: int | None) -> None:
    curves: Curves = {
        "Dice": (BLUE, [epoch.val_dice for epoch in history]),
        "IoU": (GREEN, [epoch.val_iou for epoch in history]),
    }
    draw_curves(axes, history, curves)
    dice = next((epoch.val_dice for epoch in history if epoch.epoch == kept), None)
    if kept is not None and is_known(dice):
        label = f"kept: epoch {kept}, Dice {dice:.4f}"
        axes.plot([kept], [dice], "*", label=label, zorder=3, color=ORANGE, markersize=11)
    axes.set_ylabel("validation score")
    if axes.lines:
        axes.legend()
    draw_epoch_axis(axes, history)


def _epochs(history: list[Epoch]) -> Table:
    head = ["Epoch", "Stage", "Training loss", "Architecture loss", "Validation loss"]
    head += ["Validation Dice", "Validation IoU", "Learning rate", "Entropy"]
    head += ["Weight steps, s", "Architecture steps, s", "Evaluation, s"]
    rows = []
    for epoch in history:
        scores = (epoch.train_loss, epoch.arch_loss, epoch.val_loss, epoch.val_dice, epoch.val_iou)
        seconds = (epoch.seconds.weights, epoch.seconds.architecture, epoch.seconds.evaluation)
        row = [str(epoch.epoch), str(epoch.stage), *map(number, scores)]
        row += [number(epoch.learning_rate, ".2e"), number(epoch.entropy)]
        rows.append(row + [number(value, ".1f") for value in seconds])
    return Table(head, rows)
