"""``naslora compare`` and ``naslora ablate``: which rows a study has."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from naslora.choices import AblationName
from naslora.errors import UserError
from naslora.report.run_report import page_title
from naslora.study.measurement import find_refusals
from naslora.study.rows import BASE, ablation_rows, method_rows
from naslora.study.sweep import Study, in_own_process, run_study, say
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
