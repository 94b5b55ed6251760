"""The report of a run: one HTML file that needs nothing beside it, written from plain data.

Figures are inline SVG in the colours of the page (CSS variables), so they follow its light and
dark scheme; photographs are embedded as data URIs. Nothing is loaded and no script runs.
"""

import base64
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from itertools import groupby, takewhile
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from naslora.files import replaced_file
from naslora.metrics import METRICS

STAGE_2_LABEL = "stage 2: architecture search"
SPLITS = {"val": "Validation", "test": "Test"}
PHASES = {
    "weights": "Weight steps",
    "architecture": "Architecture steps",
    "evaluation": "Evaluation",
}
# A relative error below this is rounding, not a loss: no bar of it could be seen.
ROUNDING = 1e-4
# Pixels on the longer side of an embedded picture: 18 of them stay well below 3 MB.
PICTURE_SIDE = 320
PICTURE_ROW = 4 * PICTURE_SIDE  # of pictures that stand in a row
MISSING = "–"  # an en dash, the usual mark of an empty cell

# Name: (light, dark). Figures are drawn in the light values, which are then replaced by the
# variables; so no two light values may be equal.
PALETTE = {
    "page": ("#fcfcfd", "#14171c"),
    "card": ("#f1f4f7", "#1d2229"),
    "grid": ("#d9dee5", "#363d48"),
    "muted": ("#5a6573", "#a0abb8"),
    "ink": ("#1c2430", "#e5e9ef"),
    "blue": ("#2463b4", "#72adf5"),
    "orange": ("#bf5a0b", "#f2a055"),
    "green": ("#2b7a4b", "#62c48d"),
    "purple": ("#7747ad", "#bb98ee"),
}
INK, MUTED, GRID, BLUE, ORANGE, GREEN, PURPLE = (
    PALETTE[name][0] for name in ("ink", "muted", "grid", "blue", "orange", "green", "purple")
)
# One colour per family of operations, one dash per member, in the order of alpha.
OPERATION_LINES = (
    (BLUE, "-"),
    (BLUE, "--"),
    (ORANGE, "-"),
    (ORANGE, "--"),
    (GREEN, "-"),
    (GREEN, "--"),
    (PURPLE, "-"),
    (MUTED, ":"),
)
# Colours of classes on pictures, apart from each other for every kind of colour vision.
OVERLAY = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (213, 94, 0),
    (0, 114, 178),
    (148, 103, 189),
    (140, 86, 75),
    (23, 190, 207),
)
OVERLAY_UNKNOWN = (128, 128, 128)

FIGURE_STYLE = {
    "svg.fonttype": "none",  # real text: small, selectable, in the font of the page
    "svg.hashsalt": "naslora",  # the same run gives the same bytes
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 3,
}

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
.panels { grid-template-columns: repeat(auto-fit, minmax(min(100%%, 30rem), 1fr)); }
figure { margin: 0; max-width: 46rem; break-inside: avoid; }
figure.heat { max-width: none; }
.heat .scroll { margin-top: .4rem; }
figure svg { display: block; width: 100%%; height: auto; stroke-linejoin: round; }
figure svg text { font-family: inherit !important; }
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem; }
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


