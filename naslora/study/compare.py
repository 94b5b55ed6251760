"""``naslora compare`` and ``naslora ablate``: runs of rows x seeds, one table.

A row is a method, or a variant of the configuration. Each run is one of ``naslora train``:

runs/ROW/SEED/       the run's folder; finished runs are kept
    numbers.json     what the study measured of the run
table.md, table.csv  one row a method or variant
differences.csv      what each row gains on one of them, paired over the seeds
report.html          the tables, and plots of the test Dice
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.axes import Axes

from naslora.choices import AblationName
from naslora.errors import UserError
from naslora.files import write_text
from naslora.records import read_record, write_record, write_rows
from naslora.report.figures import (
    BLUE,
    ORANGE,
    Drawing,
    as_array,
    draw_row_axis,
    row_size,
)
from naslora.report.page import Part, write_page
from naslora.report.run_report import page_title
from naslora.report.tables import markdown_table
from naslora.results import REPORT, RunNumbers
from naslora.study.measurement import find_refusals, run_and_measure
from naslora.study.rows import BASE, Row, ablation_rows, method_rows
from naslora.study.summary import (
    COLUMNS,
    MERGED,
    Runs,
    differences_from,
    differences_table,
    notes_on,
    number_table,
    row_numbers,
)
from naslora.training.resolve import resolve
from naslora.training.run import check_output
from naslora.training.run_config import RunConfig

NUMBERS = "numbers.json"
LORA = "lora"
"""The method that others are compared with, if it is among them."""

Result = TypeVar("Result")
Outcomes = dict[tuple[str, int], RunNumbers | str]
"""By row and seed, what a run gave, or why there are no numbers."""


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

    def runs(self) -> Iterator[tuple[Row, int, Path]]:
        """Each row, with each seed's configuration and folder, seed by seed."""
        for seed in self.seeds:
            for row in self.rows:
                config = replace(row.config, seed=seed)
                folder = self.output / "runs" / row.name / str(seed)
                yield row._replace(config=config), seed, folder


# ---- The commands --------------------------------------------------------------------------------


def compare(
    config: RunConfig, methods: Sequence[str], seeds: Sequence[int], output: Path, resume: bool
) -> None:
    """Trains every method with every seed under one recipe, and writes tables and report.

    A method that does not fit the encoder is refused before anything trains.

    Args:
        config: the recipe: data, model, schedule. Its method and seed are replaced.
        methods: names of ``naslora.methods.METHODS``, in the order of the rows.
        seeds: seeds of the data order, the held-out images and the fresh parameters.
        output: must be new or empty unless ``resume``.
        resume: keep the finished runs of ``output`` and make the others. Methods and seeds may
            have been added.

    Raises:
        UserError: the recipe cannot work for any method, or belongs to another comparison; or,
            after all others, a method was refused or a run failed.
    """
    if (config.method, config.seed) != (RunConfig.method, RunConfig.seed):
        raise UserError("compare takes --methods and --seeds, not --method or --seed")
    _check_distinct("methods", methods)
    config = resolve(config)
    rows = method_rows(config, methods)
    title = page_title(config.to_dict(), f"{len(methods)} methods")
    study = Study("compare", title, config, rows, seeds, LORA, output, output, costs=True)
    _check_output(study, resume)
    refused = in_own_process(find_refusals, rows)
    fitting = [method for method in methods if method not in refused]
    if not fitting:
        raise UserError("no method fits: " + "; ".join(f"{m}: {r}" for m, r in refused.items()))
    for method, reason in refused.items():
        say("compare", f"{method} is left out: {reason}")
    reference = LORA if LORA in methods else fitting[0]
    run_study(replace(study, reference=reference, refused=refused))


def ablate(
    name: AblationName, config: RunConfig, seeds: Sequence[int], output: Path, resume: bool
) -> str:
    """Varies one setting of the method (paper, Tables 6-9 and D1), and writes the table.

    The unchanged method is a row of every ablation, so ablations in one folder share its runs.

    Args:
        name: a key of ``naslora.study.rows.ABLATIONS``.
        config: the unchanged method. Its seed is replaced.
        seeds: seeds of each row's runs.
        output: must be new or empty unless ``resume``. The table is in its folder ``name``.
        resume: keep the finished runs in ``output`` and make the others.

    Returns:
        The table as Markdown.

    Raises:
        UserError: the configuration has nothing to ablate; ``output`` holds something else, or
            runs of another configuration; or, after all others, a run failed.
    """
    config = resolve(config)
    rows = ablation_rows(name, config)
    title = f"Ablation of {page_title(config.to_dict())}: {name}"
    tables = output / name
    study = Study(f"ablate {name}", title, config, rows, seeds, BASE, output, tables, costs=False)
    _check_output(study, resume)
    run_study(study)
    return (tables / "table.md").read_text(encoding="utf-8")


def _check_output(study: Study, resume: bool) -> None:
    """Checks the seeds, and the folders before anything runs."""
    _check_distinct("seeds", study.seeds)
    if not resume:
        check_output(study.recipe, study.output, resume)
    for row, _, folder in study.runs():
        check_output(row.config, folder, resume=True)


def _check_distinct(name: str, values: Sequence[str] | Sequence[int]) -> None:
    """Checks that rows or seeds can be the axis of a table."""
    if not values:
        raise UserError(f"{name} must name at least one")
    if len(set(values)) != len(values):
        raise UserError(f"{name} must be distinct, got {' '.join(map(str, values))}")


# ---- The runs ------------------------------------------------------------------------------------


