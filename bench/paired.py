"""Paired statistics over finished comparisons: what each method gains on LoRA, with intervals.

    python -m bench.paired FOLDER [FOLDER ...] [--save FILE.csv]
    python -m bench.paired FILE.csv

A FOLDER is what ``naslora compare`` wrote. Several of them, of one recipe and with different seeds,
count as one comparison. ``--save`` keeps one row a run, from which the same tables are printed.
Prints Markdown.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from naslora.errors import UserError
from naslora.methods import METHODS
from naslora.records import from_json, read_record, read_rows, write_rows
from naslora.report.tables import Table, markdown_table
from naslora.results import HISTORY, CellNumbers, Epoch
from naslora.study.compare import RECORD, StoredComparison
from naslora.study.paired import Scores, paired_difference, paired_table
from naslora.study.sweep import CellKey, mean_and_spread, mean_text
from naslora.training.run_config import RunConfig, differing


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    method: str
    seed: int
    dice: float
    """On the test split."""
    iou: float
    entropy: float | None
    """Entropy of softmax(alpha) after the last epoch, in nats; None without alpha."""
    weight_seconds: float
    """Seconds of all weight steps."""
    alpha_seconds: float
    """Seconds of all steps of alpha."""


def main(
    sources: tyro.conf.Positional[tuple[Path, ...]],
    save: Path | None = None,
    against: tuple[str, ...] = ("lora", "conv-lora"),
) -> None:
    """Prints the tables of a comparison.

    Args:
        sources: folders of ``naslora compare``, or one CSV file that ``--save`` wrote.
        save: CSV file for one row a run.
        against: the methods that the others are compared with.
    """
    runs = _read(sources)
    if save is not None:
        write_rows(save, runs)
    print(markdown_table(scores_table(runs)))
    for reference in against:
        table = differences_table(runs, reference)
        if table.rows:
            print(f"\n{markdown_table(table)}")


def _read(sources: Sequence[Path]) -> list[Run]:
    if len(sources) == 1 and sources[0].is_file():
        return read_rows(sources[0], Run)
    recipe, runs = None, []
    for folder in sources:
        stored = read_record(folder / RECORD, StoredComparison)
        own = RunConfig.from_dict(stored.recipe).to_dict()
        names = [] if recipe is None else differing(recipe, own)
        if names:
            raise UserError(f"{folder} has another recipe (there {', '.join(names)})")
        recipe = own
        for cell in stored.cells:
            if cell.state == "done":
                numbers = from_json(CellNumbers, cell.numbers, folder / RECORD)
                runs.append(_run(cell.method, cell.seed, numbers, folder))
    keys = [(run.method, run.seed) for run in runs]
    if len(set(keys)) < len(keys):
        raise UserError("a method has one seed twice; give comparisons of different seeds")
    return sorted(runs, key=lambda run: (list(METHODS).index(run.method), run.seed))


def _run(method: str, seed: int, numbers: CellNumbers, folder: Path) -> Run:
    history = read_rows(CellKey(method, seed).folder(folder) / HISTORY, Epoch)
    if numbers.scores.dice is None or numbers.scores.iou is None:
        raise UserError(f"{folder}: {method} with seed {seed} has no test scores")
    return Run(
        method,
        seed,
        numbers.scores.dice,
        numbers.scores.iou,
        history[-1].entropy,
        sum(epoch.seconds.weights for epoch in history),
        sum(epoch.seconds.architecture for epoch in history),
    )


def scores_table(runs: Sequence[Run]) -> Table:
    """Test scores, entropy and training time of each method."""
    head = ["Method", "Seeds", "Test Dice", "Test IoU", "Entropy of α", "Weight steps, s", "α, s"]
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == method]
        entropy = mean_and_spread([run.entropy for run in own])
        rows.append(
            [
                METHODS[method].title,
                str(len(own)),
                mean_text(mean_and_spread([run.dice for run in own]), ".4f"),
                mean_text(mean_and_spread([run.iou for run in own]), ".4f"),
                mean_text(entropy),
                f"{statistics.median(run.weight_seconds for run in own):.0f}",
                f"{statistics.median(run.alpha_seconds for run in own):.0f}",
            ]
        )
    return Table(head, rows)


def differences_table(runs: Sequence[Run], reference: str) -> Table:
    """What each other method gains on ``reference`` in test Dice; empty without it."""
    scores: dict[str, Scores] = {}
    for method in dict.fromkeys(run.method for run in runs):
        scores[method] = {run.seed: run.dice for run in runs if run.method == method}
    if reference not in scores:
        return Table([], [])
    return paired_table(
        METHODS[reference].title,
        [
            paired_difference(METHODS[method].title, own, scores[reference])
            for method, own in scores.items()
            if method != reference
        ],
    )


if __name__ == "__main__":
    tyro.cli(main)