@dataclass(frozen=True, eq=False)
class Panel:
    """One example: a picture beside its truth and its prediction.

    Attributes:
        name: what to call it, for instance the file's name.
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) integer labels, None where there is no truth.
        prediction: (H, W) integer labels.
        dice: Dice of this image, in [0, 1], None where it is not known.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray | None
    prediction: np.ndarray
    dice: float | None


def write_report(
    path: Path,
    *,
    config: dict,
    metrics: dict,
    history: list[dict],
    operations: dict | None,
    panels: list[Panel],
    class_names: list[str],
) -> None:
    """Writes a run's report as one self-contained HTML file, atomically.

    Any part of ``metrics`` may be absent: its section is then left out, or says so.

    Args:
        path: the file to write; its folder is made if needed, an older report replaced at once.
        config: the run's configuration, shown whole; ``method``, ``model`` and ``dataset`` (or
            ``data``) make the title.
        metrics: ``test``, ``val`` and each mode of ``test_merged`` hold ``dice``, ``iou``,
            ``accuracy`` and ``per_class`` (class name to ``dice`` and ``iou``), all in [0, 1];
            ``test`` further ``metrics``, ``resolution`` and ``groups`` as of ``evaluate``;
            ``merge`` holds per mode ``source`` and ``layers`` (``name``, ``update_error``,
            ``output_error``, both relative); further ``best_epoch``, ``trainable_parameters``,
            ``parameters`` (``frozen``, ``decoder``, ``adapter``, ``architecture``), ``seconds``
            and ``images`` (split to count).
        history: one dict per epoch: ``epoch`` (from 0), ``stage`` (1 or 2), ``train_loss``,
            ``arch_loss`` (or None), ``val_loss``, ``val_dice``, ``val_iou``, ``learning_rate``,
            ``entropy`` (nats, mean over layers, or None) and ``seconds`` (``weights``,
            ``architecture``, ``evaluation``).
        operations: None for a method without a cell; else ``operations`` (names), ``layers``
            (names) and ``epochs``: dicts with ``epoch`` (-1 is the start) and ``softmax``, a
            (layers, operations) list of lists of softmax(alpha).
        panels: examples to show.
        class_names: names of the labels 0, 1, ..., so two for a binary task; label 0 is the
            background, left unpainted.

    Raises:
        OSError: the file cannot be written; one that was there before is unchanged.
    """
    title = _title(config)
    sections = (
        _training(history, metrics),
        _operations(operations, history),
        _panels(panels, class_names),
        _parameters(metrics),
        _times(metrics, history),
        _scores(metrics),
        _merging(metrics),
        _configuration(config),
    )
    page = _page(title, _headline(title, metrics), "".join(sections))
    with replaced_file(Path(path)) as temporary:
        # File names that are not UTF-8 hold lone surrogates, which only a reference can write.
        temporary.write_bytes(page.encode("utf-8", errors="xmlcharrefreplace"))


def write_comparison(
    path: Path,
    *,
    config: dict,
    tables: dict[str, tuple[list[str], list[list[str]]]],
    rows: list[dict],
    notes: list[str],
) -> None:
    """Writes the report of ``naslora compare`` as one self-contained HTML file, atomically.

    Args:
        path: the file to write.
        config: the recipe, shown whole; ``model`` and ``dataset`` (or ``data``) make the title.
        tables: heading to head and rows of text; one without rows is left out.
        rows: one dict a method, as ``naslora.compare.summarise`` returns it; what the figures show.
        notes: paragraphs below the tables.

    Raises:
        OSError: as ``write_report``.
    """
    title = _title({**config, "method": f"{len(rows)} methods"})
    first, *others = [_section(name, _table(*table)) for name, table in tables.items() if table[1]]
    body = _comparison_figures([row for row in rows if row["seeds"]])
    sections = (first, "".join(map(_note, map(escape, notes))), body, *others)
    header = f"<h1>{escape(title)}</h1>{_best(rows)}"
    page = _page(title, header, "".join(sections) + _configuration(config))
    with replaced_file(Path(path)) as temporary:
        temporary.write_bytes(page.encode("utf-8", errors="xmlcharrefreplace"))


def _best(rows: list[dict]) -> str:
    """Cards: the method with the highest Dice, and with the least of what training costs."""
    cards = (
        ("Highest test Dice", "dice", max, ".3f", 1, ""),
        ("Fewest trained parameters", "trainable_parameters", min, ".2f", 1e-6, " M"),
        ("Fastest training", "training_seconds", min, ".3f", 1, " s/image"),
        ("Least peak memory", "peak_memory", min, ",.0f", 1e-6, " MB"),
    )
    body = ""
    for name, key, choose, form, factor, unit in cards:
        known = [row for row in rows if _known(row.get(key))]
        if known:
            row = choose(known, key=lambda row: row[key])
            value = format(factor * row[key], form) + unit
            body += (
                f"<div><dt>{name}</dt><dd>{value}<small>{escape(row['title'])}</small></dd></div>"
            )
    return f'<dl class="headline">{body}</dl>'


def _comparison_figures(rows: list[dict]) -> str:
    if not rows:
        return ""
    height = 0.9 + 0.3 * len(rows)
    figures = {
        "dice": ("Test Dice: a dot for each seed, a line at the mean.", _draw_dice),
        "training": (
            "Seconds for each training image of an epoch: weight steps, and steps for α.",
            _draw_training,
        ),
        "inference": ("Seconds of one image, before and after merging.", _draw_inference),
        "memory": ("Peak memory of the process that trained.", _draw_memory),
    }
    drawings = [
        _figure(name, caption, partial(_draw_by_method, rows=rows, draw=draw), (4.6, height))
        for name, (caption, draw) in figures.items()
    ]
    return _section("Pictures", _figures(*drawings))


def _draw_by_method(axes: Axes, rows: list[dict], draw: Callable[[Axes, list[dict]], None]) -> None:
    """Methods from top to bottom, in the order of the table."""
    draw(axes, rows)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, columnspacing=1)


def _draw_dice(axes: Axes, rows: list[dict]) -> None:
    for place, row in enumerate(rows):
        values = [value for value in row["dice_values"] if _known(value)]
        axes.plot(values, [place] * len(values), "o", color=BLUE, markersize=5, alpha=0.6)
        if _known(row["dice"]):
            axes.vlines(row["dice"], place - 0.35, place + 0.35, color=ORANGE, linewidth=2)
    axes.set_xlabel("test Dice")


def _draw_training(axes: Axes, rows: list[dict]) -> None:
    places, weights = range(len(rows)), _column(rows, "weight_seconds")
    architecture = _column(rows, "training_seconds") - weights
    axes.barh(places, weights, height=0.65, color=BLUE, label="weights")
    if (architecture > 0.005 * weights).any():
        axes.barh(places, architecture, 0.65, left=weights, color=PURPLE, label="α")
    axes.set_xlabel("seconds an image")


def _draw_inference(axes: Axes, rows: list[dict]) -> None:
    marks = {
        "unmerged": ("unmerged", BLUE, "o"),
        "exact": ("exact", ORANGE, "D"),
        "center": ("center", GREEN, "s"),
        "calibrated": ("calibrated", PURPLE, "^"),
    }
    for mode, (label, colour, marker) in marks.items():
        seconds = _column(rows, f"inference_{mode}")
        if np.isfinite(seconds).any():
            style = {"marker": marker, "markersize": 5, "linestyle": "none", "alpha": 0.8}
            axes.plot(seconds, range(len(rows)), color=colour, label=label, **style)
    axes.set_xlabel("seconds an image")
    axes.set_xlim(left=0)


def _draw_memory(axes: Axes, rows: list[dict]) -> None:
    axes.barh(range(len(rows)), 1e-6 * _column(rows, "peak_memory"), height=0.65, color=GREEN)
    axes.set_xlabel("MB")


# Studies: pages of tables, drawings and pictures


class Table(NamedTuple):
    """A table of text."""

    head: list[str]
    rows: list[list[str]]


class Drawing(NamedTuple):
    """A plot."""

    name: str
    """Unique on its page, and its file's."""
    caption: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (4.6, 3)
    """In inches."""

    def save(self, path: Path) -> None:
        """Writes it as a PNG file."""
        with matplotlib.style.context(["default", FIGURE_STYLE]):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure.add_subplot())
            with replaced_file(path) as temporary:
                figure.savefig(temporary, format="png", dpi=150)


