"""``naslora ablate``: one knob of the method turned, all else kept (paper, Tables 6-9 and D1).

Every (variant, seed) is a run of ``train``. The unchanged method is a variant of every
ablation; several ablations in one folder share its runs.

runs/VARIANT/SEED/           a cell, as ``naslora train`` leaves it; finished ones are kept
ABLATION/table.md, .csv      one row a variant
ABLATION/report.html         the same to look at
"""

import csv
import dataclasses
import io
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes

from naslora.adapter.injection import find_targets
from naslora.errors import UserError
from naslora.files import read_json, write_text
from naslora.metrics import METRICS
from naslora.report.figures import BLUE, INK, ORANGE, Drawing
from naslora.report.html import MISSING
from naslora.report.page import Table, write_study
from naslora.sam.segmentation import build_model
from naslora.study.compare import markdown_table, mean_and_spread
from naslora.training.run import check_output, train
from naslora.training.run_config import RunConfig
from naslora_kernels import OPERATIONS

AblationName = Literal["operations", "rank", "blocks", "alpha-start", "channel-ratio"]
BASE = "base"  # folder of the unchanged method
RANKS = (3, 6, 12, 24)
FAMILIES = {
    "convolution": OPERATIONS[:4],
    "pooling": OPERATIONS[4:6],
    "skip/no connection": OPERATIONS[6:],
}


class Variant(NamedTuple):
    """A row of an ablation's table."""

    title: str
    folder: str
    """Of its runs; ``BASE`` for the unchanged method."""
    config: RunConfig


class Cell(NamedTuple):
    """What a run measured: names of metrics to test scores, and what tells the variants apart."""

    scores: dict[str, float | None]
    trainable_parameters: int
    entropy: float | None


def ablate(
    name: AblationName,
    config: RunConfig,
    seeds: Sequence[int],
    output: Path,
    resume: bool = False,
) -> str:
    """Trains what an ablation lacks in ``output``, and writes its table after every cell.

    Args:
        name: which of ``ABLATIONS``.
        config: the unchanged method; its seed is replaced.
        seeds: of each variant's runs.
        output: must be new or empty unless ``resume``.
        resume: keep the finished cells in ``output``, continue the others.

    Returns:
        The table as Markdown.

    Raises:
        UserError: the configuration has nothing to ablate; ``output`` holds something else, or
            cells of another configuration; or as ``naslora.training.run.train``.
    """
    variants = variants_of(name, config)
    if len(set(seeds)) != len(seeds) or not seeds:
        raise UserError(f"seeds must be distinct, got {' '.join(map(str, seeds)) or 'none'}")
    if not resume:
        check_output(config, output, resume)
    cells: dict[tuple[str, int], Cell] = {}
    keys = [(variant, seed) for seed in seeds for variant in variants]
    started, trained = time.perf_counter(), 0
    for done, (variant, seed) in enumerate(keys):
        directory = output / "runs" / variant.folder / str(seed)
        cell_config = _with(variant.config, adapter={"seed": seed})
        check_output(cell_config, directory, resume=True)
        if not (directory / "report.html").is_file():  # what a run writes last
            _say(f"{name}, cell {done + 1} of {len(keys)}: {variant.title}, seed {seed}")
            train(cell_config, directory, resume=True)
            trained += 1
            left = (time.perf_counter() - started) / trained * (len(keys) - done - 1)
            _say(f"at most {left / 60:.0f} min left")
        cells[variant.folder, seed] = _read_cell(directory)
        table = _write(name, variants, seeds, cells, output)
    return table


def _say(text: str) -> None:
    print(f"ablate: {text}", file=sys.stderr, flush=True)


def _read_cell(directory: Path) -> Cell:
    metrics = read_json(directory / "metrics.json")
    test = metrics["test"]
    scores = {"dice": test["dice"], **test["metrics"]}
    with (directory / "history.csv").open(encoding="utf-8", newline="") as file:
        *_, last = csv.DictReader(file)
    return Cell(
        {name: value for name, value in scores.items() if not isinstance(value, dict)},
        metrics["trainable_parameters"],
        float(last["entropy"]) if last["entropy"] else None,
    )


