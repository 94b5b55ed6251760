"""The exception for mistakes of the user, and how its messages list names."""

from collections.abc import Iterable


class UserError(ValueError):
    """An input from the user cannot be used. The message states the problem and its remedy.

    The command line prints the message as one line and exits with status 2.
    """


class LostProcessError(UserError):
    """Another process of the run has ended or does not answer. Every other process reports it."""


def listing(names: Iterable[str], limit: int = 8) -> str:
    """Sorts names and joins them for a message.

    Args:
        names: the names; "nothing" stands for none.
        limit: names beyond this number are only counted.
    """
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return (", ".join(ordered[:limit]) or "nothing") + more