class Picture(NamedTuple):
    """Pixels, (H, W, 3) uint8."""

    caption: str
    image: np.ndarray


Part = str | Table | Drawing | Picture  # a string is a note


def write_study(path: Path, title: str, sections: dict[str, list[Part]], config: dict) -> None:
    """Writes a study as one self-contained HTML file, atomically.

    Args:
        path: the file to write.
        title: of the page.
        sections: heading to parts, in order.
        config: the configuration, shown whole at the end.
    """
    body = "".join(_section(escape(name), _parts(parts)) for name, parts in sections.items())
    page = _page(title, f"<h1>{escape(title)}</h1>", body + _configuration(config))
    with replaced_file(Path(path)) as temporary:
        temporary.write_bytes(page.encode("utf-8", errors="xmlcharrefreplace"))


def _parts(parts: list[Part]) -> str:
    """Parts in order; neighbouring drawings and pictures stand side by side."""
    html = ""
    for kind, group in groupby(parts, key=type):
        if kind is str:
            html += "".join(_note(escape(text)) for text in group)
        elif kind is Table:
            html += "".join(_table(table.head, table.rows) for table in group)
        elif kind is Drawing:
            html += _figures(*(_figure(d.name, d.caption, d.draw, d.size) for d in group))
        else:
            html += _figures(*map(_picture_figure, group))
    return html


def _picture_figure(picture: Picture) -> str:
    image = Image.fromarray(picture.image)
    image.thumbnail((PICTURE_ROW, PICTURE_ROW))
    return (
        f'<figure><img src="{_data_uri(np.asarray(image))}" alt="{escape(picture.caption)}" '
        f'style="width: 100%; height: auto"><figcaption>{escape(picture.caption)}</figcaption>'
        "</figure>"
    )


# The page


def _page(title: str, header: str, main: str) -> str:
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


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>{body}</details>"


def _table(head: list[str], rows: list[list[str]], caption: str = "", total: bool = False) -> str:
    """A table of plain text, escaped here; ``total`` sets off the last row."""
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = [
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    ]
    if total:
        lines[-1] = lines[-1].replace("<tr>", '<tr class="total">', 1)
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{caption}<thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


# Numbers as text


def _known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _number(value: float | None, form: str = ".4f") -> str:
    return format(value, form).replace("-", "\N{MINUS SIGN}") if _known(value) else MISSING


def _count(value: int | None) -> str:
    return _number(value, ",")


