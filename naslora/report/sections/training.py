"""Section "Training": curves of losses, scores and the learning rate, and a table of the epochs."""

from functools import partial

from matplotlib.axes import Axes

from naslora.report.curves import Curve, draw_curves, draw_epoch_axis
from naslora.report.figures import BLUE, GREEN, ORANGE, PURPLE, Drawing, figure_group
from naslora.report.html import details, note, section
from naslora.report.numbers import count, is_known, number
from naslora.report.tables import Table, html_table
from naslora.results import Epoch


def training_section(history: list[Epoch], kept: int | None) -> str:
    """The section.

    Args:
        history: one record an epoch; may be empty.
        kept: the epoch that the run kept, to be marked; None if unknown.
    """
    if not history:
        return section("Training", note("No epoch was finished, so there are no curves."))
    figures = figure_group(
        (
            Drawing("loss", "Loss by epoch.", partial(_draw_losses, history=history)),
            Drawing(
                "score",
                "Dice and IoU on the validation images by epoch. A star marks the kept epoch.",
                partial(_draw_scores, history=history, kept=kept),
            ),
            Drawing("rate", "Learning rate of the weights.", partial(_draw_rate, history=history)),
        )
    )
    return section("Training", figures + details("Every epoch as numbers", _epochs(history)))


def _draw_losses(axes: Axes, history: list[Epoch]) -> None:
    curves = (
        Curve("training", BLUE, [epoch.train_loss for epoch in history]),
        Curve("validation", ORANGE, [epoch.val_loss for epoch in history]),
        Curve("architecture", PURPLE, [epoch.arch_loss for epoch in history]),
    )
    draw_curves(axes, history, curves)
    axes.set_ylabel("loss")
    if axes.lines:
        axes.legend()
    draw_epoch_axis(axes, history)


def _draw_scores(axes: Axes, history: list[Epoch], kept: int | None) -> None:
    curves = (
        Curve("Dice", BLUE, [epoch.val_dice for epoch in history]),
        Curve("IoU", GREEN, [epoch.val_iou for epoch in history]),
    )
    draw_curves(axes, history, curves)
    dice = next((epoch.val_dice for epoch in history if epoch.epoch == kept), None)
    if kept is not None and is_known(dice):
        axes.plot(
            [kept],
            [dice],
            label=f"kept: epoch {kept}, Dice {dice:.4f}",
            zorder=3,
            color=ORANGE,
            marker="*",
            markersize=11,
            linestyle="none",
        )
    axes.set_ylabel("validation score")
    if axes.lines:
        axes.legend()
    draw_epoch_axis(axes, history)


def _draw_rate(axes: Axes, history: list[Epoch]) -> None:
    rates = [epoch.learning_rate for epoch in history]
    draw_curves(axes, history, [Curve("learning rate", BLUE, rates)])
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    # Moves the power of ten out of the way of the label of stage 2.
    axes.yaxis.offsetText.set_position((-0.16, 0))
    draw_epoch_axis(axes, history)


def _epochs(history: list[Epoch]) -> str:
    head = ["Epoch", "Stage", "Training loss", "Architecture loss", "Validation loss"]
    head += ["Validation Dice", "Validation IoU", "Learning rate", "Entropy"]
    head += ["Weight steps, s", "Architecture steps, s", "Evaluation, s"]
    rows = [
        [
            str(epoch.epoch),
            count(epoch.stage),
            number(epoch.train_loss),
            number(epoch.arch_loss),
            number(epoch.val_loss),
            number(epoch.val_dice),
            number(epoch.val_iou),
            number(epoch.learning_rate, ".2e"),
            number(epoch.entropy),
            number(epoch.seconds.weights, ".1f"),
            number(epoch.seconds.architecture, ".1f"),
            number(epoch.seconds.evaluation, ".1f"),
        ]
        for epoch in history
    ]
    return html_table(Table(head, rows))
