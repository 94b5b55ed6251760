"""The report of a run: its page, the sections on scores, training and costs, and its summary."""

import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich import table as rich_table
from rich.console import Console

from naslora.errors import printable
from naslora.metrics import METRICS, label_of
from naslora.report.figures import (
    BLUE,
    GREEN,
    GRID,
    MUTED,
    ORANGE,
    PURPLE,
    Curves,
    Drawing,
    draw_curves,
    draw_epoch_axis,
)
from naslora.report.page import Cards, Code, Folded, Part, Pictures, write_page
from naslora.report.pictures import Panel
from naslora.report.sections.examples import CLICKS_NOTE, examples_parts
from naslora.report.sections.merging import merging_parts
from naslora.report.sections.operations import operations_parts
from naslora.report.tables import Table, duration, number, reduce_known
from naslora.results import REPORT, Epoch, OperationHistory, ParameterCounts, RunResult, SplitScores

SPLIT_TITLES = {"train": "training", "arch": "architecture", "val": "validation", "test": "test"}


def write_report(
    path: Path,
    *,
    config: dict[str, Any],
    result: RunResult,
    history: list[Epoch],
    operations: OperationHistory | None,
    panels: Sequence[Panel | Pictures],
    class_names: list[str],
) -> None:
    """Writes a run's report as one self-contained HTML file; errors as in ``write_page``.

    ``config`` is the run's configuration as JSON-ready values. ``operations`` is None for a method
    without alpha. ``panels`` are test images, the worst first; of a promptable run as they are
    shown. ``class_names`` are those of the labels 0, 1, ..., so two for a binary task.
    """
    labelled = [panel for panel in panels if isinstance(panel, Panel)]
    prompted = [panel for panel in panels if isinstance(panel, Pictures)]
    keep = config["training"]["keep"]
    examples = examples_parts(labelled, class_names, result.images["test"])
    sections = {  # first whether it worked, then why, then what it took
        "Scores": _scores(result) if result.untouched is None else _click_scores(result),
        "Test images": examples + ([CLICKS_NOTE, *prompted] if prompted else []),
        "Merging": merging_parts(result, history, keep, labelled, class_names),
        "What next": _commands(path.parent, result),
        "Training": _training(history, result.kept_epoch),
        "Operations": operations_parts(operations, history),
        "Parameters": _parameters(result.parameters, config["adapter"].get("target")),
        "Time": _times(history, result.seconds),
    }
    write_page(path, page_title(config), config, _header(result), sections)


def page_title(config: dict[str, Any], method: str = "") -> str:
    """The title of a run's page, by its JSON-ready configuration: method, model and data.

    ``method`` replaces the configuration's.
    """
    dataset, root = config["data"]["dataset"], config["data"]["root"]
    own = dataset in ("csv", "folders", "coco") and root  # a layout; the folder has the data's name
    data = Path(root).name if own else dataset
    return f"{method or config['method']} on {config['model']['name']} for {data}"


def _header(result: RunResult) -> list[Part]:
    """Cards with the main numbers, and the number of images."""
    scores, before = result.test, result.untouched
    worst = reduce_known(min, scores.image_dice or [])
    of_worst = "" if worst is None else f"worst image {number(worst)}"
    at_start = "" if before is None else f"one click; untouched {number(before.iou)}"
    cards = [
        ("Test Dice", number(scores.dice), of_worst),
        ("Test IoU", number(scores.iou), at_start),
    ]
    mode, dice = _best_merge(result)
    if mode and mode != "exact":
        cards.append(("Merged into SAM's layers", number(dice), f"test Dice, {mode}"))
    trained = result.trainable_parameters
    share = f"{trained / result.parameters.total:.2%} of all"
    cards += [
        ("Trainable parameters", f"{trained:,}", share),
        ("Time", duration(result.seconds), ""),
    ]
    images = ", ".join(f"{count:,} {SPLIT_TITLES[s]}" for s, count in result.images.items())
    return [Cards(cards), f"Images: {images}.", *result.notes]


