"""A table of text, and how it looks in HTML and in Markdown."""

from html import escape
from typing import NamedTuple


class Table(NamedTuple):
    """A table of plain text. The first cell of a row names the row."""

    head: list[str]
    rows: list[list[str]]


def html_table(table: Table, caption: str = "", total: bool = False) -> str:
    """The table in HTML. All text is escaped here.

    Args:
        table: the table.
        caption: text above the table; empty for none.
        total: sets off the last row.
    """
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    lines = [
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in table.rows
    ]
    if total:
        lines[-1] = lines[-1].replace("<tr>", '<tr class="total">', 1)
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{caption}<thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def markdown_table(table: Table) -> str:
    """The table in Markdown, without a newline at the end."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    escaped = ([" ".join(cell.replace("|", r"\|").split()) for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
