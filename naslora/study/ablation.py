"""``naslora ablate``: varies one setting of the method (paper, Tables 6-9 and D1).

Every (variant, seed) is a cell: a run of ``train``. The cells run in this process, because an
ablation does not measure memory. The unchanged method is a variant of every ablation, so several
ablations in one folder share its runs.

runs/VARIANT/SEED/           a cell, as ``naslora train`` leaves it; finished ones are kept
ABLATION/table.md, .csv      one row a variant
ABLATION/report.html         the table, and a plot of the seeds
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from naslora.errors import UserError
from naslora.files import write_text
from naslora.metrics import METRICS
from naslora.records import read_record, write_rows
from naslora.report.figures import Drawing
from naslora.report.numbers import MISSING
from naslora.report.row_plots import DOTS_CAPTION, draw_dice, draw_row_axis, plot_height
from naslora.report.study_report import Part, write_study
from naslora.report.tables import Table, markdown_table
from naslora.results import METRICS_JSON, REPORT, MeanAndSpread, RunResult, read_history
from naslora.study import sweep
from naslora.study.sweep import (
    CellKey,
    cell_keys,
    check_distinct,
    mean_and_spread,
    mean_text,
    run_cells,
    spread_columns,
)
from naslora.study.variants import BASE, AblationName, Variant, variants_of, with_adapter
from naslora.training.run import check_output, train
from naslora.training.run_config import RunConfig

NOTE = (
    "Test scores: mean ± standard deviation over the seeds. The difference from the unchanged "
    "method is taken seed by seed, then summarised in the same way."
)

say = partial(sweep.say, "ablate")


@dataclass(frozen=True)
class Cell:
    """What a run measured."""

    scores: dict[str, float | None]
    """Test scores by the names of ``naslora.metrics.METRICS``; metrics of classes are left out."""
    trainable_parameters: int
    entropy: float | None
    """Entropy of softmax(alpha) after the last epoch, in nats; None without alpha."""


@dataclass(frozen=True)
class AblationRow:
    """A variant in the table of an ablation."""

    title: str
    seeds: int
    """Number of finished cells. Without any, all numbers below are None or empty."""
    trainable_parameters: int | None
    scores: dict[str, MeanAndSpread]
    """As in ``Cell``."""
    difference: MeanAndSpread | None
    """Test Dice minus that of the unchanged method with the same seed; None for that method."""
    entropy: MeanAndSpread | None
    """As in ``Cell``."""


def ablate(
    name: AblationName,
    config: RunConfig,
    seeds: Sequence[int],
    output: Path,
    resume: bool = False,
) -> str:
    """Trains the cells that ``output`` lacks, and writes the table after every cell.

    Args:
        name: a key of ``ABLATIONS``.
        config: the unchanged method. Its seed is replaced.
        seeds: seeds of each variant's runs.
        output: must be new or empty unless ``resume``.
        resume: keep the finished cells in ``output`` and continue the others.

    Returns:
        The table as Markdown.

    Raises:
        UserError: the configuration has nothing to ablate; ``output`` holds something else, or
            cells of another configuration; or as ``naslora.training.run.train``.
    """
    variants = variants_of(name, config)
    check_distinct("seeds", seeds)
    if not resume:
        check_output(config, output, resume)
    by_folder = {variant.folder: variant for variant in variants}
    keys = cell_keys(list(by_folder), seeds)
    configs = {key: with_adapter(by_folder[key.row].config, seed=key.seed) for key in keys}
    cells, pending = {}, {}
    for number, key in enumerate(keys, 1):
        folder = key.folder(output)
        check_output(configs[key], folder, resume=True)
        if (folder / REPORT).is_file():  # the last file that a run writes
            cells[key] = _read_cell(folder)
        else:
            title = by_folder[key.row].title
            pending[key] = f"{name}, cell {number} of {len(keys)}: {title}, seed {key.seed}"

    def run(key: CellKey) -> Cell:
        train(configs[key], key.folder(output), resume=True)
        return _read_cell(key.folder(output))

    def write() -> None:
        if cells:
            _write(output / name, name, variants, _rows(variants, seeds, cells))

    run_cells(pending, cells, run, write, say)
    return markdown_table(text_table(_rows(variants, seeds, cells)))


def _read_cell(folder: Path) -> Cell:
    result = read_record(folder / METRICS_JSON, RunResult)
    if result.test is None or result.trainable_parameters is None:
        raise UserError(f"{folder / METRICS_JSON} has no test scores or no count of parameters")
    scores = {"dice": result.test.dice, **(result.test.metrics or {})}
    return Cell(
        {name: value for name, value in scores.items() if not isinstance(value, dict)},
        result.trainable_parameters,
        read_history(folder)[-1].entropy,
    )


# ---- The table -----------------------------------------------------------------------------------


def _rows(
    variants: Sequence[Variant], seeds: Sequence[int], cells: Mapping[CellKey, Cell]
) -> list[AblationRow]:
    base = [cells.get(CellKey(BASE, seed)) for seed in seeds]
    return [
        _row(variant, [cells.get(CellKey(variant.folder, seed)) for seed in seeds], base)
        for variant in variants
    ]


def _row(
    variant: Variant, cells: Sequence[Cell | None], base: Sequence[Cell | None]
) -> AblationRow:
    """A row of the cells of a variant and of the unchanged method, one a seed."""
    known = [cell for cell in cells if cell is not None]
    if not known:
        return AblationRow(variant.title, 0, None, {}, None, None)
    differences = []
    for own, other in zip(cells, base, strict=True):
        dice = own.scores["dice"] if own else None
        base_dice = other.scores["dice"] if other else None
        if dice is not None and base_dice is not None:
            differences.append(dice - base_dice)
    differs = variant.folder != BASE and differences
    searched = known[0].entropy is not None
    return AblationRow(
        title=variant.title,
        seeds=len(known),
        trainable_parameters=known[0].trainable_parameters,
        scores={
            metric: mean_and_spread([cell.scores[metric] for cell in known])
            for metric in known[0].scores
        },
        difference=mean_and_spread(differences) if differs else None,
        entropy=mean_and_spread([cell.entropy for cell in known]) if searched else None,
    )


def text_table(rows: Sequence[AblationRow]) -> Table:
    """The rows as text. At least one of them has a finished cell."""
    metrics = list(next(row.scores for row in rows if row.seeds))
    head = ["Variant", "Seeds", "Trainable, M", *(METRICS[name].label for name in metrics)]
    head += ["Difference in Dice", "Entropy of α"]
    text = []
    for row in rows:
        trained = row.trainable_parameters
        cells = [row.title, str(row.seeds)]
        cells.append(MISSING if trained is None else f"{trained / 1e6:.4f}")
        cells += [mean_text(row.scores.get(name)) for name in metrics]
        cells += [mean_text(row.difference, "+.3f"), mean_text(row.entropy)]
        text.append(cells)
    return Table(head, text)


def csv_row(row: AblationRow) -> dict[str, Any]:
    """A row of table.csv; numbers that are unknown are absent."""
    columns: dict[str, Any] = {"variant": row.title, "seeds": row.seeds}
    if row.trainable_parameters is not None:
        columns["trainable_parameters"] = row.trainable_parameters
    for name, score in row.scores.items():
        columns |= spread_columns(name, score)
        columns[f"{name}_values"] = " ".join(map(str, score.values))
    if row.difference is not None:
        columns |= spread_columns("difference", row.difference)
    if row.entropy is not None:
        columns |= spread_columns("entropy", row.entropy)
    return columns


def _write(
    folder: Path, name: AblationName, variants: Sequence[Variant], rows: Sequence[AblationRow]
) -> None:
    """Writes the table in all formats to the ablation's folder."""
    table = text_table(rows)
    write_rows(folder / "table.csv", [csv_row(row) for row in rows])
    write_text(folder / "table.md", f"{markdown_table(table)}\n\n{NOTE}\n")
    base = next(variant.config for variant in variants if variant.folder == BASE)
    size = (6, plot_height(len(rows)))
    dots = Drawing("dice", DOTS_CAPTION, partial(_draw_dots, rows=rows), size)
    title = f"Ablation of {base.method} on {base.model}: {name}"
    sections: dict[str, list[Part]] = {"Table": [table, NOTE], "Seeds": [dots]}
    write_study(folder / REPORT, title, sections, base.to_dict())


def _draw_dots(axes: Axes, rows: Sequence[AblationRow]) -> None:
    draw_dice(axes, [row.scores.get("dice") for row in rows])
    draw_row_axis(axes, [row.title for row in rows])
