"""What the search chose on several data sets, side by side (paper, Fig. C2).

    python -m bench.operations kvasir=runs/kvasir/runs/nas-pc-lora leaf=runs/leaf/runs/nas-pc-lora

Each argument is a name and a folder that holds runs, at any depth. Prints Markdown: the mean weight
of each operation over layers and runs, its change since the start, and the share of the layers in
which it has the largest weight, `skip` excepted.
"""

from pathlib import Path

import numpy as np
import tyro

from naslora.errors import UserError
from naslora.records import read_record
from naslora.report.tables import Table, markdown_table
from naslora.results import OPERATIONS_JSON, OperationHistory
from naslora_kernels import OPERATIONS
from naslora_kernels.operations import SKIP


def main(sets: tyro.conf.Positional[tuple[str, ...]]) -> None:
    """Prints the table.

    Args:
        sets: NAME=FOLDER of each data set.
    """
    columns = {name: _weights(Path(folder)) for name, _, folder in (s.partition("=") for s in sets)}
    head = ["Operation"]
    for name, (_, last) in columns.items():
        head += [f"{name} ({len(last)} runs): weight", "change", "largest in"]
    rows = []
    for index, operation in enumerate(OPERATIONS):
        row = [operation]
        for first, last in columns.values():
            change = (last - first)[..., index].mean()
            row += [f"{last[..., index].mean():.3f}", f"{change:+.3f}", _share(last, index)]
        rows.append(row)
    print(markdown_table(Table(head, rows)))


def _weights(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """softmax(alpha) before and after training, (runs, layers, operations) each."""
    files = sorted(folder.rglob(OPERATIONS_JSON))
    if not files:
        raise UserError(f"{folder} holds no run with {OPERATIONS_JSON}")
    runs = [read_record(file, OperationHistory).epochs for file in files]
    first, last = ([epochs[place].softmax for epochs in runs] for place in (0, -1))
    return np.array(first), np.array(last)


def _share(weights: np.ndarray, index: int) -> str:
    if index == SKIP:
        return "–"
    others = weights.copy()
    others[..., SKIP] = -1
    return f"{(others.argmax(-1) == index).mean():.0%}"


if __name__ == "__main__":
    tyro.cli(main)
