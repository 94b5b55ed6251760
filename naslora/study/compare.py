"""``naslora compare``: methods side by side on one data set, under one recipe.

Every (method, seed) is a cell: a run of ``train`` in a folder and a process of its own.
One cell runs at a time.

compare.json         the recipe, and what every cell measured
runs/METHOD/SEED/    the cell's run, as ``naslora train`` leaves it
table.md, table.csv  one row a method, in the shape of the paper's Tables 1 and 2
differences.csv      what each method gains on LoRA, paired over the seeds
report.html          the tables, and plots of them
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from naslora.errors import UserError
from naslora.files import write_text
from naslora.methods import METHODS
from naslora.records import from_json, read_record, to_json, write_record, write_rows
from naslora.report.comparison_report import write_comparison
from naslora.results import REPORT, CellNumbers, PairedDifference
from naslora.study import sweep
from naslora.study.comparison_table import (
    Cell,
    State,
    as_markdown,
    csv_row,
    main_table,
    merged_table,
    notes_on,
    summarise,
)
from naslora.study.measurement import cell_config, find_refusals, run_cell
from naslora.study.paired import paired_differences, paired_table
from naslora.study.sweep import CellKey, cell_keys, check_distinct, in_own_process, run_cells
from naslora.training.run import check_output
from naslora.training.run_config import RunConfig, differing

RECORD = "compare.json"

say = partial(sweep.say, "compare")


@dataclass(frozen=True)
class StoredCell:
    """A cell as it is stored in compare.json."""

    method: str
    seed: int
    state: State
    reason: str | None
    numbers: dict[str, Any]
    """A ``CellNumbers``; empty unless the cell is done."""


@dataclass(frozen=True)
class StoredComparison:
    """The content of compare.json."""

    recipe: dict[str, Any]
    """The ``RunConfig`` that all cells share; its method and seed mean nothing."""
    cells: list[StoredCell]


def compare(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    resume: bool = False,
) -> list[Cell]:
    """Trains every method with every seed, and writes tables and report to ``output``.

    A method that does not fit the encoder is refused before anything trains. A cell that fails is
    marked, and the others go on. Tables are written after every cell.

    Args:
        config: the recipe: data, model, schedule. Its method and seed are replaced.
        methods: names of ``naslora.methods.METHODS``, in the order of the rows.
        seeds: seeds of the data order, the held-out images and the fresh parameters.
        output: must be new or empty unless ``resume``.
        resume: keep the finished cells of ``output`` and continue the others. Methods and seeds
            may have been added.

    Returns:
        The cells, seed by seed.

    Raises:
        UserError: the recipe cannot work for any method, or belongs to another comparison.
    """
    _check_arguments(config, methods, seeds)
    known = _known_cells(config, output, resume)
    refusals = in_own_process(find_refusals, config, tuple(methods))
    if len(refusals) == len(methods):
        raise UserError(f"no method fits: {_listed(refusals)}")
    for method, reason in refusals.items():
        say(f"{method} is left out: {reason}")
    keys = cell_keys(methods, seeds)
    for key in keys:
        if key.row in refusals:
            known[key] = Cell(key.row, key.seed, "refused", refusals[key.row])
    todo = [key for key in keys if key.row not in refusals and not _is_done(known.get(key))]
    run_cells(
        {
            key: f"cell {number} of {len(todo)}: {key.row}, seed {key.seed}"
            for number, key in enumerate(todo, 1)
        },
        known,
        run=partial(_run_cell, config, output),
        write=lambda: _write(config, list(known.values()), methods, output),
        say=say,
        failed=lambda key, reason: Cell(key.row, key.seed, "failed", reason),
        outcome=_outcome,
    )
    return [known[key] for key in keys]


def _check_arguments(config: RunConfig, methods: Sequence[str], seeds: Sequence[int]) -> None:
    default = RunConfig()
    if config != cell_config(config, str(default.method), default.adapter.seed):
        raise UserError("compare takes --methods and --seeds, not --method or --seed")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise UserError(f"methods must be among {', '.join(METHODS)}, got {unknown[0]!r}")
    check_distinct("methods", methods)
    check_distinct("seeds", seeds)
    for seed in seeds:
        cell_config(config, methods[0], seed)  # refuses a seed that is out of range


def _known_cells(config: RunConfig, output: Path, resume: bool) -> dict[CellKey, Cell]:
    """The cells of an interrupted comparison; none for a new one."""
    path = output / RECORD
    if not (resume and path.is_file()):
        check_output(config, output, resume)
        return {}
    stored = read_record(path, StoredComparison)
    names = differing(RunConfig.from_dict(stored.recipe).to_dict(), _recipe(config))
    if names:
        raise UserError(
            f"{output} was started with another recipe (it has {', '.join(names)}); resume "
            "with the same one"
        )
    cells = {}
    for cell in stored.cells:
        numbers = from_json(CellNumbers, cell.numbers, path) if cell.numbers else None
        key = CellKey(cell.method, cell.seed)
        cells[key] = Cell(cell.method, cell.seed, cell.state, cell.reason, numbers)
    return cells


def _recipe(config: RunConfig) -> dict[str, Any]:
    """The configuration that all cells share, as JSON-ready values.

    A cell has its own method and seed. Those written here are placeholders, which files of 0.1.0
    hold as well.
    """
    return cell_config(config, "decoder-only", seed=0).to_dict()


def _is_done(cell: Cell | None) -> bool:
    return cell is not None and cell.state == "done"


def _run_cell(config: RunConfig, output: Path, key: CellKey) -> Cell:
    own = cell_config(config, key.row, key.seed)
    numbers = in_own_process(run_cell, own, key.folder(output))
    return Cell(key.row, key.seed, "done", numbers=numbers)


def _write(config: RunConfig, cells: list[Cell], methods: Sequence[str], output: Path) -> None:
    """Writes compare.json with all cells, and tables and report of the given methods."""
    stored = [
        StoredCell(c.method, c.seed, c.state, c.reason, to_json(c.numbers) if c.numbers else {})
        for c in cells
    ]
    write_record(output / RECORD, StoredComparison(_recipe(config), stored))
    shown = [cell for cell in cells if cell.method in methods]
    rows = [summarise(method, [c for c in shown if c.method == method]) for method in methods]
    reference, differences = _differences(shown, methods)
    tables = {
        "Comparison": main_table(rows),
        f"Differences from {reference}": paired_table(reference, differences),
        "Dice after merging": merged_table(rows),
    }
    notes = notes_on(rows, shown)
    write_rows(output / "table.csv", [csv_row(row) for row in rows])
    write_rows(output / "differences.csv", differences)
    write_text(output / "table.md", as_markdown(tables, notes))
    write_comparison(
        output / REPORT,
        config=_recipe(config),
        tables=tables,
        rows=rows,
        reference=reference,
        differences=differences,
        notes=notes,
    )


def _differences(
    cells: Sequence[Cell], methods: Sequence[str]
) -> tuple[str, list[PairedDifference]]:
    """The title of the method that the others are compared with, and their differences from it."""
    scores: dict[str, dict[int, float]] = {}
    images: dict[str, dict[int, list[float | None]]] = {}
    for method in methods:
        for cell in cells:
            if cell.method == method and cell.numbers and cell.numbers.scores.dice is not None:
                scores.setdefault(method, {})[cell.seed] = cell.numbers.scores.dice
                images.setdefault(method, {})[cell.seed] = cell.numbers.image_dice or []
    titles = {method: METHODS[method].title for method in methods}
    reference, differences = paired_differences(scores, titles, images)
    return METHODS[reference].title, differences


# ---- Messages ------------------------------------------------------------------------------------


def _outcome(cell: Cell) -> str:
    if cell.numbers is None:
        return f"failed: {cell.reason}"
    dice = cell.numbers.scores.dice
    return "test Dice " + ("unknown" if dice is None else f"{dice:.4f}")


def check_complete(cells: Sequence[Cell], output: Path) -> None:
    """Checks that every cell has a result.

    Raises:
        UserError: a cell was refused or failed; the message names the methods and the reasons.
    """
    missing = [cell for cell in cells if cell.state != "done"]
    if missing:
        reasons: dict[str, str] = {}
        for cell in missing:
            reasons.setdefault(cell.method, str(cell.reason))
        raise UserError(
            f"{len(missing)} of {len(cells)} cells have no result ({_listed(reasons)}); the others "
            f"are in {output / REPORT}"
        )


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{method}: {reason}" for method, reason in reasons.items())
