"""A page of sections, each a list of parts: every report is one.

``page.html`` lays the parts out. A page is one file. It loads nothing and runs no script.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from naslora.files import replaced_file
from naslora.report.figures import PALETTE, Drawing
from naslora.report.pictures import Colour, data_uri
from naslora.report.tables import Table


class Cards(NamedTuple):
    """Headline numbers: a name, a value, and one line below it."""

    cards: list[tuple[str, str, str]]


class Code(NamedTuple):
    """Text of a fixed width, for instance commands."""

    text: str


class Legend(NamedTuple):
    """What colours stand for."""

    entries: list[tuple[str, Colour]]


class Pictures(NamedTuple):
    """Pictures side by side."""

    name: str
    """What they show, for the alternative texts."""
    caption: str
    pictures: list[tuple[str, np.ndarray]]
    """Labels, and (H, W, 3) uint8 RGB; larger pictures are shrunk."""


class Folded(NamedTuple):
    """A part that opens on a click on its summary."""

    summary: str
    part: Table | Code


Part = str | Table | Drawing | Pictures | Legend | Cards | Code | Folded
"""A piece of a section, in plain text; a string is a note."""


def write_page(
    path: Path,
    title: str,
    config: dict[str, Any],
    header: Sequence[Part],
    sections: Mapping[str, Sequence[Part]],
) -> None:
    """Writes a page, atomically, and makes its folder if needed.

    ``header`` is below the title, in plain text. The sections follow, each by its heading. Adjacent
    plots stand side by side. A section without parts is left out. ``config``, the configuration as
    JSON-ready values, is shown whole at the end.

    Raises:
        UserError: the file cannot be created.
        OSError: writing fails, for instance on a full disk. An older file then keeps its content.
    """
    text = json.dumps(config, indent=2, ensure_ascii=False, default=str)
    everything = {**sections, "Configuration": [Folded("Every setting of this run", Code(text))]}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True)
    environment.filters |= {"data_uri": data_uri, "kind": _kind}
    page = environment.get_template("page.html").render(
        title=title,
        palette=PALETTE,
        header=_groups(header),
        sections=[(name, _groups(parts)) for name, parts in everything.items() if parts],
    )
    with replaced_file(path) as temporary:
        # The name of an image need not be UTF-8. Python holds such bytes as lone surrogates, which
        # UTF-8 cannot encode, but a character reference can.
        temporary.write_bytes(page.encode("utf-8", errors="xmlcharrefreplace"))


def _groups(parts: Sequence[Part]) -> Iterator[tuple[str, list[Part]]]:
    """Adjacent parts of a kind."""
    return ((kind, list(same)) for kind, same in groupby(parts, key=_kind))


def _kind(part: Part) -> str:
    return type(part).__name__
