"""The tables of a comparison: one row a method, in the shape of the paper's Tables 1 and 2."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from naslora.adapter.merge_report import MODES
from naslora.methods import METHODS
from naslora.report.numbers import MISSING
from naslora.report.tables import Table, markdown_table
from naslora.results import CellNumbers, ComparisonRow, MeanAndSpread, MethodNumbers
from naslora.study.measurement import UNMERGED
from naslora.study.sweep import mean_and_spread, mean_text, spread_columns

State = Literal["done", "failed", "refused"]


@dataclass(frozen=True)
class Cell:
    """What became of a method with a seed."""

    method: str
    seed: int
    state: State
    """``refused``: the method does not fit the encoder, and nothing ran. ``failed``: the run ended
    with an error."""
    reason: str | None = None
    """Why there are no numbers."""
    numbers: CellNumbers | None = None
    """None unless the cell is done."""


# ---- Rows ----------------------------------------------------------------------------------------


def summarise(method: str, cells: Sequence[Cell]) -> ComparisonRow:
    """The row of a method.

    Args:
        method: the method.
        cells: its cells, one a seed.
    """
    done = [cell.numbers for cell in cells if cell.numbers is not None]
    reasons = [f"seed {cell.seed}: {cell.reason}" for cell in cells if cell.state == "failed"]
    reasons += dict.fromkeys(str(cell.reason) for cell in cells if cell.state == "refused")
    return ComparisonRow(
        method=method,
        title=METHODS[method].title,
        seeds=len(done),
        missing=len(cells) - len(done),
        refused=any(cell.state == "refused" for cell in cells),
        reason="; ".join(reasons),
        numbers=_over_seeds(done) if done else None,
    )


def _over_seeds(done: Sequence[CellNumbers]) -> MethodNumbers:
    first = done[0]
    return MethodNumbers(
        trainable_parameters=first.trainable_parameters,
        share_of_parameters=first.trainable_parameters / first.parameters,
        dice=mean_and_spread([cell.scores.dice for cell in done]),
        iou=mean_and_spread([cell.scores.iou for cell in done]),
        accuracy=mean_and_spread([cell.scores.accuracy for cell in done]),
        weight_seconds=statistics.median(cell.weight_seconds for cell in done),
        training_seconds=statistics.median(cell.training_seconds for cell in done),
        peak_memory=max(cell.peak_memory for cell in done),
        inference_seconds={
            mode: statistics.median(cell.inference_seconds[mode] for cell in done)
            for mode in first.inference_seconds
        },
        merged_dice={
            mode: mean_and_spread([cell.merged_scores[mode].dice for cell in done])
            for mode in first.merged_scores
        },
    )


def csv_row(row: ComparisonRow) -> dict[str, Any]:
    """A row of table.csv, in seconds, bytes and shares. Numbers that are unknown are absent."""
    columns: dict[str, Any] = {
        "method": row.method,
        "title": row.title,
        "seeds": row.seeds,
        "missing": row.missing,
        "refused": row.refused,
        "reason": row.reason,
    }
    numbers = row.numbers
    if numbers is None:
        return columns
    columns["trainable_parameters"] = numbers.trainable_parameters
    columns["share_of_parameters"] = numbers.share_of_parameters
    for name, score in _scores(numbers).items():
        columns |= spread_columns(name, score)
    columns["weight_seconds"] = numbers.weight_seconds
    columns["training_seconds"] = numbers.training_seconds
    columns["peak_memory"] = numbers.peak_memory
    for mode, seconds in numbers.inference_seconds.items():
        columns[f"inference_{mode}"] = seconds
    for mode, dice in numbers.merged_dice.items():
        columns |= spread_columns(f"dice_{mode}", dice)
    return columns


def _scores(numbers: MethodNumbers) -> dict[str, MeanAndSpread]:
    return {"dice": numbers.dice, "iou": numbers.iou, "accuracy": numbers.accuracy}


# ---- Tables of text ------------------------------------------------------------------------------


def main_table(rows: Sequence[ComparisonRow]) -> Table:
    """Parameters, scores and costs of every method."""
    known = [row.numbers for row in rows if row.numbers is not None]
    modes = [
        mode
        for mode in (UNMERGED, *MODES)
        if any(mode in numbers.inference_seconds for numbers in known)
    ]
    head = ["Method", "Trainable, M", "Of all, %", "Dice", "IoU", "accuracy"]
    head += ["Weight steps, s/image", "Training, s/image", "Peak memory, MB"]
    head += ["Inference, s/image" if m == UNMERGED else f"merged, {m}" for m in modes]
    return Table(head, [_text_row(row, modes) for row in rows])


def _text_row(row: ComparisonRow, modes: Sequence[str]) -> list[str]:
    mark = f" ({row.missing} failed)" if row.missing else ""
    title = row.title + (" (refused)" if row.refused else mark)
    numbers = row.numbers
    if numbers is None:
        return [title, *[MISSING] * (8 + len(modes))]
    seconds = [numbers.inference_seconds.get(mode) for mode in modes]
    return [
        title,
        f"{1e-6 * numbers.trainable_parameters:.3f}",
        f"{100 * numbers.share_of_parameters:.2f}",
        *map(mean_text, _scores(numbers).values()),
        f"{numbers.weight_seconds:.3f}",
        f"{numbers.training_seconds:.3f}",
        f"{1e-6 * numbers.peak_memory:,.0f}",
        *(MISSING if value is None else f"{value:.3f}" for value in seconds),
    ]


def merged_table(rows: Sequence[ComparisonRow]) -> Table:
    """Test Dice before and after each way of merging, of the methods that can be merged."""
    merged = {row.title: row.numbers for row in rows if row.numbers and row.numbers.merged_dice}
    modes = [mode for mode in MODES if any(mode in n.merged_dice for n in merged.values())]
    return Table(
        ["Method", "Dice", *(f"merged, {mode}" for mode in modes)],
        [
            [
                title,
                mean_text(numbers.dice),
                *(mean_text(numbers.merged_dice.get(mode)) for mode in modes),
            ]
            for title, numbers in merged.items()
        ],
    )


def as_markdown(tables: Mapping[str, Table], notes: Sequence[str]) -> str:
    """The tables that have rows, with a heading from the second on, and the notes below them."""
    filled = [(name, markdown_table(table)) for name, table in tables.items() if table.rows]
    (_, first), *others = filled
    sections = [first, *(f"**{name}**\n\n{text}" for name, text in others)]
    return "\n\n".join([*sections, *notes]) + "\n"


# ---- Notes ---------------------------------------------------------------------------------------


def notes_on(rows: Sequence[ComparisonRow], cells: Sequence[Cell]) -> list[str]:
    """What the numbers of a table are, under what load they were taken, and what is missing."""
    done = [cell.numbers for cell in cells if cell.numbers is not None]
    notes = [
        "Scores are means over the test images, then mean ± standard deviation over the seeds. "
        "Times are medians over the seeds, memory is the maximum. Training seconds are those of "
        "all steps of an epoch, steps for α included, per training image."
    ]
    if done:
        notes.append(_load_note(done))
    if any(numbers.image_dice for numbers in done):
        notes.append(
            "All seeds share the test images, and a difference's interval knows the seeds only. "
            "± over images is its standard error over the images. A difference smaller than twice "
            "that may not hold on other images."
        )
    return notes + [f"{row.title}: {row.reason}." for row in rows if row.missing]


def _load_note(done: Sequence[CellNumbers]) -> str:
    threads = max(numbers.threads for numbers in done)
    loads = [numbers.load for numbers in done]
    note = (
        f"Times were taken with one cell at a time, {threads} threads each on a machine of "
        f"{done[0].processors} processors ({done[0].device}), while its load average was "
        f"{min(loads):.1f} to {max(loads):.1f}"
    )
    # A cell adds one to the load for each of its threads. Half a one covers the system.
    if max(loads) > threads + 0.5:
        return f"{note}: other work ran beside the cells, so the times are only roughly comparable."
    return f"{note}: little else ran beside the cells, so the times are comparable."
