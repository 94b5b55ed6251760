"""The tables and the report of a study, of the runs that are finished."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from naslora.errors import UserError
from naslora.files import write_text
from naslora.records import read_record, write_rows
from naslora.report.figures import BLUE, ORANGE, Drawing, as_array, draw_row_axis, row_size
from naslora.report.page import Part, write_page
from naslora.report.tables import Table, markdown_table, number
from naslora.results import REPORT, RunNumbers
from naslora.study.design import values_text
from naslora.study.differences import (
    LEVEL,
    Runs,
    differences_from,
    differences_table,
    draw_differences,
    paired_difference,
)
from naslora.study.plan import TUNING, Outcomes, Study, Tuning
from naslora.study.rows import Row
from naslora.study.summary import (
    COLUMNS,
    MERGED,
    Column,
    mean_and_spread,
    notes_on,
    number_table,
    pooled,
    row_numbers,
)

Tunings = Mapping[tuple[str, str], Tuning]
"""By row and fold."""
Missing = dict[str, dict[int, str]]
"""By row and seed, why it has no numbers: it was refused, or a run failed."""


def reason(error: Exception) -> str:
    """The error of a run as one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _results(study: Study, outcomes: Outcomes) -> tuple[Runs, Missing]:
    """The numbers of each row and seed over the folds, where all have some, and what is missing."""
    runs: dict[str, dict[int, RunNumbers]] = {row.name: {} for row in study.rows}
    missing: Missing = {row.name: {} for row in study.rows}
    for row in study.rows:
        for seed in study.seeds:
            own = {fold.name: outcomes.get(study.folder(row, seed, fold)) for fold in study.folds}
            known = [numbers for numbers in own.values() if isinstance(numbers, RunNumbers)]
            failed = [
                f"{name}: {reason(error)}" if name else reason(error)
                for name, error in own.items()
                if isinstance(error, Exception)
            ]
            if row.name in study.refused:
                missing[row.name][seed] = study.refused[row.name]
            elif failed:
                missing[row.name][seed] = "; ".join(failed)
            elif len(known) == len(own):
                runs[row.name][seed] = pooled(known)
    return runs, missing


def write_tables(study: Study, outcomes: Outcomes) -> Missing:
    """Writes tables and report, and returns what they lack."""
    runs, missing = _results(study, outcomes)
    tunings = {
        (row.name, fold.name): read_record(path, Tuning)
        for row in study.rows
        for fold in study.folds
        if (path := study.folder(row, "tuning", fold) / TUNING).is_file()
    }
    rows = [_table_row(row, study, missing[row.name], tunings, runs) for row in study.rows]
    titles = {row.name: row.title for row in study.rows}
    reference = titles[study.reference]
    differences = differences_from(study.reference, runs, titles, study.margin, study.groups)
    first = "Method" if study.costs else "Variant"
    merged = [row for row in rows if any(row.get(name) for name in MERGED if name != "dice")]
    tuned = {name: Column(name) for values in study.grid[:1] for name in values}
    table = number_table(rows, {**tuned, **COLUMNS}, first)
    others = {
        f"Differences from {reference}": differences_table(reference, differences, study.margin),
        "Folds": _fold_table(study, outcomes, titles),
        "Tuning": _tuning_table(study, tunings, titles),
        "Dice after merging": number_table(merged, MERGED, first),
    }
    others = {name: other for name, other in others.items() if other.rows}
    notes = notes_on(rows, [run for own in runs.values() for run in own.values()])
    text = [f"**{name}**\n\n{markdown_table(other)}" for name, other in others.items()]
    write_rows(study.tables / "table.csv", rows)
    write_rows(study.tables / "differences.csv", [own.row() for own in differences])
    write_text(study.tables / "table.md", "\n\n".join([markdown_table(table), *text, *notes, ""]))
    caption = "Test Dice: a dot for each seed, a line at the mean."
    draw = partial(_draw_dice, runs=runs, titles=list(titles.values()))
    sections: dict[str, list[Part]] = {
        "Comparison": [table, *notes, Drawing("dice", caption, draw, row_size(len(rows)))],
        **{name: [other] for name, other in others.items()},
        "Protocol": [*study.protocol],
    }
    if differences:
        caption = (
            "Difference in test Dice: a dot, with a line for the 95 % interval over the images. In "
            f"the band are differences below {study.margin:g}."
        )
        draw = partial(draw_differences, differences=differences, reference=reference)
        draw = partial(draw, margin=study.margin)
        drawing = Drawing("differences", caption, draw, row_size(len(differences)))
        sections[f"Differences from {reference}"].append(drawing)
    write_page(study.tables / REPORT, study.title, study.recipe.to_dict(), [], sections)
    return missing


