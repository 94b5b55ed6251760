"""Numbers as text for tables and cards."""

import math
from collections.abc import Callable, Iterable
from typing import TypeGuard

MISSING = "–"  # an en dash, the usual mark of an empty cell


def is_known(value: float | None) -> TypeGuard[float]:
    """Whether a number is neither None nor NaN."""
    return value is not None and not math.isnan(value)


def number(value: float | None, form: str = ".4f") -> str:
    """A number in the format ``form``, with a typographic minus; ``MISSING`` if unknown."""
    return format(value, form).replace("-", "\N{MINUS SIGN}") if is_known(value) else MISSING


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, whichever suits the length; ``MISSING`` if unknown."""
    if not is_known(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def reduce_known(
    function: Callable[[list[float]], float], values: Iterable[float | None]
) -> float | None:
    """Applies ``function`` to the known values; None if there are none."""
    known = [value for value in values if is_known(value)]
    return function(known) if known else None