# ---- What is varied -----------------------------------------------------------------------------


def variants_of(name: AblationName, config: RunConfig) -> list[Variant]:
    """The rows of an ablation; one of them is the configuration itself.

    Raises:
        UserError: the configuration's method has no cell, or a knob of the ablation is turned
            already.
    """
    if not config.searches:
        raise UserError(f"method {config.method!r} has no cell to ablate; use nas-pc-lora")
    variants = ABLATIONS[name](config)
    if not any(variant.folder == BASE for variant in variants):
        raise UserError(f"ablate {name} sets what --method and the adapter's options set already")
    return variants


def _with(config: RunConfig, **parts: dict[str, Any]) -> RunConfig:
    """The configuration with other fields of its ``adapter`` or its ``search``."""
    changed = {
        part: dataclasses.replace(getattr(config, part), **fields) for part, fields in parts.items()
    }
    return dataclasses.replace(config, **changed)


def _variants(config: RunConfig, rows: dict[str, tuple[str, RunConfig]]) -> list[Variant]:
    """Of title to (folder, configuration); what equals the configuration is ``BASE``."""
    return [
        Variant(title, BASE if varied == config else folder, varied)
        for title, (folder, varied) in rows.items()
    ]


def _operations(config: RunConfig) -> list[Variant]:
    rows = {"all operations": ("all-operations", _with(config, adapter={"operations": None}))}
    for family, left_out in FAMILIES.items():
        kept = tuple(name for name in OPERATIONS if name not in left_out)
        folder = "without-" + family.replace("/", "-").replace(" ", "-")
        rows[f"without {family}"] = (folder, _with(config, adapter={"operations": kept}))
    return _variants(config, rows)


def _ranks(config: RunConfig) -> list[Variant]:
    return _variants(
        config,
        {
            f"r = {r}": (f"rank-{r}", _with(config, adapter={"rank": r}))
            for r in sorted({*RANKS, config.adapter.rank})
        },
    )


