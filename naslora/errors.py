"""The exception for mistakes of the user, warnings, and how messages show names."""

import importlib
import sys
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """An input from the user cannot be used. The message states the problem and its remedy.

    The command line prints the message as one line and exits with status 2.
    """


class LostProcessError(UserError):
    """Another process of the run has ended or does not answer. Every other process reports it."""


def imported(extra: str, *names: str) -> list[Any]:
    """Imports optional packages. If one is missing, a ``UserError`` names the extra that has it."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise UserError(
            f"this needs {' and '.join(names)}; run pip install 'naslora[{extra}]'"
        ) from error


def warn(text: str) -> None:
    """Prints a warning as one line."""
    print(f"naslora: warning: {one_line(text)}", file=sys.stderr)


def one_line(text: str) -> str:
    """A message as one line. Names from files may hold codes that act on a terminal."""
    return " ".join(map(printable, text.split()))


def printable(text: str) -> str:
    """Escapes characters that have no picture, such as the escape codes of a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listing(names: Iterable[str], limit: int = 8) -> str:
    """Sorts names and joins them for a message, "nothing" for none; those beyond ``limit`` are
    only counted."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return (", ".join(ordered[:limit]) or "nothing") + more
