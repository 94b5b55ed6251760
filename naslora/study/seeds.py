"""Runs that differ in their seed: how they converge, and which operations they prefer."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from naslora import results
from naslora.errors import UserError
from naslora.methods import searches
from naslora.records import read_record, write_rows
from naslora.report.figures import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    Drawing,
    as_array,
    draw_row_axis,
    row_size,
)
from naslora.results import CONFIG, HISTORY, OPERATIONS_JSON, Epoch, OperationHistory
from naslora.training.resolve import read_config
from naslora.training.run_config import RunConfig

# ---- Convergence ---------------------------------------------------------------------------------


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


def write_convergence(
    histories: list[list[Epoch]], config: RunConfig, output: Path
) -> list[Drawing]:
    """Writes convergence.csv, the validation Dice by epoch over the seeds, and plots it.

    Args:
        histories: the history of each run; all of the same length.
        config: the configuration of the first run.
        output: folder for convergence.csv.
    """
    curves = np.array([as_array(epoch.val_dice for epoch in history) for history in histories])
    mean = curves.mean(0)  # NaN if a seed has no score
    spread = curves.std(0, ddof=1) if len(curves) > 1 else np.full(len(mean), np.nan)
    numbers = enumerate(zip(mean.tolist(), spread.tolist(), strict=True))
    rows = [{"epoch": e, "mean_val_dice": m, "standard_deviation": s} for e, (m, s) in numbers]
    write_rows(output / "convergence.csv", rows)
    start = config.training.search_start if searches(config.method, config.adapter) else None
    caption = f"Validation Dice by epoch, mean and standard deviation of {len(curves)} seeds."
    draw = partial(_draw_convergence, mean=mean, spread=spread, start=start)
    return [Drawing("convergence", caption, draw)]


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


def write_operations(mixtures: Mapping[str, np.ndarray], output: Path) -> list[Drawing]:
    """Writes operations.csv, the weights at the end of the search, and plots them.

    Args:
        mixtures: as ``read_operations`` returns them.
        output: folder for operations.csv.
    """
    last = np.stack([*mixtures.values()], axis=-1)  # (runs, layers, operations)
    runs, layers, _ = last.shape
    largest = last.argmax(-1)  # (runs, layers)
    rows = [
        {
            "operation": name,
            "mean_weight": float(own.mean()),
            "spread_over_runs": float(own.mean(1).std(ddof=1)) if runs > 1 else None,
            "share_of_layers_where_largest": float((largest == i).mean()),
        }
        for i, (name, own) in enumerate(mixtures.items())
    ]
    write_rows(output / "operations.csv", rows)
    caption = (
        f"Mean of softmax(α) over {layers} layers of {runs} runs, and the share of the "
        "layers in which an operation has the largest weight."
    )
    return [
        Drawing("operations", caption, partial(_draw_operations, rows=rows), row_size(len(rows)))
    ]


def _draw_operations(axes: Axes, rows: list[dict[str, Any]]) -> None:
    places = np.arange(len(rows))
    weights = [row["mean_weight"] for row in rows]
    spread = [row["spread_over_runs"] or 0 for row in rows]
    axes.barh(places - 0.2, weights, 0.38, xerr=spread, color=BLUE, ecolor=INK, label="mean weight")
    shares = [row["share_of_layers_where_largest"] for row in rows]
    axes.barh(places + 0.2, shares, 0.38, color=GREEN, label="share of layers")
    axes.axvline(1 / len(rows), color=ORANGE, linestyle="--", linewidth=1, label="uniform")
    draw_row_axis(axes, [row["operation"] for row in rows])
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