def _blocks(config: RunConfig) -> list[Variant]:
    encoder = build_model(config.model, config.image_size).image_encoder
    count = len(find_targets(encoder, config.adapter.target))
    halves = {
        f"1 to {count // 2}": ("first-half", tuple(range(count // 2))),
        f"{count // 2 + 1} to {count}": ("last-half", tuple(range(count // 2, count))),
        f"1 to {count} (all)": ("all-blocks", None),
    }
    return _variants(
        config,
        {
            title: (folder, _with(config, adapter={"blocks": blocks}))
            for title, (folder, blocks) in halves.items()
        },
    )


def _alpha_starts(config: RunConfig) -> list[Variant]:
    """As in the paper, where alpha starts in epoch 10: at once, as configured, twice as late."""
    own = config.search.search_start
    rows = {"0 (simultaneously)": ("simultaneous", _with(config, search={"simultaneous": True}))}
    for start in dict.fromkeys((0, own, 2 * own)):
        title = "0 (stage-wise)" if start == 0 else str(start)
        rows[title] = (f"alpha-from-{start}", _with(config, search={"search_start": start}))
    return _variants(config, rows)


def _channel_ratios(config: RunConfig) -> list[Variant]:
    rank = config.adapter.rank
    rows = {}
    for third in (3, 2, 1):
        varied = _with(config, adapter={"channel_ratio": third / 3})
        rows[f"{third}/3 ({varied.adapter.cell_channels} of {rank} channels)"] = (
            f"ratio-{third}-3",
            varied,
        )
    return _variants(config, rows)


ABLATIONS: dict[AblationName, Callable[[RunConfig], list[Variant]]] = {
    "operations": _operations,
    "rank": _ranks,
    "blocks": _blocks,
    "alpha-start": _alpha_starts,
    "channel-ratio": _channel_ratios,
}


# ---- The table ----------------------------------------------------------------------------------


def _write(
    name: AblationName,
    variants: list[Variant],
    seeds: Sequence[int],
    cells: dict[tuple[str, int], Cell],
    output: Path,
) -> str:
    rows = [
        _row(variant, [cells.get((variant.folder, seed)) for seed in seeds], _base(cells, seeds))
        for variant in variants
    ]
    head, text = text_table(rows)
    notes = [
        "Test scores, mean ± standard deviation over the seeds. The difference is that to the "
        "unchanged method, seed by seed: mean ± standard deviation."
    ]
    write_text(output / name / "table.csv", _as_csv(rows))
    markdown = markdown_table(head, text)
    write_text(output / name / "table.md", f"{markdown}\n\n{notes[0]}\n")
    base = next(variant.config for variant in variants if variant.folder == BASE)
    height = 0.9 + 0.3 * len(rows)
    caption = "Test Dice: a dot for each seed, a line at the mean."
    dots = Drawing("dice", caption, partial(_draw_dots, rows=rows), (6, height))
    sections = {"Table": [Table(head, text), *notes], "Seeds": [dots]}
    title = f"Ablation of {base.method} on {base.model}: {name}"
    write_study(output / name / "report.html", title, sections, base.to_dict())
    return markdown


def _base(cells: dict[tuple[str, int], Cell], seeds: Sequence[int]) -> list[Cell | None]:
    return [cells.get((BASE, seed)) for seed in seeds]


def _row(variant: Variant, cells: list[Cell | None], base: list[Cell | None]) -> dict[str, Any]:
    """One row as numbers: means, spreads and the values of every seed; without cells, its title."""
    row: dict[str, Any] = {"variant": variant.title, "seeds": sum(c is not None for c in cells)}
    pairs = [(own, other) for own, other in zip(cells, base, strict=True) if own and other]
    known = [cell for cell in cells if cell]
    if not known:
        return row
    row["trainable_parameters"] = known[0].trainable_parameters
    for metric in known[0].scores:
        values = [cell.scores[metric] for cell in known]
        row[metric], row[f"{metric}_spread"] = mean_and_spread(values)
        row[f"{metric}_values"] = values
    differences = [
        own.scores["dice"] - other.scores["dice"]
        for own, other in pairs
        if None not in (own.scores["dice"], other.scores["dice"])
    ]
    if variant.folder != BASE and differences:
        row["difference"], row["difference_spread"] = mean_and_spread(differences)
    if known[0].entropy is not None:
        row["entropy"], row["entropy_spread"] = mean_and_spread([c.entropy for c in known])
    return row


def text_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table as text."""
    first = next(row for row in rows if row["seeds"])
    metrics = [name.removesuffix("_values") for name in first if name.endswith("_values")]
    head = ["Variant", "Seeds", "Trainable, M", *(METRICS[name].label for name in metrics)]
    head += ["Difference in Dice", "Entropy of α"]
    text = []
    for row in rows:
        trained = row.get("trainable_parameters")
        cells = [row["variant"], str(row["seeds"])]
        cells.append(MISSING if trained is None else f"{trained / 1e6:.4f}")
        cells += [_mean_text(row, name) for name in metrics]
        cells += [_mean_text(row, "difference", "+.3f"), _mean_text(row, "entropy")]
        text.append(cells)
    return head, text


def _mean_text(row: dict[str, Any], name: str, form: str = ".3f") -> str:
    mean, spread = row.get(name), row.get(f"{name}_spread")
    if mean is None:
        return MISSING
    return format(mean, form) + ("" if spread is None else f" ± {spread:.3f}")


def _as_csv(rows: list[dict[str, Any]]) -> str:
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = {
            name: " ".join(map(str, value)) if isinstance(value, list) else value
            for name, value in row.items()
        }
        writer.writerow(values)
    return text.getvalue()


def _draw_dots(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for place, row in enumerate(rows):
        values = [value for value in row.get("dice_values", ()) if value is not None]
        axes.plot(values, [place] * len(values), "o", color=BLUE, markersize=5, alpha=0.6)
        if row.get("dice") is not None:
            axes.vlines(row["dice"], place - 0.35, place + 0.35, color=ORANGE, linewidth=2)
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("test Dice")