def run_study(study: Study) -> None:
    """Makes the runs that the study's folder lacks, seed by seed, one at a time.

    A run that fails is marked, and the others go on. Tables are written after every run.

    Raises:
        UserError: at the end, if a run was refused or failed; names the rows and the reasons.
    """
    outcomes: Outcomes = {}
    pending = []
    for row, seed, folder in study.runs():
        if row.name in study.refused:
            outcomes[row.name, seed] = study.refused[row.name]
        elif (folder / NUMBERS).is_file():
            outcomes[row.name, seed] = read_record(folder / NUMBERS, RunNumbers)
        else:
            pending.append((row, seed, folder))
    if not pending:
        _write(study, outcomes)
    started = time.perf_counter()
    for done, (row, seed, folder) in enumerate(pending, 1):
        say(study.command, f"run {done} of {len(pending)}: {row.title}, seed {seed}")
        outcome = outcomes[row.name, seed] = _run(row.config, folder, study.costs)
        _write(study, outcomes)
        left = (time.perf_counter() - started) / done * (len(pending) - done)
        found = f"failed: {outcome}"
        if isinstance(outcome, RunNumbers):
            dice = outcome.scores["dice"]
            found = "test Dice " + ("unknown" if dice is None else f"{dice:.4f}")
        say(study.command, f"{found}; about {left / 60:.0f} min left")
    missing = {key: reason for key, reason in outcomes.items() if isinstance(reason, str)}
    if missing:
        reasons = {row: reason for (row, _), reason in missing.items()}
        listed = "; ".join(f"{row}: {reason}" for row, reason in reasons.items())
        raise UserError(
            f"{len(missing)} of {len(outcomes)} runs have no result ({listed}); the others are in "
            f"{study.tables / REPORT}"
        )


def _run(config: RunConfig, folder: Path, costs: bool) -> RunNumbers | str:
    """The run's numbers, or its error as text."""
    arguments = (config, folder, costs)
    try:
        if costs:
            numbers = in_own_process(run_and_measure, *arguments)
        else:
            numbers = run_and_measure(*arguments)
    except Exception as error:  # any error of one run must not end the others
        text = " ".join(str(error).split())
        return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    write_record(folder / NUMBERS, numbers)
    return numbers


def say(command: str, text: str) -> None:
    """Prints a progress message of a command to the standard error."""
    print(f"{command}: {text}", file=sys.stderr, flush=True)


# ---- The tables ----------------------------------------------------------------------------------


def _write(study: Study, outcomes: Outcomes) -> None:
    """Writes tables and report."""
    runs: dict[str, dict[int, RunNumbers]] = {row.name: {} for row in study.rows}
    for (name, seed), outcome in sorted(outcomes.items()):
        if isinstance(outcome, RunNumbers):
            runs[name][seed] = outcome
    rows = [_table_row(row, study, outcomes, list(runs[row.name].values())) for row in study.rows]
    titles = {row.name: row.title for row in study.rows}
    reference = titles[study.reference]
    differences = differences_from(study.reference, runs, titles)
    first = "Method" if study.costs else "Variant"
    merged = [row for row in rows if any(row.get(name) for name in MERGED if name != "dice")]
    table = number_table(rows, COLUMNS, first)
    others = {
        f"Differences from {reference}": differences_table(reference, differences),
        "Dice after merging": number_table(merged, MERGED, first),
    }
    others = {name: other for name, other in others.items() if other.rows}
    notes = notes_on(rows, [run for own in runs.values() for run in own.values()])
    text = [f"**{name}**\n\n{markdown_table(other)}" for name, other in others.items()]
    write_rows(study.tables / "table.csv", rows)
    write_rows(study.tables / "differences.csv", differences)
    write_text(study.tables / "table.md", "\n\n".join([markdown_table(table), *text, *notes, ""]))
    caption = "Test Dice: a dot for each seed, a line at the mean."
    draw = partial(_draw_dice, runs=runs, titles=list(titles.values()))
    sections: dict[str, Sequence[Part]] = {
        "Comparison": [table, *notes, Drawing("dice", caption, draw, row_size(len(rows)))],
        **{name: [other] for name, other in others.items()},
    }
    write_page(study.tables / REPORT, study.title, study.recipe.to_dict(), [], sections)


def _table_row(
    row: Row, study: Study, outcomes: Outcomes, runs: Sequence[RunNumbers]
) -> dict[str, Any]:
    """The row of table.csv."""
    refused = study.refused.get(row.name)
    own = {seed: outcome for (name, seed), outcome in outcomes.items() if name == row.name}
    failed = [f"seed {seed}: {reason}" for seed, reason in own.items() if isinstance(reason, str)]
    return {
        "row": row.name,
        "title": row.title,
        "seeds": len(runs),
        "missing": len(own) - len(runs),
        "refused": refused is not None,
        "reason": "; ".join(failed) if refused is None else refused,
        **row_numbers(runs),
    }


def _draw_dice(axes: Axes, runs: Runs, titles: Sequence[str]) -> None:
    """A row a method: a dot for each seed, and a line at the mean."""
    for place, own in enumerate(runs.values()):
        dice = as_array(run.scores["dice"] for run in own.values())
        axes.plot(dice, [place] * len(dice), "o", color=BLUE, markersize=5, alpha=0.6)
        if own:
            axes.vlines(dice.mean(), place - 0.35, place + 0.35, color=ORANGE, linewidth=2)
    draw_row_axis(axes, titles)
    axes.set_xlabel("test Dice")


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
