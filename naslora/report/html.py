"""Pieces of a page: sections, notes, tables, and numbers as text."""

import math
from collections.abc import Callable
from html import escape

MISSING = "–"  # an en dash, the usual mark of an empty cell


def section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def details(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>{body}</details>"


def html_table(
    head: list[str], rows: list[list[str]], caption: str = "", total: bool = False
) -> str:
    """A table of plain text, escaped here; ``total`` sets off the last row."""
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = [
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    ]
    if total:
        lines[-1] = lines[-1].replace("<tr>", '<tr class="total">', 1)
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{caption}<thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def is_known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def number(value: float | None, form: str = ".4f") -> str:
    return format(value, form).replace("-", "\N{MINUS SIGN}") if is_known(value) else MISSING


def count(value: int | None) -> str:
    return number(value, ",")


def duration(seconds: float | None) -> str:
    if not is_known(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def reduce_known(function: Callable, values: list[float | None]) -> float | None:
    """``function`` of the known values, None when there is none."""
    known = [value for value in values if is_known(value)]
    return function(known) if known else None


def average(values: list[float]) -> float:
    return sum(values) / len(values)
