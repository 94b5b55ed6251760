"""The HTML page around a report: its style, its title and the configuration at its end.

A page is one file. It loads nothing and runs no script.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

from naslora.files import replaced_file
from naslora.report.figures import PALETTE
from naslora.report.html import details, section

CSS = """
:root { color-scheme: light dark; %(light)s }
@media screen and (prefers-color-scheme: dark) { :root { %(dark)s } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
header, main { max-width: 74rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
main { padding-bottom: 4rem; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--grid);
  font-size: 1.2rem; }
p { max-width: 48rem; }
.note, figcaption, caption { color: var(--muted); font-size: .875rem; }
.headline { display: grid; gap: .75rem; margin: 1.25rem 0 0;
  grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.headline div { padding: .7rem .9rem; border-radius: .5rem; background: var(--card); }
.headline dt { color: var(--muted); font-size: .8rem; }
.headline dd { margin: 0; font-size: 1.5rem; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.headline small { display: block; color: var(--muted); font-size: .78rem; font-weight: 400; }
.figures, .panels { display: grid; gap: 1.25rem; margin: 1rem 0; }
.figures { grid-template-columns: repeat(auto-fit, minmax(min(100%%, 21rem), 1fr)); }
h3 { margin: 1.25rem 0 0; font-size: 1rem; }
figure { margin: 0; max-width: 46rem; break-inside: avoid; }
figure.heat, .panels figure { max-width: none; }
.heat .scroll { margin-top: .4rem; }
figure svg { display: block; width: 100%%; height: auto; stroke-linejoin: round; }
figure svg text { font-family: inherit !important; }
.pictures { display: grid; grid-template-columns: repeat(2, 1fr); gap: .4rem; }
@media (min-width: 40rem) { .pictures { grid-template-columns: repeat(4, 1fr); } }
.pictures img { display: block; width: 100%%; height: auto; border-radius: .25rem; }
.pictures span { color: var(--muted); font-size: .8rem; }
.panels figcaption { margin-top: .25rem; color: var(--ink); overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 0; padding: 0;
  list-style: none; font-size: .9rem; }
.legend i { display: inline-block; width: .85em; height: .85em; margin-right: .4em;
  border-radius: .2em; vertical-align: -.08em; print-color-adjust: exact; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.scroll { overflow-x: auto; margin: 1rem 0; max-width: 100%%; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .4rem; text-align: left; white-space: nowrap; }
th, td { padding: .28rem .8rem; border-bottom: 1px solid var(--grid); text-align: right; }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
th:first-child { padding-left: 0; text-align: left; }
tbody th { font-weight: 400; }
tbody tr.total > * { font-weight: 600; }
.heat th, .heat td { padding: .2rem .55rem; }
.heat th { text-align: center; }
.heat th:first-child { padding-left: 0; text-align: left; }
.heat td { border: 1px solid var(--page); text-align: center; print-color-adjust: exact;
  background: color-mix(in srgb, var(--hue) var(--heat), var(--page)); }
summary { cursor: pointer; color: var(--muted); }
pre { overflow-x: auto; padding: 1rem; border-radius: .5rem; background: var(--card);
  font-size: .82rem; }
@media print {
  body { font-size: 10pt; }
  header, main { max-width: none; padding-left: 0; padding-right: 0; }
  h2 { break-after: avoid; }
  tr, .headline div { break-inside: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding: .15rem .4rem; }
  pre { white-space: pre-wrap; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""


def write_page(path: Path, title: str, header: str, main: str) -> None:
    """Writes a page, atomically.

    Args:
        path: the file to write. Its folder is made if needed.
        title: plain text.
        header: HTML above the sections.
        main: HTML of the sections.

    Raises:
        UserError: the file cannot be created.
        OSError: writing fails, for instance on a full disk. An older file then keeps its content.
    """
    page = _html_page(title, header, main)
    with replaced_file(path) as temporary:
        # The name of an image need not be UTF-8. Python holds such bytes as lone surrogates, which
        # UTF-8 cannot encode, but a character reference can.
        temporary.write_bytes(page.encode("utf-8", errors="xmlcharrefreplace"))


def _html_page(title: str, header: str, main: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>{CSS % {"light": _variables(0), "dark": _variables(1)}}</style>
</head>
<body>
<header>{header}</header>
<main>{main}</main>
</body>
</html>
"""


def _variables(scheme: int) -> str:
    return " ".join(f"--{name}: {colours[scheme]};" for name, colours in PALETTE.items())


def page_title(config: dict[str, Any]) -> str:
    """The title of a run's page: method, model and data set, as far as they are set."""
    method, model = config.get("method"), config.get("model")
    data = config.get("dataset") or config.get("data")
    parts = (method, model and f"on {model}", data and f"for {data}")
    return " ".join(str(part) for part in parts if part) or "A run of naslora"


def configuration(config: dict[str, Any]) -> str:
    """The section with the whole configuration, folded."""
    text = json.dumps(config, indent=2, ensure_ascii=False, default=str)
    return section(
        "Configuration", details("Every setting of this run", f"<pre>{escape(text)}</pre>")
    )