def _duration(seconds: float | None) -> str:
    if not _known(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _reduce(function: Callable, values: list[float | None]) -> float | None:
    """``function`` of the known values, None when there is none."""
    known = [value for value in values if _known(value)]
    return function(known) if known else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# Figures


def _figure(
    name: str,
    caption: str,
    draw: Callable[[Axes], None],
    size: tuple[float, float] = (4.3, 3),
) -> str:
    """What ``draw`` puts on its axes, as a <figure> with inline SVG in the page's colours.

    Args:
        name: unique on the page; it keeps the ids of one drawing apart from another's.
        caption: plain text below the drawing, and its alternative text.
        draw: called once with the axes.
        size: width and height in inches.
    """
    with matplotlib.style.context(["default", FIGURE_STYLE]):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    # Inline, the drawing needs neither its preamble nor its namespaces, and its style sheet
    # would apply to the whole page.
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index(">", drawing.index("<svg")) + 1 :]
    drawing = re.sub(r"<style.*?</style>", "", drawing, count=1, flags=re.DOTALL)
    drawing = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", drawing)
    for variable, (light, _) in PALETTE.items():
        drawing = drawing.replace(light, f"var(--{variable})")
    width, height = (72 * inches for inches in size)
    caption = escape(caption)
    return (
        f'<figure><svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{caption}">'
        f"{drawing}<figcaption>{caption}</figcaption></figure>"
    )


def _figures(*figures: str) -> str:
    return f'<div class="figures">{"".join(figures)}</div>'


