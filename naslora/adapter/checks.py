"""Checks of configuration values.

A check takes a field's name and its value. It returns the value to store, or raises a UserError
that names the field, what was expected and what came.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import regex

from naslora.errors import UserError
from naslora_kernels import OPERATIONS
from naslora_kernels.backends import BACKENDS

Check = Callable[[str, Any], Any]
MOST_RANK = 1024
"""Largest rank. A layer of SAM has 1280 channels at most."""
MOST_SEED = 2**32 - 1
"""Largest seed: seeds are multiplied by 10007 twice, and generators take 64 bits."""
LONGEST_PATTERN = 1000
"""Most characters of a regular expression."""
PATTERN_SECONDS = 2.0
"""Longest time of a regular expression for all names of a model."""


def whole(minimum: int, maximum: int | None = None) -> Check:
    """A check for integers from ``minimum`` to ``maximum``, both included."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise UserError(
                f"{name} must be a whole number of at least {minimum}, got {_short(value)}"
            )
        if maximum is not None and value > maximum:
            raise UserError(f"{name} must be at most {maximum}, got {_short(value)}")
        return value

    return check


def text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise UserError(f"{name} must be a string, got {_short(value)}")
    return value


def backend(name: str, value: Any) -> str | None:
    """Name of a kernel backend, whether it can be used here or not; or None."""
    if value is not None and value not in BACKENDS:
        known = ", ".join(reversed(BACKENDS))
        raise UserError(
            f"{name} {_short(value)} does not exist; choose one of {known}, or give none"
        )
    return value


def check_types(kind: type, values: Any) -> None:
    """Checks the types of a configuration's values against its annotations.

    Args:
        kind: a dataclass whose fields are numbers, strings, paths, tuples of them or dataclasses.
        values: values read from a file, by field. A path is a string there. Fields that are
            dataclasses are not checked.

    Raises:
        UserError: a value has another type, or a field is unknown. The message names the field.
    """
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{kind.__name__} has no field {str(name)[:40]!r} in this version")
        if dataclasses.is_dataclass(hints[name]):
            continue
        hint = str | None if hints[name] == Path | None else hints[name]
        if get_origin(hint) is Literal:  # the configuration's own check lists the choices
            hint = str
        try:
            msgspec.convert(value, hint)
        except msgspec.ValidationError as error:
            raise UserError(f"{name}: {error}".replace("`", "")) from error


def choice(literal: Any) -> Check:
    """A check for the values of a ``Literal`` type."""
    choices = get_args(literal)

    def check(name: str, value: Any) -> Any:
        if value not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        return value

    return check


def number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
        raise UserError(f"{name} must be a finite number, got {_short(value)}")
    return value


def positive(name: str, value: Any) -> float:
    """A finite number greater than 0."""
    if number(name, value) <= 0:
        raise UserError(f"{name} must be greater than 0, got {value}")
    return value


def channel_ratio(name: str, value: Any) -> float:
    """A number in [0, 1]."""
    if not 0 <= number(name, value) <= 1:
        raise UserError(f"{name} must lie in [0, 1] (0 is plain LoRA), got {value}")
    return value


def pattern(name: str, value: Any) -> str:
    """A regular expression."""
    if not isinstance(value, str):
        raise UserError(f"{name} is no regular expression: {value!r} is no string")
    if len(value) > LONGEST_PATTERN:
        raise UserError(
            f"{name} must be a regular expression of at most {LONGEST_PATTERN} characters, got "
            f"{len(value)}"
        )
    try:
        re.compile(value)
        regex.compile(value)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise UserError(f"{name} is no regular expression: {value!r}: {error}") from error
    return value


class Pattern:
    """A regular expression that takes ``PATTERN_SECONDS`` for all its searches, at most.

    It can come from a file that somebody else wrote. Some expressions need years for a short name.

    Args:
        name: what the expression is, for the message.
        expression: has passed ``pattern``.
    """

    def __init__(self, name: str, expression: str) -> None:
        self.name, self.expression = name, expression
        self._compiled = regex.compile(expression)
        self._left = PATTERN_SECONDS

    def search(self, text: str) -> bool:
        """Whether the expression matches somewhere in ``text``.

        Raises:
            UserError: the searches have taken too long.
        """
        started = time.monotonic()
        try:
            found = self._compiled.search(text, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError as error:
            raise UserError(
                f"{self.name} {self.expression!r} takes more than {PATTERN_SECONDS:g} seconds to "
                "search the names of the model; give a simpler regular expression"
            ) from error
        self._left -= time.monotonic() - started
        return found


def target(name: str, value: Any) -> str:
    """``pattern`` for the field ``target``, which a list of names is often given to."""
    if isinstance(value, list | tuple | set):
        raise UserError(
            f"{name} is no regular expression: {value!r}; target_modules takes a list of names"
        )
    return pattern(name, value)


def blocks(name: str, value: Any) -> tuple[int, ...] | None:
    """Distinct indices, as a tuple; or None."""
    if value is None:
        return None
    indices = _tuple(value)
    if not indices:
        raise UserError(f"{name} must be distinct indices, or None, got {value!r}")
    for index in indices:
        whole(0)(name, index)
    if len(set(indices)) != len(indices):
        raise UserError(f"{name} must be distinct indices, or None, got {indices}")
    return indices


def operations(name: str, value: Any) -> tuple[str, ...] | None:
    """Distinct names of operations, as a tuple; or None."""
    if value is None:
        return None
    names = _tuple(value)
    known = all(isinstance(name, str) and name in OPERATIONS for name in names)
    if not known or not names or len(set(names)) != len(names):
        raise UserError(
            f"{name} must be distinct names out of {', '.join(OPERATIONS)}, got "
            f"{', '.join(map(str, names))[:200] or _short(value)}"
        )
    return names


def patterns(name: str, value: Any) -> tuple[str, ...]:
    """Names or regular expressions, as a tuple: one string, or several."""
    several = (value,) if isinstance(value, str) else _tuple(value)
    empty = not several and value not in ((), [])
    if empty or not all(isinstance(one, str) and one for one in several):
        raise UserError(f"{name} must be names or regular expressions of modules, got {value!r}")
    for one in several:
        pattern(name, one)
    return several


def _tuple(value: Any) -> tuple[Any, ...]:
    """The items of a collection. A string and what cannot be iterated over have none."""
    try:
        return () if isinstance(value, str) else tuple(value)
    except TypeError:
        return ()


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _short(value: object) -> str:
    """A value for a message. Python refuses to print an integer of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "an integer of more than 40 digits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
