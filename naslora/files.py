"""Atomic writing of files, and reading of JSON and safetensors files."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from naslora.errors import UserError


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path. The file that the body writes there replaces ``path`` at the end.

    If the body raises, or the process is killed, ``path`` keeps its old content. The next call
    overwrites the temporary file that a killed process leaves.

    Args:
        path: the file to write; missing parent folders are created.

    Raises:
        UserError: ``path`` cannot be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors makes the file unreadable for others
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` in UTF-8, atomically.

    Raises:
        UserError: ``path`` cannot be written.
    """
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically.

    Raises:
        UserError: ``path`` cannot be written.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: the file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file to the CPU.

    Raises:
        UserError: the file is missing, truncated, or not a safetensors file.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error