def _column(history: list[dict], key: str) -> np.ndarray:
    values = [row.get(key) for row in history]
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _epoch_axis(axes: Axes, history: list[dict]) -> None:
    """Whole epochs along the bottom, and a line where the architecture search begins."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    first = next((row["epoch"] for row in history if row.get("stage") == 2), None)
    if first is None:
        return
    # A point is the state after its epoch, so stage 2 begins half-way before its first point.
    position = first - 0.5
    axes.axvline(position, color=MUTED, linestyle="--", linewidth=1)
    on_the_left = position <= sum(axes.get_xlim()) / 2
    axes.text(
        position,
        1.02,
        STAGE_2_LABEL,
        transform=axes.get_xaxis_transform(),
        ha="left" if on_the_left else "right",
        va="bottom",
        fontsize=8,
        color=MUTED,
    )


def _draw_lines(axes: Axes, history: list[dict], lines: dict[str, tuple[str, str, str]]) -> None:
    """Columns of the history by epoch; ``lines`` is column to (label, colour, line style)."""
    epochs = _column(history, "epoch")
    marker = "o" if len(history) <= 40 else None
    for key, (label, colour, style) in lines.items():
        values = _column(history, key)
        if np.isfinite(values).any():
            axes.plot(epochs, values, style, color=colour, marker=marker, label=label)


# Sections, in the order of the page


def _title(config: dict) -> str:
    method, model = config.get("method"), config.get("model")
    data = config.get("dataset") or config.get("data")
    parts = (method, model and f"on {model}", data and f"for {data}")
    return " ".join(str(part) for part in parts if part) or "A run of naslora"


def _headline(title: str, metrics: dict) -> str:
    split = "test" if metrics.get("test") else "val"
    scores = metrics.get(split) or {}
    seconds = metrics.get("seconds")
    numbers = [
        (f"{SPLITS[split]} Dice", _number(scores.get("dice")), ""),
        (f"{SPLITS[split]} IoU", _number(scores.get("iou")), ""),
        ("Trainable parameters", _count(_trainable(metrics)), _share_of_model(metrics)),
        ("Time", _duration(seconds), f"{seconds:,.0f} s" if _known(seconds) else ""),
    ]
    cards = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{detail}</small></dd></div>"
        for name, value, detail in numbers
    )
    return f'<h1>{escape(title)}</h1><dl class="headline">{cards}</dl>{_images(metrics)}'


def _images(metrics: dict) -> str:
    labels = {"train": "training", "arch": "architecture", "val": "validation", "test": "test"}
    counts = metrics.get("images") or {}
    parts = [f"{_count(n)} {escape(labels.get(split, split))}" for split, n in counts.items()]
    return _note(f"Images: {', '.join(parts)}.") if parts else ""


def _training(history: list[dict], metrics: dict) -> str:
    if not history:
        return _section("Training", _note("No epoch was finished, so there are no curves."))
    best = metrics.get("best_epoch")
    figures = _figures(
        _figure("loss", "Loss by epoch.", partial(_draw_losses, history=history)),
        _figure(
            "score",
            "Dice and IoU on the validation images by epoch, the best epoch marked.",
            partial(_draw_scores, history=history, best=best),
        ),
        _figure("rate", "Learning rate of the weights.", partial(_draw_rate, history=history)),
    )
    return _section("Training", figures + _details("Every epoch as numbers", _epochs(history)))


def _draw_losses(axes: Axes, history: list[dict]) -> None:
    lines = {
        "train_loss": ("training", BLUE, "-"),
        "val_loss": ("validation", ORANGE, "-"),
        "arch_loss": ("architecture", PURPLE, "-"),
    }
    _draw_lines(axes, history, lines)
    axes.set_ylabel("loss")
    if axes.lines:
        axes.legend()
    _epoch_axis(axes, history)


def _draw_scores(axes: Axes, history: list[dict], best: int | None) -> None:
    lines = {"val_dice": ("Dice", BLUE, "-"), "val_iou": ("IoU", GREEN, "-")}
    _draw_lines(axes, history, lines)
    dice = next((row.get("val_dice") for row in history if row["epoch"] == best), None)
    if _known(dice):
        label = f"best: epoch {best}, Dice {dice:.4f}"
        style = {"color": ORANGE, "marker": "*", "markersize": 11, "linestyle": "none"}
        axes.plot([best], [dice], label=label, zorder=3, **style)
    axes.set_ylabel("validation score")
    if axes.lines:
        axes.legend()
    _epoch_axis(axes, history)


def _draw_rate(axes: Axes, history: list[dict]) -> None:
    _draw_lines(axes, history, {"learning_rate": ("learning rate", BLUE, "-")})
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    # The power of ten would stand where the mark of stage 2 has its label.
    axes.yaxis.offsetText.set_position((-0.16, 0))
    _epoch_axis(axes, history)


def _epochs(history: list[dict]) -> str:
    losses = ("train_loss", "arch_loss", "val_loss", "val_dice", "val_iou")
    head = ["Epoch", "Stage", "Training loss", "Architecture loss", "Validation loss"]
    head += ["Validation Dice", "Validation IoU", "Learning rate", "Entropy"]
    rows = []
    for row in history:
        cells = [str(row["epoch"]), _count(row.get("stage"))]
        cells += [_number(row.get(key)) for key in losses]
        cells += [_number(row.get("learning_rate"), ".2e"), _number(row.get("entropy"))]
        seconds = row.get("seconds") or {}
        rows.append(cells + [_number(seconds.get(phase), ".1f") for phase in PHASES])
    return _table(head + [f"{phase}, s" for phase in PHASES.values()], rows)


def _operations(operations: dict | None, history: list[dict]) -> str:
    """The distribution of operations (Fig. C2): the weight of an operation is softmax(alpha)."""
    if operations is None:
        return ""
    names, layers, epochs = (operations[key] for key in ("operations", "layers", "epochs"))
    if not epochs or not layers:
        return _section("Operations", _note("No state of the architecture was recorded."))
    path = np.array([state["softmax"] for state in epochs])  # (epochs, layers, operations)
    steps = np.array([state["epoch"] for state in epochs])
    search = {"history": history, "steps": steps, "path": path}
    figures = _figures(
        _figure(
            "mean",
            f"Mean weight over the {len(layers)} layers after epoch {steps[-1]}; thin lines span "
            "the layers from the least to the greatest.",
            partial(_draw_mean_weights, names=names, weights=path[-1]),
        ),
        _figure(
            "path",
            "Mean weight over the layers by epoch, from the start (epoch \N{MINUS SIGN}1).",
            partial(_draw_path, names=names, **search),
        ),
        _figure(
            "entropy",
            "Entropy of the weights, mean over the layers; the lower, the more decided.",
            partial(_draw_entropy, **search),
        ),
    )
    return _section("Operations", figures + _heat_map(names, layers, path[-1], int(steps[-1])))


def _draw_mean_weights(axes: Axes, names: list[str], weights: np.ndarray) -> None:
    mean, least, most = weights.mean(0), weights.min(0), weights.max(0)
    rows = np.arange(len(names))
    axes.barh(rows, mean, height=0.72, color=BLUE)
    axes.hlines(rows, least, most, color=INK, linewidth=1)
    for row, (value, end) in enumerate(zip(mean, most, strict=True)):
        text = f"{value:.3f}"
        axes.annotate(text, (end, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1 / len(names), color=ORANGE, linestyle="--", linewidth=1, label="uniform")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    axes.set_yticks(rows, names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * most.max())  # room for the numbers
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("mean of softmax(α) over the layers")


def _draw_path(
    axes: Axes, names: list[str], history: list[dict], steps: np.ndarray, path: np.ndarray
) -> None:
    for index, (name, weights) in enumerate(zip(names, path.mean(1).T, strict=True)):
        colour, dash = OPERATION_LINES[index % len(OPERATION_LINES)]
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, weights, dash, color=colour, marker=marker, label=name)
    axes.set_ylabel("mean weight")
    axes.figure.legend(loc="outside lower center", ncols=3, handlelength=2.6, columnspacing=1.2)
    _epoch_axis(axes, history)


def _draw_entropy(axes: Axes, history: list[dict], steps: np.ndarray, path: np.ndarray) -> None:
    # 0 log 0 = 0, so the logarithm may see anything there.
    entropy = -(path * np.log(np.where(path > 0, path, 1))).sum(-1).mean(1)
    count = path.shape[-1]
    axes.axhline(math.log(count), color=ORANGE, linestyle="--", linewidth=1)
    axes.plot(steps, entropy, color=BLUE, marker="o" if len(steps) <= 40 else None)
    axes.annotate(
        f"uniform: ln {count} = {math.log(count):.3f}",
        (1, math.log(count)),
        (0, -3),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color=ORANGE,
    )
    axes.set_ylabel("entropy, nats")
    axes.margins(y=0.15)
    _epoch_axis(axes, history)


def _heat_map(names: list[str], layers: list[str], weights: np.ndarray, epoch: int) -> str:
    """Layers by operations as a table, tinted by the distance from the uniform weight."""
    uniform = 1 / len(names)
    # Below 0.01 the search has hardly moved, and the colours should not make it look as if.
    reach = max(0.01, float(np.abs(weights - uniform).max()))
    head = "".join(f'<th scope="col">{_breakable(name)}</th>' for name in names)
    rows = []
    for name, short, row in zip(layers, _short_names(layers), weights, strict=True):
        cells = "".join(_heat_cell(float(weight), uniform, reach) for weight in row)
        rows.append(f'<tr><th scope="row" title="{escape(name)}">{escape(short)}</th>{cells}</tr>')
    caption = (
        f"softmax(α) per layer after epoch {epoch}: blue above, orange below the uniform "
        f"{uniform:.3f}; the full tint is {reach:.3f} away from it."
    )
    return (
        f'<figure class="heat"><figcaption>{caption}</figcaption><div class="scroll"><table><thead>'
        f'<tr><th scope="col">Layer</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div></figure>"
    )


def _heat_cell(weight: float, uniform: float, reach: float) -> str:
    hue = "blue" if weight > uniform else "orange"
    heat = 60 * abs(weight - uniform) / reach  # percent; a fuller tint would drown the number
    return f'<td style="--hue: var(--{hue}); --heat: {heat:.0f}%">{weight:.3f}</td>'


def _breakable(name: str) -> str:
    return escape(name).replace("_", "_<wbr>")


def _short_names(names: list[str]) -> list[str]:
    """Dotted names without the parts that all of them begin and end with."""
    parts = [name.split(".") for name in names]
    start = _shared(parts)
    parts = [part[start:] for part in parts]
    end = _shared([part[::-1] for part in parts])
    short = [".".join(part[: len(part) - end]) for part in parts]
    return short if all(short) else names


def _shared(parts: list[list[str]]) -> int:
    """How many first elements all the lists share."""
    columns = zip(*parts, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _panels(panels: list[Panel], class_names: list[str]) -> str:
    if not panels:
        return ""
    labels = [label for panel in panels for label in (panel.truth, panel.prediction)]
    strange = any(_unknown(label, class_names).any() for label in labels if label is not None)
    legend = [(name, _colour(index)) for index, name in enumerate(class_names) if index > 0]
    legend += [("ignored or unknown", OVERLAY_UNKNOWN)] if strange else []
    swatches = "".join(
        f'<li><i style="background: rgb{colour}"></i>{escape(name)}</li>' for name, colour in legend
    )
    figures = "".join(_panel(_shrink(panel), class_names) for panel in panels)
    body = f'<ul class="legend">{swatches}</ul><div class="panels">{figures}</div>'
    return _section("Examples", body)


def _shrink(panel: Panel) -> Panel:
    """The panel at no more than ``PICTURE_SIDE`` pixels a side."""
    height, width = panel.image.shape[:2]
    scale = min(1.0, PICTURE_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))

    def resize(labels: np.ndarray) -> np.ndarray:
        pixels = Image.fromarray(np.asarray(labels, dtype=np.int32))
        return np.asarray(pixels.resize(size, Image.Resampling.NEAREST))

    return replace(
        panel,
        image=np.asarray(Image.fromarray(panel.image).resize(size, Image.Resampling.LANCZOS)),
        truth=None if panel.truth is None else resize(panel.truth),
        prediction=resize(panel.prediction),
    )


def _panel(panel: Panel, class_names: list[str]) -> str:
    pictures = [_picture("Image", panel.name, panel.image)]
    for kind, labels in (("Truth", panel.truth), ("Prediction", panel.prediction)):
        if labels is None:
            pictures.append(f"<div><span>{kind}: none</span></div>")
        else:
            painted = paint(panel.image, labels, class_names)
            pictures.append(_picture(kind, panel.name, painted))
    dice = f"Dice {_number(panel.dice)}" if _known(panel.dice) else "no Dice"
    return (
        f'<figure><div class="pictures">{"".join(pictures)}</div>'
        f"<figcaption>{escape(panel.name)} · {dice}</figcaption></figure>"
    )


def _picture(kind: str, name: str, pixels: np.ndarray) -> str:
    height, width = pixels.shape[:2]
    return (
        f'<div><img src="{_data_uri(pixels)}" width="{width}" height="{height}"'
        f' alt="{kind} of {escape(name)}"><span>{kind}</span></div>'
    )


def _data_uri(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    # JPEG without colour subsampling: the edges of the overlay stay sharp at a fraction of a PNG.
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def paint(image: np.ndarray, labels: np.ndarray, class_names: list[str]) -> np.ndarray:
    """Tints each class in its colour and draws its border in full: (H, W, 3) uint8."""
    colours = np.zeros_like(image)
    for index in range(1, len(class_names)):
        colours[labels == index] = _colour(index)
    colours[_unknown(labels, class_names)] = OVERLAY_UNKNOWN
    neighbours = np.pad(labels, 1, mode="edge")
    around = (neighbours[:-2, 1:-1], neighbours[2:, 1:-1], neighbours[1:-1, :-2])
    border = np.any([labels != other for other in (*around, neighbours[1:-1, 2:])], axis=0)
    opacity = np.where(border, 1, 0.45) * (labels != 0)
    blend = image + opacity[..., None] * (colours.astype(float) - image)
    return blend.round().astype(np.uint8)


def _unknown(labels: np.ndarray, class_names: list[str]) -> np.ndarray:
    return (labels < 0) | (labels >= max(1, len(class_names)))


def _colour(label: int) -> tuple[int, int, int]:
    return OVERLAY[(label - 1) % len(OVERLAY)]


def _trainable(metrics: dict) -> int | None:
    """The number of trained parameters, as told or as the sum of what is not frozen."""
    if metrics.get("trainable_parameters") is not None:
        return metrics["trainable_parameters"]
    parts = metrics.get("parameters") or {}
    return _reduce(sum, [parts.get(part) for part in ("decoder", "adapter", "architecture")])


def _share_of_model(metrics: dict) -> str:
    trainable, frozen = _trainable(metrics), (metrics.get("parameters") or {}).get("frozen")
    if not _known(trainable) or not _known(frozen) or trainable + frozen == 0:
        return ""
    return f"{trainable / (trainable + frozen):.2%} of all"


def _parameters(metrics: dict) -> str:
    if not metrics.get("parameters"):
        return ""
    parts = {
        "frozen": "Frozen",
        "decoder": "Decoder",
        "adapter": "Trained in the encoder",
        "architecture": "Architecture (α)",
    }
    counts = metrics["parameters"]
    rows = [[label, _count(counts.get(part))] for part, label in parts.items()]
    rows.append(["Total trainable", _count(_trainable(metrics))])
    return _section("Parameters", _table(["Part", "Parameters"], rows, total=True))


def _times(metrics: dict, history: list[dict]) -> str:
    total = metrics.get("seconds")
    if not history and not _known(total):
        return ""
    rows, spent = [], 0.0
    for phase, label in PHASES.items():
        seconds = [(row.get("seconds") or {}).get(phase) for row in history]
        # The mean is over the epochs that had such steps: stage 1 has no architecture steps.
        ran = [value for value in seconds if _known(value) and value > 0]
        spent += sum(ran)
        mean = _number(_reduce(_mean, ran), ".2f")
        rows.append([label, f"{sum(ran):,.1f}", mean, str(len(ran))])
    if _known(total):
        rows.append(["Everything else", f"{max(0.0, total - spent):,.1f}", "", ""])
        rows.append(["Total", f"{total:,.1f}", "", ""])
    head = ["", "Seconds", "Seconds per epoch", "Epochs"]
    return _section("Time", _table(head, rows, total=_known(total)))


def _scores(metrics: dict) -> str:
    splits = {label: metrics[split] for split, label in SPLITS.items() if metrics.get(split)}
    for mode, scores in (metrics.get("test_merged") or {}).items():
        splits[f"Test, merged ({mode})"] = scores
    if not splits:
        return _section("Scores", _note("This run has neither validation nor test scores."))
    tables = "".join(_score_table(label, scores) for label, scores in splits.items())
    body = f'<div class="tables">{tables}</div>{_metric_table(metrics.get("test") or {})}'
    if not metrics.get("test"):
        body += _note("This run has no test scores.")
    return _section("Scores", body)


def _score_table(label: str, scores: dict) -> str:
    keys = ("dice", "iou")
    classes = scores.get("per_class") or {}
    rows = [
        [str(name), *(_number((classes[name] or {}).get(key)) for key in keys)] for name in classes
    ]
    rows.append(["Mean", *(_number(scores.get(key)) for key in keys)])
    if _known(scores.get("accuracy")):
        label = f"{label}, pixel accuracy {_number(scores['accuracy'])}"
    return _table(["Class", "Dice", "IoU"], rows, label, total=True)


def _metric_table(scores: dict) -> str:
    """What the data set is reported by: over the whole test split, and over its groups."""
    if not scores.get("metrics"):
        return ""
    head, rows = metric_rows(scores)
    caption = f"Test, scored at the resolution {scores.get('resolution', MISSING)}"
    return _table(head, rows, caption)


def metric_rows(scores: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of text of a split's metrics, as ``naslora.evaluation.evaluate`` returns them.

    A metric is a row, and so is each class of one that has a number for each.
    """
    groups = scores.get("groups") or {}
    head = ["Metric", "All", *(f"{name} ({group['images']})" for name, group in groups.items())]
    columns = [scores["metrics"], *(group["metrics"] for group in groups.values())]
    rows = []
    for name, value in scores["metrics"].items():
        label = METRICS[name].label if name in METRICS else name
        if isinstance(value, dict):
            rows += [
                [f"{label}, {part}", *(_number(column[name].get(part)) for column in columns)]
                for part in value
            ]
        else:
            rows.append([label, *(_number(column[name]) for column in columns)])
    return head, rows


