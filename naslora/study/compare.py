"""``naslora compare`` and ``naslora ablate``: which rows a study has."""

from collections.abc import Sequence
from pathlib import Path

from naslora.choices import AblationName
from naslora.errors import UserError
from naslora.report.page import page_title
from naslora.study.measurement import find_refusals
from naslora.study.rows import BASE, Row, ablation_rows, method_rows, with_seed
from naslora.study.sweep import (
    Key,
    Study,
    check_complete,
    check_distinct,
    in_own_process,
    run_study,
    say,
)
from naslora.training.resolve import resolve
from naslora.training.run import check_output
from naslora.training.run_config import RunConfig

LORA = "lora"
"""The method that others are compared with, if it is among them."""


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
    check_distinct("methods", methods)
    config = resolve(config)
    rows = method_rows(config, methods)
    _check_output(config, rows, seeds, output, resume)
    refused = in_own_process(find_refusals, rows)
    if len(refused) == len(rows):
        raise UserError("no method fits: " + "; ".join(f"{m}: {r}" for m, r in refused.items()))
    for method, reason in refused.items():
        say("compare", f"{method} is left out: {reason}")
    study = Study(
        command="compare",
        title=page_title({**config.to_dict(), "method": f"{len(methods)} methods"}),
        recipe=config,
        rows=rows,
        seeds=seeds,
        reference=LORA if LORA in methods else next(m for m in methods if m not in refused),
        output=output,
        tables=output,
        costs=True,
        refused=refused,
    )
    check_complete(run_study(study), study)


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
    _check_output(config, rows, seeds, output, resume)
    study = Study(
        command=f"ablate {name}",
        title=f"Ablation of {config.method} on {config.model.name}: {name}",
        recipe=config,
        rows=rows,
        seeds=seeds,
        reference=BASE,
        output=output,
        tables=output / name,
        costs=False,
    )
    check_complete(run_study(study), study)
    return (study.tables / "table.md").read_text(encoding="utf-8")


def _check_output(
    config: RunConfig, rows: Sequence[Row], seeds: Sequence[int], output: Path, resume: bool
) -> None:
    """Checks the folders before anything runs."""
    check_distinct("seeds", seeds)
    if not resume:
        check_output(config, output, resume)
    for row in rows:
        for seed in seeds:
            folder = Key(row.name, seed).folder(output)
            check_output(with_seed(row.config, seed), folder, resume=True)
