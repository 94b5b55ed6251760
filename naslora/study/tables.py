"""The tables and the report of a study, of the runs that are finished."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from naslora.files import write_text
from naslora.records import read_record, write_rows
from naslora.report.figures import BLUE, ORANGE, Drawing, row_drawing
from naslora.report.page import Part, write_page
from naslora.report.tables import Table, markdown_table, number
from naslora.results import REPORT, RunNumbers
from naslora.study.design import values_text
from naslora.study.differences import (
    LEVEL,
    Runs,
    differences_drawing,
    differences_from,
    differences_table,
    paired_difference,
)
from naslora.study.plan import TUNING, Outcomes, Study, Tuning, reason
from naslora.study.protocol import Fold
from naslora.study.rows import Row
from naslora.study.summary import COLUMNS, MERGED, Column, mean_and_spread, pooled, row_numbers

Tunings = Sequence[tuple[Row, Fold, Tuning]]
Missing = dict[str, dict[int, str]]
"""By row and seed, why it has no numbers: it was refused, or a run failed."""


def _results(study: Study, outcomes: Outcomes) -> tuple[Runs, Missing]:
    """The numbers of each row and seed over the folds, where all have some, and what is missing."""
    runs: dict[str, dict[int, RunNumbers]] = {row.title: {} for row in study.rows}
    missing: Missing = {row.name: {} for row in study.rows}
    for row in study.rows:
        for seed in study.seeds:
            own = {fold.name: outcomes.get(study.folder(row, seed, fold)) for fold in study.folds}
            known = [numbers for numbers in own.values() if isinstance(numbers, RunNumbers)]
            errors = ((k, reason(e)) for k, e in own.items() if isinstance(e, Exception))
            failed = "; ".join(f"{name}: {text}" if name else text for name, text in errors)
            if why := study.refused.get(row.name) or failed:
                missing[row.name][seed] = why
            elif len(known) == len(own):
                runs[row.title][seed] = pooled(known)
    return runs, missing


def write_tables(study: Study, outcomes: Outcomes) -> Missing:
    """Writes tables and report, and returns what they lack."""
    runs, missing = _results(study, outcomes)
    tunings = [
        (row, fold, read_record(path, Tuning))
        for row in study.rows
        for fold in study.folds
        if (path := study.folder(row, "tuning", fold) / TUNING).is_file()
    ]
    rows = [_table_row(row, study, missing[row.name], tunings, runs) for row in study.rows]
    reference = next(row.title for row in study.rows if row.name == study.reference)
    differences = differences_from(reference, runs, study.margin, study.groups)
    first = "Method" if study.costs else "Variant"
    merged = [row for row in rows if any(row.get(name) for name in MERGED if name != "dice")]
    tuned = {name: Column(name) for name in study.grid[0]}
    table = _number_table(rows, {**tuned, **COLUMNS}, first)
    others = {
        f"Differences from {reference}": differences_table(reference, differences, study.margin),
        "Folds": _fold_table(study, outcomes),
        "Tuning": _tuning_table(study, tunings),
        "Dice after merging": _number_table(merged, MERGED, first),
    }
    others = {name: other for name, other in others.items() if other.rows}
    notes = _notes_on(rows, [run for own in runs.values() for run in own.values()])
    text = [f"**{name}**\n\n{markdown_table(other)}" for name, other in others.items()]
    write_rows(study.tables / "table.csv", rows)
    write_rows(study.tables / "differences.csv", [own.row() for own in differences])
    write_text(study.tables / "table.md", "\n\n".join([markdown_table(table), *text, *notes, ""]))
    sections: dict[str, list[Part]] = {
        "Comparison": [table, *notes, _dice_drawing(runs)],
        **{name: [other] for name, other in others.items()},
        "Protocol": [*study.protocol],
    }
    if differences:
        drawing = differences_drawing(reference, differences, study.margin)
        sections[f"Differences from {reference}"].append(drawing)
    write_page(study.tables / REPORT, study.title, study.recipe.to_dict(), [], sections)
    return missing


def _table_row(
    row: Row, study: Study, missing: Mapping[int, str], tunings: Tunings, runs: Runs
) -> dict[str, Any]:
    """The row of table.csv. Of a tuned setting it has the chosen values, and how often each was."""
    refused = study.refused.get(row.name)
    tuned = {}
    for name in study.grid[0]:
        own = Counter(t.trials[t.chosen].values[name] for of, _, t in tunings if of is row)
        once = [*own.values()] == [len(study.folds)]
        tuned[name] = ", ".join(v if once else f"{v} ({n})" for v, n in own.most_common())
    return {
        "row": row.name,
        "title": row.title,
        "seeds": len(runs[row.title]),
        "missing": len(missing),
        "refused": refused is not None,
        "reason": refused or "; ".join(f"seed {seed}: {text}" for seed, text in missing.items()),
        **tuned,
        **row_numbers([*runs[row.title].values()]),
    }


def _number_table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Column], first: str
) -> Table:
    """The columns, by their name in table.csv, that a row has, after the rows' titles and their
    numbers of seeds; ``first`` is the title of the first column."""
    always = {"trainable_parameters", "share_of_parameters", "dice"}
    shown = [n for n in columns if n in always or any(row.get(n) is not None for row in rows)]
    table = []
    for row in rows:
        failed = f" ({row['missing']} failed)" if row["missing"] else ""
        title = row["title"] + (" (refused)" if row["refused"] else failed)
        cells = [columns[name].cell(row, name) for name in shown]
        table.append([title, str(row["seeds"]), *cells])
    return Table([first, "Seeds", *(columns[name].title for name in shown)], table)


def _notes_on(rows: Sequence[Mapping[str, Any]], runs: Sequence[RunNumbers]) -> list[str]:
    """What the numbers of a table are, under what load they were taken, and what is missing."""
    notes = [
        "Scores are means over the test images, then mean ± standard deviation over the seeds. "
        "Differences are taken seed by seed."
    ]
    timed = [run for run in runs if run.machine]
    if timed:
        loads = [run.load for run in timed]
        notes.append(
            "Times are medians over the seeds, memory is the maximum. Training seconds are those "
            "of all steps of an epoch, steps for α included, per training image. Times were taken "
            f"with one run at a time, {timed[0].machine} at a load average of {min(loads):.1f} to "
            f"{max(loads):.1f}. They compare only if little else ran beside the runs."
        )
    if any(run.image_dice for run in runs):
        notes.append(
            "All seeds share the test images. The interval over the images says what other images "
            "may change, that over the seeds what another training may change. Read the wider one."
        )
    return notes + [f"{row['title']}: {row['reason']}." for row in rows if row["missing"]]


def _fold_table(study: Study, outcomes: Outcomes) -> Table:
    """The Dice of each fold, over the seeds, and its mean over the folds; none without folds."""
    rows = []
    names = [fold.name for fold in study.folds if fold.name]
    for row in study.rows if names else ():
        dice: dict[int, float] = {}
        for k, fold in enumerate(study.folds):
            found = [outcomes.get(study.folder(row, seed, fold)) for seed in study.seeds]
            known = [own.numbers["dice"] if isinstance(own, RunNumbers) else None for own in found]
            if (mean := mean_and_spread(known)[0]) is not None:
                dice[k] = mean
        if not dice:
            continue
        over = paired_difference("", dice, dict.fromkeys(dice, 0.0))
        text = number(over.mean, ".3f")
        if over.low is not None and over.high is not None:
            text += f" ({over.low:.3f} to {over.high:.3f})"
        best = study.folder(row, study.seeds[0], study.folds[max(dice, key=lambda k: dice[k])])
        cells = [number(dice.get(k), ".3f") for k in range(len(names))]
        rows.append([row.title, *cells, text, str(best.relative_to(study.output))])
    return Table(["Method", *names, f"Mean ({LEVEL:.0%} over the folds)", "Best"], rows)


def _tuning_table(study: Study, tunings: Tunings) -> Table:
    """The Dice of each trial, the chosen one marked."""
    rows = []
    for row, fold, tuning in tunings:
        cells = ["failed" if trial.failed else number(trial.dice) for trial in tuning.trials]
        cells[tuning.chosen] += " (chosen)"
        rows.append([row.title, fold.name.removeprefix("fold-"), *cells])
    return Table(["Method", "Fold", *map(values_text, study.grid)], rows)


def _dice_drawing(runs: Runs) -> Drawing:
    def draw(axes: Axes) -> None:
        for place, own in enumerate(runs.values()):
            dice = np.array([run.numbers["dice"] for run in own.values()], float)  # None: NaN
            axes.plot(dice, [place] * len(dice), "o", color=BLUE, markersize=5, alpha=0.6)
            if own:
                axes.vlines(dice.mean(), place - 0.35, place + 0.35, color=ORANGE, linewidth=2)
        axes.set_xlabel("test Dice")

    return row_drawing("dice", "Test Dice: a dot for each seed, a line at the mean.", [*runs], draw)
