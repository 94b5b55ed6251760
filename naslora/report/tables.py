"""A table of text, for a page, Markdown or a terminal."""

from typing import NamedTuple


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
