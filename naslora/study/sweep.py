"""The study behind ``naslora compare`` and ``naslora ablate``: runs of rows x seeds, one table.

A row is a method, or a variant of the configuration. Each run is one of ``naslora train``:

runs/ROW/SEED/       the run's folder; finished runs are kept
    numbers.json     what the study measured of the run
table.md, table.csv  one row a method or variant
differences.csv      what each row gains on one of them, paired over the seeds
report.html          the tables, and plots of them
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from naslora.errors import UserError
from naslora.files import write_text
from naslora.records import read_record, write_record, write_rows
from naslora.report.comparison_report import write_comparison
from naslora.results import REPORT, RunNumbers, StudyRow
from naslora.study.measurement import run_and_measure
from naslora.study.rows import Row, with_seed
from naslora.study.summary import (
    as_markdown,
    csv_row,
    differences_from,
    differences_table,
    main_table,
    merged_table,
    notes_on,
    row_numbers,
)
from naslora.training.run_config import RunConfig

NUMBERS = "numbers.json"

Result = TypeVar("Result")


class Key(NamedTuple):
    """Names a run."""

    row: str
    seed: int

    def folder(self, output: Path) -> Path:
        """The run's folder, in the study's folder ``output``."""
        return output / "runs" / self.row / str(self.seed)


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    state: Literal["done", "failed", "refused"]
    """``refused``: the method does not fit the encoder, and nothing ran. ``failed``: the run ended
    with an error."""
    reason: str | None = None
    """Why there are no numbers."""
    numbers: RunNumbers | None = None
    """None unless the run is done."""


@dataclass(frozen=True)
class Study:
    """Which runs to make, and where to write their table."""

    command: str
    """The word before the progress messages."""
    title: str
    """Of the report."""
    recipe: RunConfig
    """What the rows share."""
    rows: Sequence[Row]
    seeds: Sequence[int]
    reference: str
    """The row that the others are compared with."""
    output: Path
    """Folder of the runs."""
    tables: Path
    """Folder of the tables and of the report."""
    costs: bool
    """Whether every run has a process of its own, so that its time and memory can be measured."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """The rows that do not fit the encoder, with the reason."""


def run_study(study: Study) -> dict[Key, Outcome]:
    """Makes the runs that the study's folder lacks, seed by seed, one at a time.

    A run that fails is marked, and the others go on. Tables are written after every run.

    Returns:
        All runs.
    """
    configs = {
        Key(row.name, seed): with_seed(row.config, seed)
        for seed in study.seeds
        for row in study.rows
    }
    outcomes = {key: _known(study, key) for key in configs}
    pending = [key for key, outcome in outcomes.items() if outcome is None]
    found = {key: outcome for key, outcome in outcomes.items() if outcome is not None}
    if not pending:
        _write(study, found)
    titles = {row.name: row.title for row in study.rows}
    started = time.perf_counter()
    for done, key in enumerate(pending, 1):
        say(study.command, f"run {done} of {len(pending)}: {titles[key.row]}, seed {key.seed}")
        found[key] = _run(study, key, configs[key])
        _write(study, found)
        left = (time.perf_counter() - started) / done * (len(pending) - done)
        say(study.command, f"{_in_words(found[key])}; about {left / 60:.0f} min left")
    return {key: found[key] for key in configs}


def _known(study: Study, key: Key) -> Outcome | None:
    """What is known of a run before it is made."""
    if key.row in study.refused:
        return Outcome("refused", study.refused[key.row])
    folder = key.folder(study.output)
    if not (folder / NUMBERS).is_file():
        return None
    return Outcome("done", numbers=read_record(folder / NUMBERS, RunNumbers))


def _run(study: Study, key: Key, config: RunConfig) -> Outcome:
    folder = key.folder(study.output)
    arguments = (config, folder, study.costs)
    try:
        if study.costs:
            numbers = in_own_process(run_and_measure, *arguments)
        else:
            numbers = run_and_measure(*arguments)
    except Exception as error:  # any error of one run must not end the others
        text = " ".join(str(error).split())
        known = isinstance(error, UserError)
        return Outcome("failed", text if known else f"{type(error).__name__}: {text}")
    write_record(folder / NUMBERS, numbers)
    return Outcome("done", numbers=numbers)


def _in_words(outcome: Outcome) -> str:
    if outcome.numbers is None:
        return f"failed: {outcome.reason}"
    dice = outcome.numbers.scores["dice"]
    return "test Dice " + ("unknown" if dice is None else f"{dice:.4f}")


def check_complete(outcomes: Mapping[Key, Outcome], study: Study) -> None:
    """Checks that every run has a result.

    Raises:
        UserError: a run was refused or failed; the message names the rows and the reasons.
    """
    missing = {key: own for key, own in outcomes.items() if own.state != "done"}
    if missing:
        reasons = {key.row: own.reason for key, own in reversed(missing.items())}
        listed = "; ".join(f"{row}: {reason}" for row, reason in reasons.items())
        raise UserError(
            f"{len(missing)} of {len(outcomes)} runs have no result ({listed}); the others are in "
            f"{study.tables / REPORT}"
        )


def check_distinct(name: str, values: Sequence[Any]) -> None:
    """Checks that rows or seeds can be the axis of a table.

    Raises:
        UserError: there are no values, or one is given twice.
    """
    if not values:
        raise UserError(f"{name} must name at least one")
    if len(set(values)) != len(values):
        raise UserError(f"{name} must be distinct, got {' '.join(map(str, values))}")


def say(command: str, text: str) -> None:
    """Prints a progress message of a command to the standard error."""
    print(f"{command}: {text}", file=sys.stderr, flush=True)


# ---- The tables ----------------------------------------------------------------------------------


def _write(study: Study, outcomes: Mapping[Key, Outcome]) -> None:
    """Writes tables and report."""
    runs: dict[str, dict[int, RunNumbers]] = {}
    for key, outcome in outcomes.items():
        if outcome.numbers is not None:
            runs.setdefault(key.row, {})[key.seed] = outcome.numbers
    rows = [_study_row(row, outcomes, runs.get(row.name, {})) for row in study.rows]
    titles = {row.name: row.title for row in study.rows}
    reference = titles[study.reference]
    differences = differences_from(study.reference, runs, titles)
    tables = {
        "Comparison": main_table(rows, "Method" if study.costs else "Variant"),
        f"Differences from {reference}": differences_table(reference, differences),
        "Dice after merging": merged_table(rows),
    }
    notes = notes_on(rows, [run for own in runs.values() for run in own.values()])
    write_rows(study.tables / "table.csv", [csv_row(row) for row in rows])
    write_rows(study.tables / "differences.csv", differences)
    write_text(study.tables / "table.md", as_markdown(tables, notes))
    write_comparison(
        study.tables / REPORT,
        title=study.title,
        config=study.recipe.to_dict(),
        tables=tables,
        rows=rows,
        reference=reference,
        differences=differences,
        notes=notes,
    )


def _study_row(
    row: Row, outcomes: Mapping[Key, Outcome], runs: Mapping[int, RunNumbers]
) -> StudyRow:
    own = {key.seed: outcome for key, outcome in outcomes.items() if key.row == row.name}
    reasons = [f"seed {s}: {o.reason}" for s, o in own.items() if o.state == "failed"]
    reasons += dict.fromkeys(str(o.reason) for o in own.values() if o.state == "refused")
    return StudyRow(
        row.name,
        row.title,
        seeds=len(runs),
        missing=len(own) - len(runs),
        refused=any(o.state == "refused" for o in own.values()),
        reason="; ".join(reasons),
        numbers=row_numbers(list(runs.values())) if runs else None,
    )


# ---- A process for a run -------------------------------------------------------------------------


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function in a fresh process and returns its result.

    The process ends when this one ends.

    Raises:
        RuntimeError: the process was killed.
        Exception: whatever the function raises.
    """
    # The fork server imports the function's module once. A process forked from it has all imports
    # and no results of an earlier run.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([function.__module__])
    try:
        with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
            try:
                return pool.submit(function, *arguments).result()
            except KeyboardInterrupt:  # the pool would wait for the process
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    except BrokenProcessPool as error:
        raise RuntimeError("its process was killed, perhaps for lack of memory") from error


def _end_with_parent() -> None:
    """Ends this process when its parent ends.

    Otherwise the run of a killed study would train on in a folder that a resumed one uses. An
    interrupt from the terminal is the parent's, which then terminates this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # a pool starts this process

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
