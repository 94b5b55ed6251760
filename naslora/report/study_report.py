"""The report of a study: a page of tables, plots, pictures and notes."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from naslora.report.figures import Drawing, figure_group
from naslora.report.html import note, section
from naslora.report.page import configuration, write_page
from naslora.report.pictures import Picture, picture_figure
from naslora.report.tables import Table, html_table

Part = str | Table | Drawing | Picture
"""A piece of a section; a string is a note."""


def write_study(
    path: Path, title: str, sections: Mapping[str, Sequence[Part]], config: dict[str, Any]
) -> None:
    """Writes a study as one self-contained HTML file, atomically.

    Args:
        path: the file to write. Its folder is made if needed.
        title: title of the page.
        sections: heading to parts, in order.
        config: the configuration as JSON-ready values, shown whole at the end.

    Raises:
        UserError: the file cannot be created.
        OSError: writing fails, for instance on a full disk. An older file then keeps its content.
    """
    body = "".join(section(escape(name), _parts(parts)) for name, parts in sections.items())
    write_page(path, title, f"<h1>{escape(title)}</h1>", body + configuration(config))


def _parts(parts: Sequence[Part]) -> str:
    """The parts in order. Adjacent plots stand side by side, and so do adjacent pictures."""
    html = ""
    for _, group in groupby(parts, key=type):
        same = list(group)
        drawings = [part for part in same if isinstance(part, Drawing)]
        pictures = [part for part in same if isinstance(part, Picture)]
        html += "".join(note(escape(part)) for part in same if isinstance(part, str))
        html += "".join(html_table(part) for part in same if isinstance(part, Table))
        html += figure_group(drawings) if drawings else ""
        html += picture_group(pictures) if pictures else ""
    return html


def picture_group(pictures: list[Picture]) -> str:
    """Pictures side by side, as many in a line as fit."""
    return f'<div class="figures">{"".join(map(picture_figure, pictures))}</div>'