def _table_row(
    row: Row, study: Study, missing: Mapping[int, str], tunings: Tunings, runs: Runs
) -> dict[str, Any]:
    """The row of table.csv. Of a tuned setting it has the chosen values, and how often each was."""
    refused = study.refused.get(row.name)
    tuned = {}
    for name in study.grid[0] if study.grid else ():
        own = Counter(tuning.values[name] for key, tuning in tunings.items() if key[0] == row.name)
        once = [*own.values()] == [len(study.folds)]
        tuned[name] = ", ".join(v if once else f"{v} ({n})" for v, n in own.most_common())
    return {
        "row": row.name,
        "title": row.title,
        "seeds": len(runs[row.name]),
        "missing": len(missing),
        "refused": refused is not None,
        "reason": refused or "; ".join(f"seed {seed}: {text}" for seed, text in missing.items()),
        **tuned,
        **row_numbers([*runs[row.name].values()]),
    }


def _fold_table(study: Study, outcomes: Outcomes, titles: Mapping[str, str]) -> Table:
    """The Dice of each fold, over the seeds, and its mean over the folds; none without folds."""
    rows = []
    names = [fold.name for fold in study.folds if fold.name]
    for row in study.rows if names else ():
        dice: dict[int, float] = {}
        for k, fold in enumerate(study.folds):
            found = [outcomes.get(study.folder(row, seed, fold)) for seed in study.seeds]
            known = [own.numbers["dice"] for own in found if isinstance(own, RunNumbers)]
            mean = mean_and_spread(known).mean
            if mean is not None and len(known) == len(found):
                dice[k] = mean
        if not dice:
            continue
        over = paired_difference("", dice, dict.fromkeys(dice, 0.0))
        text = number(over.mean, ".3f")
        if over.low is not None and over.high is not None:
            text += f" ({over.low:.3f} to {over.high:.3f})"
        best = study.folder(row, study.seeds[0], study.folds[max(dice, key=lambda k: dice[k])])
        cells = [number(dice.get(k), ".3f") for k in range(len(names))]
        rows.append([titles[row.name], *cells, text, str(best.relative_to(study.output))])
    return Table(["Method", *names, f"Mean ({LEVEL:.0%} over the folds)", "Best"], rows)


def _tuning_table(study: Study, tunings: Tunings, titles: Mapping[str, str]) -> Table:
    """The Dice of each trial, the chosen one marked."""
    rows = []
    for (name, fold), tuning in tunings.items():
        cells = ["failed" if trial.failed else number(trial.dice) for trial in tuning.trials]
        cells[tuning.chosen] += " (chosen)"
        rows.append([titles[name], fold.removeprefix("fold-"), *cells])
    return Table(["Method", "Fold", *map(values_text, study.grid)], rows)


def _draw_dice(axes: Axes, runs: Runs, titles: Sequence[str]) -> None:
    """A row a method: a dot for each seed, and a line at the mean."""
    for place, own in enumerate(runs.values()):
        dice = as_array(run.numbers["dice"] for run in own.values())
        axes.plot(dice, [place] * len(dice), "o", color=BLUE, markersize=5, alpha=0.6)
        if own:
            axes.vlines(dice.mean(), place - 0.35, place + 0.35, color=ORANGE, linewidth=2)
    draw_row_axis(axes, titles)
    axes.set_xlabel("test Dice")