def _merging(metrics: dict) -> str:
    merged, merges = metrics.get("test_merged") or {}, metrics.get("merge") or {}
    modes = list(dict.fromkeys((*merged, *merges)))
    if not modes:
        return ""
    before = (metrics.get("test") or {}).get("dice")
    rows, figures, notes = [], [], []
    for index, mode in enumerate(modes):
        merge = merges.get(mode) or {}
        notes += [
            _note(f"{escape(mode)}: {escape(str(merge[key]))}.")
            for key in ("refused", "warning")
            if merge.get(key)
        ]
        if merge.get("refused"):
            continue
        layers = merge.get("layers") or []
        rows.append(_merge_row(mode, before, (merged.get(mode) or {}).get("dice"), merge))
        worst = _reduce(max, [layer.get("update_error") for layer in layers])
        if worst is not None and worst < ROUNDING:
            notes.append(
                _note(f"{escape(mode)}: no error beyond rounding, at most {_number(worst, '.1e')}.")
            )
        elif worst is not None:
            figures.append(_merge_figure(index, mode, layers))
    head = ["Mode", "Test Dice before", "Test Dice after", "Difference", "Update error, mean"]
    head += ["Update error, max", "Output error, mean", "Output error, max"]
    head += ["Update error on held-out tokens, mean", "Measured on"]
    annealing = _annealing(metrics.get("annealing") or {})
    return _section("Merging", _table(head, rows) + "".join(notes) + annealing + _figures(*figures))


