"""Tables of text, for a page, Markdown or a terminal, and numbers as their text."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

MISSING = "–"  # an en dash, the usual mark of an empty cell


class Table(NamedTuple):
    """A table of plain text. The first cell of a row names the row."""

    head: list[str]
    rows: list[list[str]]
    total: bool = False
    """Whether a page sets off the last row."""
    tints: list[list[str]] | None = None
    """On a page, the CSS of each cell after the first."""


def markdown_table(table: Table) -> str:
    """The table in Markdown, without a newline at the end."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    escaped = ([" ".join(cell.replace("|", r"\|").split()) for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def number(value: float | None, form: str = ".4f") -> str:
    """A number in the format ``form``, with a typographic minus; ``MISSING`` for None."""
    return MISSING if value is None else format(value, form).replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever suits the length."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def reduce_known(
    function: Callable[[list[float]], float], values: Iterable[float | None]
) -> float | None:
    """Applies ``function`` to the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return function(known) if known else None
