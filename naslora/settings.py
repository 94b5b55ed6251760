"""Configurations as data: frozen dataclasses whose annotations state what their fields may hold.

A range stands in a field's annotation, such as ``Annotated[int, msgspec.Meta(ge=1)]``. msgspec
checks every value, wherever it comes from: the constructor, the command line, or a file.
"""

import dataclasses
import difflib
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import msgspec

from naslora.errors import UserError

Count = Annotated[int, msgspec.Meta(ge=1)]
Index = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Rate = Annotated[float, msgspec.Meta(ge=0)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
"""Seeds are multiplied by 10007 twice, and generators take 64 bits."""

Own = TypeVar("Own", bound="Settings")
T = TypeVar("T")
COMMON = "common"
Common = Annotated[T, COMMON]
"""A setting that most people need first: ``--help`` shows it, and ``--help-all`` every one."""


@dataclass(frozen=True)
class Settings:
    """Base of all configurations.

    Lists become tuples, and whole numbers become floats where the annotation says so.

    Raises:
        UserError: a value has another type than its annotation or is out of its range. The message
            names the field.
    """

    def __post_init__(self) -> None:
        for name, hint in _hints(cast(Any, type(self))).items():
            object.__setattr__(self, name, checked(name, getattr(self, name), hint))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values. Paths are absolute."""
        return json.loads(msgspec.json.encode(self, enc_hook=lambda path: str(path.resolve())))

    def with_text(self: Own, name: str, text: str) -> Own:
        """The settings with another value of the field ``name``, as the command line has it. Errors
        as of the constructor."""
        value = checked(name, text, _hints(cast(Any, type(self)))[name], is_text=True)
        return cast(Any, dataclasses).replace(self, **{name: value})

    @classmethod
    def from_dict(cls: type[Own], values: Any) -> Own:
        """The inverse of ``to_dict``. Fields that ``values`` lacks get their defaults.

        Raises:
            UserError: a field is unknown, or as the constructor.
        """
        if not isinstance(values, dict):
            raise UserError(f"expected the settings of a {cls.__name__}, got {_short(values)}")
        hints, made = _hints(cast(Any, cls)), {}
        for name, value in values.items():
            if name not in hints:
                near = difflib.get_close_matches(str(name), hints, 1)
                advice = f"; did you mean {near[0]}?" if near else f" in {cls.__name__}"
                raise UserError(f"there is no setting {_short(name)}{advice}")
            kind = hints[name]
            nested = isinstance(kind, type) and issubclass(kind, Settings)
            made[name] = kind.from_dict(value) if nested and not isinstance(value, kind) else value
        return cls(**made)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """The annotations of a configuration's fields, by name, with their ranges."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def checked(name: str, value: Any, hint: Any, is_text: bool = False) -> Any:
    """The value, converted to the type of an annotation. ``name`` stands for it in messages.

    With ``is_text`` it may be text that stands for a number, true, false or null.

    Raises:
        UserError: the value is of another type or out of range.
    """
    if isinstance(hint, type) and issubclass(hint, Settings):
        if isinstance(value, hint):
            return value
        raise UserError(f"{name}: expected a {hint.__name__}, got {_short(value)}")
    try:
        converted = msgspec.convert(value, hint, strict=not is_text, dec_hook=_path)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        text = str(error).partition(" - at ")[0].replace("`", "").partition(", got")[0]
        choices = [str(choice) for choice in _choices(hint)]
        if choices and not text.startswith("Expected array"):
            text = f"Expected {'' if len(choices) == 1 else 'one of '}{', '.join(choices)}"
        text = f"{text[:1].lower()}{text[1:]}".replace("array", "list").replace(" | null", "")
        raise UserError(f"{name}: {text}, got {_short(value)}") from error
    if isinstance(converted, float) and not math.isfinite(converted):
        raise UserError(f"{name}: expected a finite number, got {value}")
    return converted


def _path(kind: Any, value: Any) -> Any:
    """Makes what msgspec cannot: a path."""
    if kind is Path and isinstance(value, str | Path) and "\0" not in str(value):
        return Path(value)
    raise msgspec.ValidationError("Expected a path")


def _choices(hint: Any) -> tuple[Any, ...]:
    """The choices of the ``Literal`` in an annotation; empty without one."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((found for part in get_args(hint) if (found := _choices(part))), ())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
