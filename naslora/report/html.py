"""Elements of a page. Their arguments are HTML, so callers escape plain text."""


def section(title: str, body: str) -> str:
    """A section with a heading."""
    return f"<section><h2>{title}</h2>{body}</section>"


def note(text: str) -> str:
    """A paragraph in small, muted type."""
    return f'<p class="note">{text}</p>'


def details(summary: str, body: str) -> str:
    """A body that opens on a click on its summary."""
    return f"<details><summary>{summary}</summary>{body}</details>"


def card(name: str, value: str, detail: str) -> str:
    """A headline number: its name, its value, and one line below it."""
    return f"<div><dt>{name}</dt><dd>{value}<small>{detail}</small></dd></div>"
