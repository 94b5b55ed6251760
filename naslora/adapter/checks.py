"""Checks of configuration values.

A check takes a field's name and its value. It returns the value to store, or raises a UserError
that names the field, what was expected and what came.
"""

import math
import re
from collections.abc import Callable
from typing import Any, get_args

from naslora.errors import UserError
from naslora_kernels import OPERATIONS

Check = Callable[[str, Any], Any]


def whole(minimum: int) -> Check:
    """A check for integers of at least ``minimum``."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise UserError(f"{name} must be a whole number of at least {minimum}, got {value!r}")
        return value

    return check


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
    try:
        re.compile(value)
    except re.error as error:
        raise UserError(f"{name} is no regular expression: {value!r}: {error}") from error
    return value


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
    known = all(operation in OPERATIONS for operation in names)
    if not names or not known or len(set(names)) != len(names):
        raise UserError(
            f"{name} must be distinct names out of {', '.join(OPERATIONS)}, got "
            f"{', '.join(map(str, names)) or repr(value)}"
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
    huge = isinstance(value, int) and abs(value) >= 10**40
    return "an integer of more than 40 digits" if huge else repr(value)
