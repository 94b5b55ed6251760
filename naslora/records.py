"""Reads and writes dataclasses as JSON and CSV files.

A field with the metadata ``OPTIONAL`` is left out of a JSON file while it is None or empty; every
other None is written as null. A field with the metadata ``UNSTORED`` is in no JSON file. In a CSV
file None is an empty cell.
"""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from naslora.errors import UserError
from naslora.files import read_json, reading, write_json, write_text

OPTIONAL = {"optional": True}
"""Metadata of a dataclass field that is absent from JSON while it is None or empty."""

UNSTORED = {"stored": False}
"""Metadata of a dataclass field that JSON leaves out; it needs a default."""

Record = TypeVar("Record")


def to_json(value: Any) -> Any:
    """Turns records, and containers of records, into JSON-ready values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: to_json(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.metadata.get("stored", True)
            and not (f.metadata.get("optional") and getattr(value, f.name) in (None, {}, []))
        }
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[Record], values: Any, where: object) -> Record:
    """Makes a record of what ``to_json`` returned; unknown keys are ignored. ``where`` is the file.

    Raises:
        UserError: a value is missing or has another type; the message names the first one.
    """
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{where} is not a {kind.__name__} of this version: {error}") from error


def write_record(path: Path, record: Any) -> None:
    """Writes a record, or a container of records, as a JSON file, atomically."""
    write_json(path, to_json(record))


def read_record(path: Path, kind: type[Record]) -> Record:
    """Reads a record from a JSON file.

    Raises:
        UserError: the file is missing, is not JSON, or holds something else; as ``from_json``.
    """
    return from_json(kind, read_json(path), path)


def as_csv(rows: Sequence[Any]) -> str:
    """Rows, records or dictionaries of column to value, as CSV text. A column that a row lacks is
    empty. No cell is a formula of a spreadsheet, see ``_quoted``."""
    cells = [row if isinstance(row, dict) else vars(row) for row in rows]
    columns = list(dict.fromkeys(name for row in cells for name in row))
    text = io.StringIO()
    writer = csv.writer(text)  # only its own line ends, \r\n, let it put a cell with \r in quotes
    writer.writerow(map(_quoted, columns))
    writer.writerows([_quoted(row.get(name)) for name in columns] for row in cells)
    return text.getvalue().replace("\r\n", "\n")


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Writes rows, as for ``as_csv``, to a CSV file, atomically."""
    write_text(path, as_csv(rows))


def read_rows(path: Path, kind: type[Record]) -> list[Record]:
    """Reads the records of a CSV file that ``write_rows`` wrote.

    Raises:
        UserError: the file is missing or has other columns.
    """
    with reading(path, f"does not hold rows of {kind.__name__}"):
        with path.open(encoding="utf-8", newline="") as file:
            columns, *rows = ([cell.removeprefix("'") for cell in row] for row in csv.reader(file))
        known = ({n: c or None for n, c in zip(columns, row, strict=True)} for row in rows)
        return [msgspec.convert(row, kind, strict=False) for row in known]


def _quoted(cell: Any) -> Any:
    """Puts ' before a text that a spreadsheet would compute. Reading takes it off again."""
    risky = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "'"))
    return f"'{cell}" if risky and cell != "-" else cell
