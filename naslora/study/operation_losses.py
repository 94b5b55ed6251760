"""Whether the search finds operations that matter: what moving their weight to `skip` costs.

Each layer's chosen operation is the one with the largest weight, `skip` excepted. Its weight is
moved to `skip`, in one layer or in all, and the validation images are scored again. Random
operations, drawn among the others of each layer, are the control.

operation_losses.csv    one row a layer, one for all layers, and one a draw
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from naslora.adapter.layer.cell import LEFT_OUT
from naslora.adapter.layer.modules import adapter_layers
from naslora.errors import UserError
from naslora.records import write_rows
from naslora.report.figures import BLUE, INK, MUTED, ORANGE, Drawing, row_drawing
from naslora.report.sections.operations import short_names
from naslora.sam.segmentation import SamForSegmentation
from naslora.trained import evaluate_model
from naslora.training.progress import with_progress
from naslora.training.run_config import RunConfig
from naslora.training.run_data import find_splits
from naslora_kernels import OPERATIONS
from naslora_kernels.operations import SKIP

RANDOM_DRAWS = 5
ALL_LAYERS = "all layers"


@dataclass(frozen=True)
class OperationLoss:
    """A row of operation_losses.csv: validation Dice that is lost when weights move to `skip`."""

    layer: str
    """The layer, ``ALL_LAYERS``, or the random draw over all layers."""
    operation: str | None
    """The operation that loses its weight; None for all layers, which may have different ones."""
    weight: float
    """The weight that moves, a mean over the layers."""
    dice_lost: float
    """Dice of the trained model minus that of the changed one."""


def write_operation_losses(model: SamForSegmentation, config: RunConfig, output: Path) -> Drawing:
    """Measures what the chosen operations, and random ones, are worth on the validation images.

    The layers of the trained model have cells. ``output`` is the folder for operation_losses.csv.

    Raises:
        UserError: no validation image has a foreground to score.
    """
    samples = find_splits(config)["val"]
    alphas = {name: layer.alpha for name, layer in adapter_layers(model) if layer.alpha is not None}
    weights = {name: alpha.detach().double().softmax(0) for name, alpha in alphas.items()}

    def dice(operations: Mapping[str, int]) -> float:
        before = {name: alphas[name].detach().clone() for name in operations}
        with torch.no_grad():
            for name, index in operations.items():
                alphas[name].copy_(moved_to_skip(before[name], index))
            found = evaluate_model(model, config, samples).dice
            for name, alpha in before.items():
                alphas[name].copy_(alpha)
        if found is None:
            raise UserError("no validation image has a foreground, so no operation can be scored")
        return found

    whole, rows = dice({}), []
    for layer, operation, moved in with_progress(_cases(weights), "moving weights to skip"):
        weight = sum(float(weights[name][index]) for name, index in moved.items())
        lost = whole - dice(moved)
        rows.append(OperationLoss(layer, operation, weight / max(len(moved), 1), lost))
    write_rows(output / "operation_losses.csv", rows)
    lost_by_chosen = next(row.dice_lost for row in rows if row.layer == ALL_LAYERS)
    lost_by_random = np.mean([row.dice_lost for row in rows[-RANDOM_DRAWS:]])
    caption = (
        "Validation Dice lost when the weight of the chosen operation moves to skip, in one layer "
        f"or in all ({lost_by_chosen:.4f}), and when that of a random other operation does in all "
        f"layers (mean {lost_by_random:.4f} of {RANDOM_DRAWS} draws)."
    )
    layers = zip(short_names([*weights]), rows, strict=False)  # the other rows follow them
    titles = [f"{name}: {row.operation}" for name, row in layers]
    titles += [row.layer for row in rows[len(titles) :]]

    def draw(axes: Axes) -> None:
        colours = [
            ORANGE if r.layer == ALL_LAYERS else BLUE if r.operation else MUTED for r in rows
        ]
        axes.barh(range(len(rows)), [row.dice_lost for row in rows], 0.65, color=colours)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel("validation Dice lost")

    return row_drawing("operation_losses", caption, titles, draw)


def _cases(weights: Mapping[str, Tensor]) -> list[tuple[str, str | None, dict[str, int]]]:
    """What to move: the chosen operation of each layer and of all, then draws among the others."""
    chosen, others = {}, {}
    for name, own in weights.items():
        ranked = [i for i in own.argsort(descending=True, stable=True).tolist() if i != SKIP]
        chosen[name] = ranked[0]
        others[name] = sorted(i for i in ranked[1:] if own[i] > 0)
    generator = np.random.default_rng(0)
    draws = [
        {name: int(generator.choice(own)) for name, own in others.items() if own}
        for _ in range(RANDOM_DRAWS)
    ]
    return [
        *((name, OPERATIONS[index], {name: index}) for name, index in chosen.items()),
        (ALL_LAYERS, None, chosen),
        *((f"random operations, draw {i}", None, draw) for i, draw in enumerate(draws, 1)),
    ]


def moved_to_skip(alpha: Tensor, index: int) -> Tensor:
    """(8,) logits whose softmax has the weight of an operation added to that of `skip`."""
    logs = alpha.double().log_softmax(0)
    logs[SKIP] = torch.logaddexp(logs[SKIP], logs[index])
    logs[index] = LEFT_OUT
    return logs
