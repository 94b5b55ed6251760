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
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value!r}")
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
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise UserError(f"{name} is no regular expression: {value!r}: {error}") from error
    return value


def blocks(name: str, value: Any) -> tuple[int, ...] | None:
    """Distinct indices, as a tuple; or None."""
    if value is None:
        return None
    indices = tuple(value)
    if not indices or len(set(indices)) != len(indices):
        raise UserError(f"{name} must be distinct indices, or None, got {indices}")
    for index in indices:
        whole(0)(name, index)
    return indices


def operations(name: str, value: Any) -> tuple[str, ...] | None:
    """Distinct names of operations, as a tuple; or None."""
    if value is None:
        return None
    names = tuple(value)
    if not names or len(set(names)) != len(names) or set(names) - set(OPERATIONS):
        raise UserError(
            f"{name} must be distinct names out of {', '.join(OPERATIONS)}, got "
            f"{', '.join(names) or 'none'}"
        )
    return names