def _further(result: RunResult) -> dict[str, SplitScores]:
    """The test scores of the model's other states, by what these are."""
    named = {"weights of the last step": result.test_last, "in float32": result.test_float32}
    named |= {f"merged ({mode})": scores for mode, scores in result.test_merged.items()}
    return {name: scores for name, scores in named.items() if scores is not None}


# ---- Scores --------------------------------------------------------------------------------------


def _scores(result: RunResult) -> list[Part]:
    """A table of all splits and ways of merging, a plot, and the data set's metrics."""
    named = {"Validation": result.val, "Test": result.test}
    named |= {f"Test, {name}": scores for name, scores in _further(result).items()}
    rows = []
    for name, scores in named.items():
        rows.append([name, number(scores.dice), number(scores.iou), number(scores.accuracy)])
        rows += [
            [f"{name}, {title}", number(own.dice), number(own.iou), ""]
            for title, own in scores.per_class.items()
            if len(scores.per_class) > 1
        ]
    parts: list[Part] = [Table(["", "Dice", "IoU", "Pixel accuracy"], rows)]
    test = result.test
    dice = [value for value in test.image_dice or [] if value is not None]
    if dice:
        caption = "Number of test images by their Dice. The line is the median."
        parts.append(Drawing("images", caption, partial(_draw_images, dice=dice), (4.6, 2.3)))
    if test.calibration:
        bins = np.array(test.calibration)
        error = np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum()
        caption = (
            "Confidence of the test pixels, and how many are right; of binary masks the "
            "probability and the share of the foreground. On the dashed line both agree. Bars are "
            f"shares of the pixels. ECE {number(error)} over all pixels."
        )
        parts.append(Drawing("reliability", caption, partial(_draw_reliability, bins=bins)))
    if test.metrics:
        parts.append(f"Test, scored at the resolution {test.resolution}.")
    # The table of all splits has these means already.
    means = {"dice": test.dice, "iou": test.iou, "accuracy": test.accuracy}
    further = any(means.get(metric) != value for metric, value in test.metrics.items())
    if further or test.groups:
        parts.append(metric_table(test))
    if test.volumes is not None:
        head = ["Metric in three dimensions", f"Volumes ({test.volumes.number})"]
        own = test.volumes.metrics.items()
        rows = [[label_of(name, test.volumes.unit), number(value)] for name, value in own]
        parts.append(Table(head, rows))
    return parts


