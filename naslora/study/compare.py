"""``naslora compare`` and ``naslora ablate``: runs of rows x seeds, one table.

A row is a method, or a variant of the configuration. Each run is one of ``naslora train``:

runs/ROW/SEED/       the run's folder, with folds one a fold; finished runs are kept
    numbers.json     what the study measured of the run
table.md, table.csv  one row a method or variant
differences.csv      what each row gains on one of them, paired over seeds and images
report.html          the tables, and plots of the test Dice
protocol.*, images.csv, lists/   what ``compare`` fixes before it runs (protocol.py)
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from naslora.choices import AblationName
from naslora.errors import UserError
from naslora.records import read_record, write_record
from naslora.report.run_report import page_title
from naslora.report.tables import number
from naslora.results import CONFIG, REPORT, RunNumbers
from naslora.settings import Seed, checked
from naslora.study.design import Design, Launch, parse_grid, values_text, with_values
from naslora.study.launchers import Job, finished, jobs
from naslora.study.measurement import find_refusals, in_own_process, run_and_measure
from naslora.study.plan import NUMBERS, TUNING, Outcome, Outcomes, Run, Study, reason
from naslora.study.protocol import (
    LORA,
    Fold,
    check_protocol,
    find_images,
    in_words,
    make_protocol,
    write_protocol,
)
from naslora.study.rows import BASE, ablation_rows, method_rows
from naslora.study.tables import write_tables
from naslora.training.resolve import resolve
from naslora.training.run import check_output
from naslora.training.run_config import RunConfig

Made = Iterator[tuple[Run, Outcome]]
"""Runs that were made, in the order of their ends."""

# ---- The commands --------------------------------------------------------------------------------


def compare(
    config: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    output: Path,
    resume: bool,
    design: Design | None = None,
    launch: Launch | None = None,
) -> None:
    """Trains every method with every seed under one recipe, and writes tables and report.

    A method that does not fit the encoder is refused before anything trains.

    Arguments as the options of ``naslora compare``. ``config`` is the recipe: data, model,
    schedule; its method and seed are replaced. With ``resume``, methods and seeds may have been
    added if ``design`` neither tunes nor draws folds. Without ``launch``, the runs are made here.

    Raises:
        UserError: the recipe cannot work for any method, or belongs to another comparison; or,
            after all others, a method was refused or a run failed.
    """
    if (config.method, config.seed) != (RunConfig.method, RunConfig.seed):
        raise UserError("compare takes --methods and --seeds, not --method or --seed")
    _check_distinct("methods", methods)
    _check_distinct("seeds", [checked("seed", seed, Seed) for seed in seeds])
    design = design or Design()
    drawn = design.folds is not None  # each fold has training images of its own
    recipe = resolve(config, fit=not drawn)
    # What depends on tuned settings, such as the start of the search, is still open in the rows.
    rows = method_rows(replace(recipe, training=config.training), methods)
    grid = parse_grid(design.tune)
    tried = [
        row._replace(config=resolve(with_values(row.config, values), fit=not drawn))
        for row in rows
        for values in grid
    ]
    images = find_images(recipe, design, output)
    protocol = make_protocol(recipe, methods, seeds, design, images)
    study = Study(
        command="compare",
        title=page_title(recipe.to_dict(), f"{len(methods)} methods"),
        recipe=recipe,
        rows=rows,
        seeds=seeds,
        output=output,
        tables=output,
        costs=True,
        margin=design.margin,
        folds=images.folds,
        groups=images.groups,
        grid=grid,
        protocol=in_words(protocol),
        launch=launch or Launch(),
    )
    if resume:
        check_protocol(protocol, output)
    _check_output(study, resume)
    samples = [sample for part in images.samples.values() for sample in part]
    refused = in_own_process(find_refusals, tried, samples)
    fitting = [method for method in methods if method not in refused]
    if not fitting:
        raise UserError("no method fits: " + "; ".join(f"{m}: {r}" for m, r in refused.items()))
    for method, why in refused.items():
        study.say(f"{method} is left out: {why}")
    write_protocol(protocol, images, output)
    reference = LORA if LORA in methods else fitting[0]
    run_study(replace(study, reference=reference, refused=refused))


def ablate(
    name: AblationName,
    config: RunConfig,
    seeds: Sequence[int],
    output: Path,
    resume: bool,
    launch: Launch | None = None,
) -> str:
    """Varies one setting of the method (paper, Tables 6-9 and D1); returns the table as Markdown.

    The unchanged method is a row of every ablation, so ablations in one folder share its runs.
    ``config`` is the unchanged method; its seed is replaced. The tables are in the folder ``name``
    of ``output``. Other arguments as in ``compare``.

    Raises:
        UserError: the configuration has nothing to ablate; ``output`` holds something else, or
            runs of another configuration; or, after all others, a run failed.
    """
    _check_distinct("seeds", [checked("seed", seed, Seed) for seed in seeds])
    config = resolve(config)
    study = Study(
        command=f"ablate {name}",
        title=f"Ablation of {page_title(config.to_dict())}: {name}",
        recipe=config,
        rows=ablation_rows(name, config),
        seeds=seeds,
        output=output,
        tables=output / name,
        costs=False,
        margin=Design.margin,
        folds=[Fold("", config.data)],
        reference=BASE,
        launch=launch or Launch(),
    )
    _check_output(study, resume)
    run_study(study)
    return (study.tables / "table.md").read_text(encoding="utf-8")


def _check_output(study: Study, resume: bool) -> None:
    """Checks the folders before anything runs."""
    if not resume:
        check_output(study.recipe, study.output, resume)
    for run in study.runs():
        started = (run.folder / CONFIG).is_file()  # the lists of its images exist then
        if run.finished and not started:
            continue  # its numbers were kept, and nothing else of it
        tuned = study.folder(run.row, "tuning", run.fold) / TUNING
        if not run.fold.inner or run.tries is not None or tuned.is_file():
            config = study.config(run, {}) if started else study.recipe
            check_output(config, run.folder, resume=True)


def _check_distinct(name: str, values: Sequence[str] | Sequence[int]) -> None:
    """Checks that rows or seeds can be the axis of a table."""
    if not values:
        raise UserError(f"{name} must name at least one")
    if len(set(values)) != len(values):
        raise UserError(f"{name} must be distinct, got {' '.join(map(str, values))}")


# ---- The runs ------------------------------------------------------------------------------------


def run_study(study: Study) -> None:
    """Makes the runs that the study's folder lacks, seed by seed: one at a time, or as jobs.

    A run that fails is marked, and the others go on. Tables are written after every run.

    Raises:
        UserError: as ``jobs``; at the end, if a run was refused or failed; names the rows and the
            reasons.
    """
    runs = [*study.runs()]
    measured = (run.folder for run in runs if (run.folder / NUMBERS).is_file())
    outcomes: Outcomes = {own: read_record(own / NUMBERS, RunNumbers) for own in measured}
    pending = [run for run in runs if not run.finished]
    missing = {} if pending else write_tables(study, outcomes)
    started = time.perf_counter()
    made = _made_here if study.launch.launcher == "local" else _made_by_jobs
    for done, (run, outcome) in enumerate(made(study, pending, outcomes), 1):
        outcomes[run.folder] = outcome
        if isinstance(outcome, RunNumbers):
            write_record(run.folder / NUMBERS, outcome)
            found = f"test Dice {number(outcome.numbers['dice'])}"
        else:
            found = f"failed: {reason(outcome)}"
        missing = write_tables(study, outcomes)
        left = (time.perf_counter() - started) / done * (len(pending) - done)
        study.say(f"{found}; runs left: {len(pending) - done}, about {left / 60:.0f} min")
    reasons = {row: [*own.values()] for row, own in missing.items() if own}
    if reasons:
        listed = "; ".join(f"{row}: {own[-1]}" for row, own in reasons.items())
        raise UserError(
            f"{sum(map(len, reasons.values()))} of {len(study.rows) * len(study.seeds)} runs have "
            f"no result ({listed}); the others are in {study.tables / REPORT}"
        )


def _describe(run: Run) -> str:
    """The row, seed and fold of a run, and the values that it tries."""
    parts = [run.row.title, f"seed {run.seed}", run.fold.name]
    if run.tries is not None:
        parts.append(f"tries {values_text(run.tries)} ({run.folder.name})")
    return ", ".join(part for part in parts if part)


def _made_here(study: Study, pending: Sequence[Run], outcomes: Outcomes) -> Made:
    """Makes the runs one after another."""
    measure = partial(in_own_process, run_and_measure) if study.costs else run_and_measure
    for place, run in enumerate(pending, 1):
        study.say(f"run {place} of {len(pending)}: {_describe(run)}")
        try:
            yield run, measure(*_arguments(study, run, outcomes))
        except Exception as error:  # any error of one run must not end the others
            yield run, error


def _made_by_jobs(study: Study, pending: Sequence[Run], outcomes: Outcomes) -> Made:
    """The same by jobs. All start at once, except runs that wait for their tuning."""
    waiting, running = [*pending], list[Job]()
    with jobs(study.launch, study.output) as submit:
        try:
            while waiting or running:
                open_runs = {run.folder for run in (*waiting, *(job.run for job in running))}
                for run in [*waiting]:
                    trials = () if run.tries is not None else study.trials(run.row, run.fold)
                    if open_runs.isdisjoint(trial.folder for trial in trials):
                        waiting.remove(run)
                        study.say(f"starts {_describe(run)}")
                        try:
                            running.append(Job(run, submit, _arguments(study, run, outcomes)))
                        except UserError as error:  # nothing was found by tuning
                            yield run, error
                if running:
                    yield finished(running)
        finally:
            for job in running:  # after an interrupt
                job.running.cancel()


def _arguments(study: Study, run: Run, outcomes: Outcomes) -> tuple[RunConfig, Path, bool]:
    """Those of ``run_and_measure``."""
    return study.config(run, outcomes), run.folder, study.costs and run.tries is None
