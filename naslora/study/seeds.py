"""Runs that differ in their seed: how they converge, and which operations they prefer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from naslora import results
from naslora.errors import UserError
from naslora.methods import searches
from naslora.records import read_record, write_rows
from naslora.report.figures import BLUE, GREEN, INK, MUTED, ORANGE, Drawing
from naslora.report.study_report import Part
from naslora.results import CONFIG, HISTORY, OPERATIONS_JSON, Epoch, OperationHistory
from naslora.training.resolve import read_config
from naslora.training.run_config import RunConfig

# ---- Convergence ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvergenceRow:
    """A row of convergence.csv."""

    epoch: int
    mean_val_dice: float
    """Over the seeds; NaN if a seed has no score."""
    standard_deviation: float
    """Over the seeds; NaN for a single seed."""


def read_history(run: Path, first: RunConfig) -> list[Epoch]:
    """Reads the history of a run.

    Args:
        run: folder of the run.
        first: the configuration of the first run.

    Raises:
        UserError: the configurations differ in more than their seed, or the run is not finished.
    """
    config = read_config(run / CONFIG)
    given, own = config.to_dict(), first.to_dict()
    given["seed"] = own["seed"]
    if given != own:
        raise UserError(f"{run} is a run of another configuration; give runs that differ in seed")
    if not (run / HISTORY).is_file():
        raise UserError(f"{run} is not finished: it has no {HISTORY}")
    history = results.read_history(run)
    if len(history) != config.training.epochs:
        raise UserError(f"{run / HISTORY} has {len(history)} of {config.training.epochs} epochs")
    return history


def write_convergence(histories: list[list[Epoch]], config: RunConfig, output: Path) -> list[Part]:
    """Writes and plots the validation Dice by epoch: mean and standard deviation over the seeds.

    Args:
        histories: the history of each run; all of the same length.
        config: the configuration of the first run.
        output: folder for convergence.csv and convergence.png.

    Returns:
        The parts of the report.
    """
    curves = np.array(
        [
            [np.nan if epoch.val_dice is None else epoch.val_dice for epoch in history]
            for history in histories
        ]
    )
    mean = curves.mean(0)
    spread = curves.std(0, ddof=1) if len(curves) > 1 else np.full(len(mean), np.nan)
    numbers = enumerate(zip(mean.tolist(), spread.tolist(), strict=True))
    write_rows(
        output / "convergence.csv", [ConvergenceRow(epoch, m, s) for epoch, (m, s) in numbers]
    )
    start = config.training.search_start if searches(config.method, config.adapter) else None
    caption = f"Validation Dice by epoch, mean and standard deviation of {len(curves)} seeds."
    draw = partial(_draw_convergence, mean=mean, spread=spread, start=start)
    drawing = Drawing("convergence", caption, draw, (4.6, 3))
    drawing.save(output / "convergence.png")
    return [drawing]


def _draw_convergence(axes: Axes, mean: np.ndarray, spread: np.ndarray, start: int | None) -> None:
    epochs = np.arange(len(mean))
    axes.plot(epochs, mean, color=BLUE)
    if np.isfinite(spread).any():
        axes.fill_between(epochs, mean - spread, mean + spread, color=BLUE, alpha=0.25, linewidth=0)
    if start is not None and 0 < start < len(mean):
        axes.axvline(start - 0.5, color=MUTED, linestyle="--", linewidth=1)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation Dice")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


# ---- Operations ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OperationRow:
    """A row of operations.csv."""

    operation: str
    mean_weight: float
    """Mean of softmax(alpha) over the layers and the runs."""
    spread_over_runs: float | None
    """Standard deviation over the runs of the mean over the layers; None for a single run."""
    share_of_layers_where_largest: float
    """Share of the layers, of all runs, in which the operation has the largest weight."""


def read_operations(runs: Sequence[Path]) -> dict[str, np.ndarray]:
    """Reads the mixtures at the end of the search: (runs, layers) weights by operation.

    Raises:
        UserError: a file is missing, holds no mixture, or one of other layers than the first.
    """
    stored = [read_record(run / OPERATIONS_JSON, OperationHistory) for run in runs]
    names = stored[0].operations
    for run, record in zip(runs, stored, strict=True):
        layers = record.epochs[-1].softmax if record.epochs else []
        if [len(layer) for layer in layers] != [len(names)] * max(1, len(stored[0].layers)):
            raise UserError(f"{run / OPERATIONS_JSON} does not hold a mixture of each layer")
    last = np.array([record.epochs[-1].softmax for record in stored])
    return dict(zip(names, np.moveaxis(last, -1, 0), strict=True))


def write_operations(mixtures: Mapping[str, np.ndarray], output: Path) -> list[Part]:
    """Writes and plots the weights of the operations at the end of the search.

    Args:
        mixtures: as ``read_operations`` returns them.
        output: folder for operations.csv and operations.png.

    Returns:
        The parts of the report.
    """
    last = np.stack([*mixtures.values()], axis=-1)  # (runs, layers, operations)
    runs, layers, _ = last.shape
    chosen = last.argmax(-1)  # (runs, layers)
    rows = [
        OperationRow(
            name,
            float(last[..., i].mean()),
            float(last[..., i].mean(1).std(ddof=1)) if runs > 1 else None,
            float((chosen == i).mean()),
        )
        for i, name in enumerate(mixtures)
    ]
    write_rows(output / "operations.csv", rows)
    caption = (
        f"Mean of softmax(α) over {layers} layers of {runs} runs, and the share of the "
        "layers in which an operation has the largest weight."
    )
    drawing = Drawing("operations", caption, partial(_draw_operations, rows=rows), (5.4, 3.2))
    drawing.save(output / "operations.png")
    return [drawing]


def _draw_operations(axes: Axes, rows: list[OperationRow]) -> None:
    places = np.arange(len(rows))
    weights = [row.mean_weight for row in rows]
    spread = [row.spread_over_runs or 0 for row in rows]
    axes.barh(places - 0.2, weights, 0.38, xerr=spread, color=BLUE, ecolor=INK, label="mean weight")
    shares = [row.share_of_layers_where_largest for row in rows]
    axes.barh(places + 0.2, shares, 0.38, color=GREEN, label="share of layers")
    axes.axvline(1 / len(rows), color=ORANGE, linestyle="--", linewidth=1, label="uniform")
    axes.set_yticks(places, [row.operation for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
