"""Test Dice of the epochs that runs with ``--keep best`` kept, and of their last epochs.

    python -m bench.last_epoch runs/study/whole-sets/*/*/* --save docs/evidence/last_epoch.csv

Runs that kept their last epoch are left out. Runs that ``--save`` holds are not scored again.
"""

import csv
import statistics
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import tyro

from naslora.files import read_torch
from naslora.records import read_record, read_rows, write_rows
from naslora.report.tables import Table, markdown_table
from naslora.results import HISTORY, LAST, METRICS_JSON, Epoch, RunResult
from naslora.trained import evaluate_model, load_model
from naslora.training.run_data import find_splits


class Row(NamedTuple):
    """One run."""

    run: str
    """The last three parts of its folder: data set, variant, seed."""
    epochs: int
    best_epoch: int
    """Counted from 0."""
    best_loss: int
    """The epoch with the least validation loss."""
    dice_best: float
    dice_last: float


def main(runs: tyro.conf.Positional[tuple[Path, ...]], save: Path | None = None) -> None:
    """Scores the last epochs and prints a table.

    Args:
        runs: folders of finished runs.
        save: CSV file with one row a run.
    """
    rows = stored(save)
    for path in runs:
        name = "/".join(path.parts[-3:])
        if name not in rows:
            row = _score(name, path)
            if row is not None:
                rows[name] = row
    ordered = [rows[name] for name in sorted(rows)]
    if save is not None:
        write_rows(save, [row._asdict() for row in ordered])
    print(table(ordered))


def stored(save: Path | None) -> dict[str, Row]:
    """The rows of a CSV file, by run; none if there is no file."""
    if save is None or not save.is_file():
        return {}
    with save.open(encoding="utf-8", newline="") as file:
        read = csv.reader(file)
        next(read)
        return {
            run: Row(run, *map(int, numbers[:3]), *map(float, numbers[3:]))
            for run, *numbers in read
        }


def _score(name: str, path: Path) -> Row | None:
    """A run's row; None for an unfinished run, or one that kept its last epoch."""
    if not (path / METRICS_JSON).is_file():
        return None
    result, history = read_record(path / METRICS_JSON, RunResult), read_rows(path / HISTORY, Epoch)
    if result.kept_epoch in (None, len(history) - 1):
        return None
    model, config = load_model(path)
    model.load_state_dict(read_torch(path / LAST)["model"], strict=False)
    last = evaluate_model(model, config, find_splits(config)["test"])
    least = min(history, key=lambda epoch: epoch.val_loss)
    dice = result.test.dice if result.test else None
    if dice is None or last.dice is None:
        return None
    return Row(name, len(history), result.kept_epoch, least.epoch, dice, last.dice)


def table(rows: list[Row]) -> str:
    """How much the last epochs gain, in Markdown, one row a data set."""
    lines = []
    for data, group in groupby(rows, key=lambda row: row.run.split("/")[0]):
        gains = [row.dice_last - row.dice_best for row in group]
        ahead = sum(gain > 0 for gain in gains)
        span = f"{min(gains):+.4f} to {max(gains):+.4f}"
        lines.append([data, str(len(gains)), str(ahead), f"{statistics.mean(gains):+.4f}", span])
    return markdown_table(
        Table(["data", "runs", "last is better", "last − best, mean", "least to most"], lines)
    )


if __name__ == "__main__":
    tyro.cli(main)