def _annealing(annealing: dict) -> str:
    """What it cost on the validation images that the cell gave up its neighbours."""
    if not annealing:
        return ""
    named = [("best epoch before annealing", annealing.get("before"))]
    named += [("annealing", record) for record in annealing.get("during") or []]
    named += [("best epoch after it", annealing.get("after"))]
    named += [("that epoch merged with center", annealing.get("merged"))]
    rows = []
    for name, record in named:
        if record:
            epoch = record.get("epoch")
            cells = [name, MISSING if epoch is None else str(epoch + 1)]
            cells.append(_number(record.get("spatial"), ".2f"))
            rows.append(cells + [_number(record.get(f"val_{k}")) for k in ("dice", "iou", "loss")])
    head = ["Annealing", "Epoch", "Share of the neighbours", "Val Dice", "Val IoU", "Val loss"]
    return _table(head, rows)


def _merge_row(mode: str, before: float | None, after: float | None, merge: dict) -> list[str]:
    difference = after - before if _known(before) and _known(after) else None
    cells = [mode, _number(before), _number(after), _number(difference, "+.4f")]
    for key in ("update_error", "output_error"):
        errors = [layer.get(key) for layer in merge.get("layers") or []]
        cells += [_number(_reduce(function, errors), ".3g") for function in (_mean, max)]
    held_out = [layer.get("held_out_error") for layer in merge.get("layers") or []]
    cells.append(_number(_reduce(_mean, held_out), ".3g"))
    return [*cells, str(merge.get("source") or MISSING)]


def _merge_figure(index: int, mode: str, layers: list[dict]) -> str:
    return _figure(
        f"merge{index}",
        f"Relative error of each layer after the merge ({mode}).",
        partial(_draw_merge_errors, layers=layers),
        size=(7.2, 3),
    )


def _draw_merge_errors(axes: Axes, layers: list[dict]) -> None:
    names = _short_names([str(layer["name"]) for layer in layers])
    places = np.arange(len(names))
    bars = (("update_error", "update", BLUE, -0.2), ("output_error", "output", ORANGE, 0.2))
    for key, label, colour, shift in bars:
        axes.bar(places + shift, _column(layers, key), width=0.38, color=colour, label=label)
    axes.set_xticks(places, names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error")
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)


def _configuration(config: dict) -> str:
    text = json.dumps(config, indent=2, ensure_ascii=False, default=str)
    return _section(
        "Configuration", _details("Every setting of this run", f"<pre>{escape(text)}</pre>")
    )