def _draw_images(axes: Axes, dice: list[float]) -> None:
    axes.hist(dice, bins=20, range=(0, 1), color=BLUE, rwidth=0.9)
    axes.axvline(float(np.median(dice)), color=ORANGE, linewidth=1.5)
    axes.set(xlim=(0, 1), xlabel="Dice", ylabel="images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_reliability(axes: Axes, bins: np.ndarray) -> None:
    """``bins`` as ``SplitScores.calibration``."""
    pixels, confidence, right = bins[bins[:, 0] > 0].T
    middle = (np.arange(len(bins)) + 0.5) / len(bins)
    shares = bins[:, 0] / pixels.sum()
    axes.bar(middle, shares, 0.9 / len(bins), color=GRID, label="share of the pixels")
    axes.plot([0, 1], [0, 1], "--", color=MUTED, linewidth=1)
    axes.plot(confidence / pixels, right / pixels, "o-", color=BLUE, label="share that is right")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence")
    axes.legend(loc="upper left")


def _click_scores(result: RunResult) -> list[Part]:
    """A table of the test scores of all models, and the IoU by clicks."""
    named = {"Untouched": result.untouched, "Fine-tuned": result.test}
    named |= {f"Fine-tuned, {name}": scores for name, scores in _further(result).items()}
    known = {name: scores.metrics for name, scores in named.items() if scores}
    rows = []
    for title in result.test.metrics:
        values = [metrics[title] for metrics in known.values()]
        rows.append([title, *(number(v) for v in values if not isinstance(v, dict))])
    curves: Curves = {
        name.lower(): (colour, scores.click_iou)
        for (name, scores), colour in zip(named.items(), (ORANGE, BLUE), strict=False)
        if scores is not None and scores.click_iou
    }
    draw = partial(draw_curves, curves=curves, xlabel="clicks", ylabel="IoU")
    return [
        f"Means over the objects of the test images, at {result.test.resolution}. The first click "
        "is the centre of the object, each further one the centre of the largest error. NoC is the "
        "number of clicks until the IoU is reached, at most 8.",
        Table(["", *known], rows),
        Drawing("clicks", "Mean IoU by clicks.", draw, (4.6, 2.8)),
    ]


def metric_table(scores: SplitScores) -> Table:
    """The metrics of a split, over all its images and over each of its groups.

    A metric is a row. A metric of classes has one row a class.
    """
    groups = scores.groups
    head = ["Metric", "All", *(f"{name} ({group.images})" for name, group in groups.items())]
    columns = [scores.metrics, *(group.metrics for group in groups.values())]
    rows = []
    for name, value in scores.metrics.items():
        label = label_of(name) if name in METRICS else name
        for part in value if isinstance(value, dict) else [None]:
            values = [column[name] for column in columns]
            found = [own.get(part or "") if isinstance(own, dict) else own for own in values]
            rows.append([label if part is None else f"{label}, {part}", *map(number, found)])
    return Table(head, rows)


# ---- Training ------------------------------------------------------------------------------------


def _training(history: list[Epoch], kept: int) -> list[Part]:
    """Curves of losses and scores, and a table of the epochs. ``kept`` is the epoch to mark."""
    losses: Curves = {
        "training": (BLUE, [epoch.train_loss for epoch in history]),
        "validation": (ORANGE, [epoch.val_loss for epoch in history]),
        "architecture": (PURPLE, [epoch.arch_loss for epoch in history]),
    }
    scores: Curves = {
        "Dice": (BLUE, [epoch.val_dice for epoch in history]),
        "IoU": (GREEN, [epoch.val_iou for epoch in history]),
    }
    caption = "Dice and IoU on the validation images by epoch. A star marks the kept epoch."
    star = next(epoch for epoch in history if epoch.epoch == kept)
    draw = partial(_draw_curves, history=history)
    return [
        Drawing("loss", "Loss by epoch.", partial(draw, curves=losses, title="loss")),
        Drawing(
            "score", caption, partial(draw, curves=scores, title="validation score", star=star)
        ),
        Folded("Every epoch as numbers", _epochs(history)),
    ]


def _draw_curves(
    axes: Axes, history: list[Epoch], curves: Curves, title: str, star: Epoch | None = None
) -> None:
    draw_curves(axes, curves, "epoch", title)
    if star is not None and star.val_dice is not None:
        label = f"kept: epoch {star.epoch}, Dice {star.val_dice:.4f}"
        place = [star.epoch], [star.val_dice]
        axes.plot(*place, "*", label=label, zorder=3, color=ORANGE, markersize=11)
        axes.legend()
    draw_epoch_axis(axes, history)


def _epochs(history: list[Epoch]) -> Table:
    head = ["Epoch", "Stage", "Training loss", "Architecture loss", "Validation loss"]
    head += ["Validation Dice", "Validation IoU", "Learning rate", "Entropy"]
    head += ["Weight steps, s", "Architecture steps, s", "Evaluation, s"]
    rows = []
    for epoch in history:
        scores = (epoch.train_loss, epoch.arch_loss, epoch.val_loss, epoch.val_dice, epoch.val_iou)
        seconds = (epoch.seconds_weights, epoch.seconds_architecture, epoch.seconds_evaluation)
        row = [str(epoch.epoch), str(epoch.stage), *map(number, scores)]
        row += [number(epoch.learning_rate, ".2e"), number(epoch.entropy)]
        rows.append(row + [number(value, ".1f") for value in seconds])
    return Table(head, rows)


# ---- What next, parameters, time -----------------------------------------------------------------


def _best_merge(result: RunResult) -> tuple[str, float | None]:
    """The way of merging with the highest test Dice; "" without one."""
    merged = {m: s.dice for m, s in result.test_merged.items() if s.dice is not None}
    # exact leaves a convolution beside SAM's own layers
    plain = {mode: dice for mode, dice in merged.items() if mode != "exact"} or merged
    mode = max(plain, key=plain.__getitem__, default="")
    return mode, plain.get(mode)


def _commands(run: Path, result: RunResult) -> list[Part]:
    """The commands that use the run."""
    mode, _ = _best_merge(result)
    model = run.with_name(f"{run.name}-merged") if mode else run
    commands = [("evaluate", run), ("predict", run, "IMAGES", "--output", f"{run}-masks")]
    if mode:
        commands.append(("merge", run, "--mode", mode, "--output", model))
    commands.append(("export", model, "--format", "onnx", "--output", f"{run}.onnx"))
    lines = [shlex.join(["naslora", *map(str, command)]) for command in commands]
    note = "Score the run again, segment images, merge the adapter, export the model:"
    return [note, Code("\n".join(lines))]


def _parameters(counts: ParameterCounts, target: str | Sequence[str] | None) -> list[Part]:
    """A table of parameters by part of the model."""
    named = target if isinstance(target, str) else ", ".join(target or ())
    adapted = f" (target {named})" if named else ""
    parts = {
        "Frozen": counts.frozen,
        "Decoder": counts.decoder,
        "Trained in the encoder" + adapted: counts.adapter,
        "Architecture (α)": counts.architecture,
        "Total trainable": counts.trainable,
    }
    rows = [[name, f"{count:,}"] for name, count in parts.items()]
    return [Table(["Part", "Parameters"], rows, total=True)]


def _times(history: list[Epoch], total: float) -> list[Part]:
    """A table of seconds by phase, and of the whole run."""
    phases = {
        "Weight steps": [epoch.seconds_weights for epoch in history],
        "Architecture steps": [epoch.seconds_architecture for epoch in history],
        "Evaluation": [epoch.seconds_evaluation for epoch in history],
    }
    rows, spent = [], 0.0
    for label, seconds in phases.items():
        # The mean is over the epochs that had such steps. Stage 1 has no architecture steps.
        ran = [value for value in seconds if value > 0]
        spent += sum(ran)
        mean = number(reduce_known(fmean, ran), ".2f")
        rows.append([label, f"{sum(ran):,.1f}", mean, str(len(ran))])
    rows.append(["Everything else", f"{max(0.0, total - spent):,.1f}", "", ""])
    rows.append(["Total", f"{total:,.1f}", "", ""])
    return [Table(["", "Seconds", "Seconds per epoch", "Epochs"], rows, total=True)]


# ---- The terminal --------------------------------------------------------------------------------


def print_summary(result: RunResult, output: Path) -> None:
    """Prints the scores of a finished run, and the path of its report."""
    if os.environ.get("RANK", "0") != "0":
        return
    further = {} if result.untouched is None else {"untouched": result.untouched}
    further |= _further(result)
    whole, *others = (metric_table(scores) for scores in (result.test, *further.values()))
    table = rich_table.Table("test images", f"epoch {result.kept_epoch}", *whole.head[2:], *further)
    for row, *rows in zip(whole.rows, *(other.rows for other in others), strict=True):
        table.add_row(*map(printable, (*row, *(own[1] for own in rows))))
    console = Console(markup=False, emoji=False, highlight=False)  # names of classes are text
    console.print(table)
    lines = [f"note: {note}" for note in result.notes]
    lines.append(f"scored at the resolution {result.test.resolution}")
    trained = f"{result.trainable_parameters:,} parameters trained in {result.seconds:.0f} s"
    console.print(*lines, f"{trained}; look at {output / REPORT}", sep="\n", soft_wrap=True)
