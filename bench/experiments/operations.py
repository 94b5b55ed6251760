"""What the search chose on several data sets, side by side, and what the choices are worth.

    python -m bench.experiments.operations kvasir=runs/kvasir/runs/nas-pc-lora \
        leaf=runs/leaf/runs/nas-pc-lora --save bench/experiments/results/operation_losses.csv

Each argument is a name and a folder that holds runs, at any depth. Prints Markdown. The first table
has the mean weight of each operation over layers and runs, its change since the start, and the
share of the layers in which it has the largest weight, `skip` excepted (paper, Fig. C2). The second
one has what ``naslora analyse`` wrote to the folders: the validation Dice that is lost when the
weights of the chosen operations move to `skip`, and that of random ones.
"""

from dataclasses import astuple, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import tyro

from naslora.errors import UserError
from naslora.records import read_record, read_rows, write_rows
from naslora.report.tables import Table, markdown_table
from naslora.results import OPERATIONS_JSON, OperationHistory
from naslora.study.operation_losses import ALL_LAYERS, OperationLoss
from naslora_kernels import OPERATIONS
from naslora_kernels.operations import SKIP


@dataclass(frozen=True)
class Loss:
    """What moving weights to `skip` costs in one run: in all layers at once, in validation Dice."""

    data: str
    run: str
    chosen_weight: float
    """The weight that moves, a mean over the layers."""
    random_weight: float
    chosen: float
    random: float
    """The mean of the random draws."""
    random_least: float
    random_most: float


def main(sets: tyro.conf.Positional[tuple[str, ...]], save: Path | None = None) -> None:
    """Prints the tables.

    Args:
        sets: NAME=FOLDER of each data set.
        save: CSV file with one row of the second table a run.
    """
    folders = {name: Path(folder) for name, _, folder in (text.partition("=") for text in sets)}
    if folders:
        print(f"{markdown_table(operations_table(folders))}\n")
    kept = [] if save is None or not save.is_file() else read_rows(save, Loss)
    losses = {(loss.data, loss.run): loss for loss in kept}
    for name, folder in folders.items():
        losses |= {(loss.data, loss.run): loss for loss in _losses(name, folder)}
    ordered = [losses[key] for key in sorted(losses)]
    if save is not None:
        write_rows(save, ordered)
    if ordered:
        print(markdown_table(losses_table(ordered)))


# ---- What was chosen -----------------------------------------------------------------------------


def operations_table(folders: dict[str, Path]) -> Table:
    """The operations' weights, one row an operation.

    Raises:
        UserError: a folder holds no run with a search.
    """
    columns = {name: _weights(folder) for name, folder in folders.items()}
    head = [f"{name}, runs: {len(last)}" for name, (_, last) in columns.items()]
    rows = [
        [operation, *(_weight(*first_and_last, index) for first_and_last in columns.values())]
        for index, operation in enumerate(OPERATIONS)
    ]
    return Table(["operation", *head], rows)


def _weights(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """softmax(alpha) before and after training, (runs, layers, operations) each."""
    files = sorted(folder.rglob(OPERATIONS_JSON))
    if not files:
        raise UserError(f"{folder} holds no run with {OPERATIONS_JSON}")
    runs = [read_record(file, OperationHistory).epochs for file in files]
    first, last = ([epochs[place].softmax for epochs in runs] for place in (0, -1))
    return np.array(first), np.array(last)


def _weight(first: np.ndarray, last: np.ndarray, index: int) -> str:
    """An operation's weight, its change, and the share of the layers where it is the largest."""
    weight, change = last[..., index].mean(), (last - first)[..., index].mean()
    if index == SKIP:
        return f"{weight:.3f} ({change:+.3f})"
    others = last.copy()
    others[..., SKIP] = -1
    return f"{weight:.3f} ({change:+.3f}), {(others.argmax(-1) == index).mean():.0%}"


# ---- What it is worth ----------------------------------------------------------------------------


def _losses(name: str, folder: Path) -> list[Loss]:
    losses = []
    for path in sorted(folder.rglob("operation_losses.csv")):
        rows = read_rows(path, OperationLoss)
        (chosen,) = (row for row in rows if row.layer == ALL_LAYERS)
        draws = [row for row in rows if row.layer.startswith("random")]
        lost = [draw.dice_lost for draw in draws]
        losses.append(
            Loss(
                name,
                path.parent.relative_to(folder).as_posix(),
                chosen.weight,
                float(np.mean([draw.weight for draw in draws])),
                chosen.dice_lost,
                float(np.mean(lost)),
                min(lost),
                max(lost),
            )
        )
    return losses


def losses_table(losses: list[Loss]) -> Table:
    """Means over the runs of a data set, one row each, as the losses are ordered."""
    rows = []
    for data, group in groupby(losses, key=lambda loss: loss.data):
        runs = list(group)
        means = Loss(data, "", *np.mean([astuple(run)[2:] for run in runs], axis=0))
        clear = sum(run.chosen > run.random_most for run in runs)
        rows.append(
            [
                data,
                str(len(runs)),
                f"{means.chosen_weight:.3f}, {means.random_weight:.3f}",
                f"{means.chosen:+.4f}",
                f"{min(run.chosen for run in runs):+.4f} to {max(run.chosen for run in runs):+.4f}",
                f"{means.random:+.4f}",
                f"{clear} of {len(runs)}",
            ]
        )
    head = ["data", "runs", "weight: chosen, random", "chosen: Dice lost", "least to most"]
    return Table([*head, "random: Dice lost", "chosen loses more than every draw in"], rows)


if __name__ == "__main__":
    tyro.cli(main)
