"""Section "Merging": what folding the adapter into the weights costs, by way of merging."""

from functools import partial
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes

from naslora.adapter.merging.report import LayerError
from naslora.report.figures import BLUE, ORANGE, Drawing
from naslora.report.page import Part
from naslora.report.pictures import Panel
from naslora.report.sections.examples import merged_parts
from naslora.report.sections.operations import short_names
from naslora.report.tables import MISSING, Table, number, reduce_known
from naslora.results import Epoch, Keep, RunResult, SplitScores, kept_epoch

ROUNDING = 1e-4  # a smaller relative error is rounding, and no bar of it would be visible
MOST_NAMES = 32  # of layers, on an axis
ERRORS_NOTE = (
    "Update error: the change of a layer's output by merging, relative to what the adapter adds to "
    "that output. Output error: the same change, relative to the whole output. Both compare "
    "Frobenius norms; mean and max are over the layers."
)


def merging_parts(
    result: RunResult, history: list[Epoch], keep: Keep, panels: list[Panel], class_names: list[str]
) -> list[Part]:
    """A table of the ways of merging, pictures and errors; nothing if nothing was merged."""
    if not result.merge:
        return []
    before = (result.test_float32 or result.test).dice
    rows: list[list[str]] = []
    notes: list[Part] = []
    drawings: list[Part] = []
    for mode, merge in result.merge.items():
        notes += [f"{mode}: {text}." for text in (merge.refused, merge.warning) if text]
        if merge.refused:
            continue
        layers, after = merge.layers, result.test_merged[mode].dice
        difference = None if before is None or after is None else after - before
        update = [layer.update_error for layer in layers]
        output = [layer.output_error for layer in layers]
        held_out = [layer.held_out_error for layer in layers]
        folds = ((fmean, update), (max, update), (fmean, output), (max, output), (fmean, held_out))
        errors = [number(reduce_known(fold, values), ".3g") for fold, values in folds]
        dice = [number(before), number(after), number(difference, "+.4f")]
        rows.append([mode, *dice, *errors, merge.source or MISSING])
        worst = reduce_known(max, update)
        if worst is not None and worst < ROUNDING:
            notes.append(f"{mode}: errors are rounding, at most {number(worst, '.1e')}.")
        elif worst is not None:
            caption = f"Relative error of each layer after the merge ({mode})."
            draw = partial(_draw_merge_errors, layers=layers)
            drawings.append(Drawing(f"merge{len(rows)}", caption, draw))
    head = ["Mode", "Test Dice before", "Test Dice after", "Difference", "Update error, mean"]
    head += ["Update error, max", "Output error, mean", "Output error, max"]
    head += ["Update error on held-out tokens, mean", "Measured on"]
    annealing = [_annealing_table(result.annealed, history, keep)] if result.annealed else []
    pictures = merged_parts(panels, class_names)
    if result.test_float32:
        notes.append(
            "Test Dice is compared in float32, before and after merging. In the precision of the "
            f"training, the model before merging has {number(result.test.dice)}."
        )
    return [Table(head, rows), ERRORS_NOTE, *notes, *pictures, *annealing, *drawings]


def _annealing_table(merged: SplitScores, history: list[Epoch], keep: Keep) -> Table:
    """What annealing the cell cost on the validation images."""
    whole = [epoch for epoch in history if epoch.spatial == 1]
    named = [("kept epoch before annealing", kept_epoch(whole, keep))] if whole else []
    named += [("annealing", epoch) for epoch in history if 0 < epoch.spatial < 1]
    named.append(("kept epoch after annealing", kept_epoch(history, keep)))
    rows = [
        [name, str(epoch.epoch), number(epoch.spatial, ".2f")]
        + [number(score) for score in (epoch.val_dice, epoch.val_iou, epoch.val_loss)]
        for name, epoch in named
    ]
    scores = [number(score) for score in (merged.dice, merged.iou, merged.loss)]
    rows.append(["the same epoch, merged with center", MISSING, MISSING, *scores])
    head = ["Annealing", "Epoch", "Share of the neighbours", "Val Dice", "Val IoU", "Val loss"]
    return Table(head, rows)


def _draw_merge_errors(axes: Axes, layers: list[LayerError]) -> None:
    names = short_names([layer.name for layer in layers])
    places = np.arange(len(names))
    update = np.array([layer.update_error for layer in layers], float)  # None becomes NaN
    output = np.array([layer.output_error for layer in layers], float)
    axes.bar(places - 0.2, update, width=0.38, color=BLUE, label="update")
    axes.bar(places + 0.2, output, width=0.38, color=ORANGE, label="output")
    step = -(-len(names) // MOST_NAMES)
    rotation = 90 if max(map(len, names)) > 3 else 0
    axes.set_xticks(places[::step], names[::step], rotation=rotation)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="layer", ylabel="relative error")
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
