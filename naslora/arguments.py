"""The arguments of a command: parsed, named in help, and refused in one line."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import re
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any, cast, get_type_hints

import docstring_parser
import tyro

from naslora.errors import UserError
from naslora.settings import COMMON, Settings
from naslora.training.recipe import load_recipe
from naslora.training.run_config import RunConfig


def parse(command: Callable[..., None], arguments: list[str]) -> Callable[[], None]:
    """Parses the arguments of a command, which then runs apart from the parser's errors.

    Raises:
        UserError: the parser or a configuration refuses a value.
    """
    name, messages = f"naslora {command.__name__}", io.StringIO()
    # These decide the defaults of the other options and, with --method, which there are.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", nargs="?")
    first.add_argument("--method", nargs="?")
    early, _ = first.parse_known_args(arguments)
    config = load_recipe(early.recipe or None, early.method or None)
    everything = "--help-all" in arguments
    brief = not everything and bool({"-h", "--help"} & {*arguments})
    given = ["--help"] if everything else arguments
    if brief or everything:
        _join_lines(config)
    try:
        with contextlib.redirect_stderr(messages):
            taken, unknown = tyro.cli(
                deferred(command, config, brief), prog=name, args=given, return_unknown_args=True
            )
    except SystemExit as exit:
        # The parser reports a refused value on many lines. The UserError is one of its causes.
        cause: BaseException | None = exit
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        if exit.code in (0, None):
            raise
        raise UserError(f"{_parser_message(messages.getvalue())}; see {name} --help") from None
    if unknown:
        help_text = io.StringIO()
        with contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
            tyro.cli(deferred(command, config), args=["--help"])
        advice = meant(unknown[0], re.findall(r"--[a-z][\w-]+", help_text.getvalue()))
        raise UserError(f"{name} has no option {unknown[0]}; {advice}see {name} --help-all")
    return taken


def meant(given: str, names: Iterable[str]) -> str:
    """Advice: the name that has these initials, as --lr, or is spelt alike."""
    own = given.partition("=")[0].strip("-")
    known = {name: "".join(word[:1] for word in name.strip("-").split("-")) for name in names}
    near = [name for name, initials in known.items() if initials == own]
    spelt = {name.strip("-"): name for name in names}
    near += [spelt[word] for word in difflib.get_close_matches(own, spelt, cutoff=0.7)]
    return f"did you mean {near[0]}?; " if near else ""


def deferred(
    command: Callable[..., None], config: RunConfig, brief: bool = False
) -> Callable[..., Callable[[], None]]:
    """Wraps a command so that it takes its arguments now and runs later.

    Options of the parser are the fields of ``config``, whose values are the defaults. With
    ``brief`` they are only those that are marked as ``Common``.
    """

    def take(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    # The parser would break the help's lines where an option's text breaks.
    text = re.sub(r"\n {8}", " ", inspect.getdoc(command) or "")
    signature = inspect.signature(command)
    # After one with a default, a parameter without one has to be keyword-only.
    options = {n: p.replace(kind=p.KEYWORD_ONLY) for n, p in signature.parameters.items()}
    if "config" in options:
        default: Any = _common_part(config) if brief else config
        options["config"] = options["config"].replace(default=default)
        if brief:
            purpose, _, rest = text.partition("\n")
            text = f"{purpose}\n\nAll settings: naslora {command.__name__} --help-all\n{rest}"
    vars(take)["__signature__"] = signature.replace(parameters=[*options.values()])
    take.__annotations__ = {name: option.annotation for name, option in options.items()}
    take.__doc__ = text
    return take


def _common_part(config: Any) -> Any:
    """The configuration, of a type whose fields are hidden unless they are marked as ``Common``."""
    kind, hints, values = type(config), {}, {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        values[name] = getattr(config, name)
        if dataclasses.is_dataclass(values[name]):
            values[name] = _common_part(values[name])
            hints[name] = type(values[name])
        elif COMMON not in getattr(hint, "__metadata__", ()):
            hints[name] = cast(Any, tyro.conf.Suppress)[hint]
    own = {"__annotations__": hints, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), own)(**values)


def _join_lines(config: Settings) -> None:
    """Joins the lines of the fields' docstrings, where the parser would break the help's lines."""
    for base in type(config).__mro__[:-1]:
        for parameter in docstring_parser.parse_from_object(base).params:
            text = " ".join((parameter.description or "").split())
            field = config.__dataclass_fields__[parameter.arg_name]
            field.metadata = MappingProxyType({**field.metadata, "help": text})
    for value in vars(config).values():
        if isinstance(value, Settings):
            _join_lines(value)


def _parser_message(text: str) -> str:
    """The parser's message, which it prints in a box of many lines, as one line."""
    # The box is drawn in ASCII where the terminal has no other characters.
    lines = [line.strip(" │|") for line in text.splitlines() if line[:1] not in ("╭", "╰", "+")]
    parts = [" ".join(part.split()) for part in re.split(r"\n[─-]{3,}\n", "\n".join(lines))]
    kept = [part.rstrip(". ") for part in parts if "helptext" not in part]
    message = "; ".join(kept if text.startswith("╭") else kept[1:])  # without the box's title
    if message.startswith("Missing from "):
        missing = re.findall(r"(?:: |\(required\) )(\S+)", message)
        return f"{message[13 : message.index(':')]} needs {' and '.join(missing)}"
    wrong = (
        r"Error parsing (\S+): no type matching (?:{None}\|)?{?(.+?)}? could be .* from \[(.+?)\].*"
    )
    return re.sub(wrong, r"\1 takes \2, got \3", message)[:1500]
