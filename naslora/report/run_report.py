"""The report of a run: one HTML file that needs nothing beside it."""

import math
from functools import partial
from html import escape
from itertools import takewhile
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from naslora.files import replaced_file
from naslora.metrics import METRICS
from naslora.report.figures import (
    BLUE,
    GREEN,
    INK,
    OPERATION_LINES,
    ORANGE,
    PURPLE,
    draw_lines,
    epoch_axis,
    figure_group,
    history_column,
    svg_figure,
)
from naslora.report.html import (
    MISSING,
    average,
    count,
    details,
    duration,
    html_table,
    is_known,
    note,
    number,
    reduce_known,
    section,
)
from naslora.report.page import configuration, html_page, page_title
from naslora.report.pictures import Panel, panel_section

SPLITS = {"val": "Validation", "test": "Test"}


PHASES = {
    "weights": "Weight steps",
    "architecture": "Architecture steps",
    "evaluation": "Evaluation",
}


# A relative error below this is rounding, not a loss: no bar of it could be seen.
ROUNDING = 1e-4


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
    title = page_title(config)
    sections = (
        _training(history, metrics),
        _operations(operations, history),
        panel_section(panels, class_names),
        _parameters(metrics),
        _times(metrics, history),
        _scores(metrics),
        _merging(metrics),
        configuration(config),
    )
    page = html_page(title, _headline(title, metrics), "".join(sections))
    with replaced_file(Path(path)) as temporary:
        # File names that are not UTF-8 hold lone surrogates, which only a reference can write.
        temporary.write_bytes(page.encode("utf-8", errors="xmlcharrefreplace"))


def _headline(title: str, metrics: dict) -> str:
    split = "test" if metrics.get("test") else "val"
    scores = metrics.get(split) or {}
    seconds = metrics.get("seconds")
    numbers = [
        (f"{SPLITS[split]} Dice", number(scores.get("dice")), ""),
        (f"{SPLITS[split]} IoU", number(scores.get("iou")), ""),
        ("Trainable parameters", count(_trainable(metrics)), _share_of_model(metrics)),
        ("Time", duration(seconds), f"{seconds:,.0f} s" if is_known(seconds) else ""),
    ]
    cards = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{detail}</small></dd></div>"
        for name, value, detail in numbers
    )
    return f'<h1>{escape(title)}</h1><dl class="headline">{cards}</dl>{_images(metrics)}'


def _images(metrics: dict) -> str:
    labels = {"train": "training", "arch": "architecture", "val": "validation", "test": "test"}
    counts = metrics.get("images") or {}
    parts = [f"{count(n)} {escape(labels.get(split, split))}" for split, n in counts.items()]
    return note(f"Images: {', '.join(parts)}.") if parts else ""


def _training(history: list[dict], metrics: dict) -> str:
    if not history:
        return section("Training", note("No epoch was finished, so there are no curves."))
    best = metrics.get("best_epoch")
    figures = figure_group(
        svg_figure("loss", "Loss by epoch.", partial(_draw_losses, history=history)),
        svg_figure(
            "score",
            "Dice and IoU on the validation images by epoch, the best epoch marked.",
            partial(_draw_scores, history=history, best=best),
        ),
        svg_figure("rate", "Learning rate of the weights.", partial(_draw_rate, history=history)),
    )
    return section("Training", figures + details("Every epoch as numbers", _epochs(history)))


def _draw_losses(axes: Axes, history: list[dict]) -> None:
    lines = {
        "train_loss": ("training", BLUE, "-"),
        "val_loss": ("validation", ORANGE, "-"),
        "arch_loss": ("architecture", PURPLE, "-"),
    }
    draw_lines(axes, history, lines)
    axes.set_ylabel("loss")
    if axes.lines:
        axes.legend()
    epoch_axis(axes, history)


def _draw_scores(axes: Axes, history: list[dict], best: int | None) -> None:
    lines = {"val_dice": ("Dice", BLUE, "-"), "val_iou": ("IoU", GREEN, "-")}
    draw_lines(axes, history, lines)
    dice = next((row.get("val_dice") for row in history if row["epoch"] == best), None)
    if is_known(dice):
        label = f"best: epoch {best}, Dice {dice:.4f}"
        style = {"color": ORANGE, "marker": "*", "markersize": 11, "linestyle": "none"}
        axes.plot([best], [dice], label=label, zorder=3, **style)
    axes.set_ylabel("validation score")
    if axes.lines:
        axes.legend()
    epoch_axis(axes, history)


def _draw_rate(axes: Axes, history: list[dict]) -> None:
    draw_lines(axes, history, {"learning_rate": ("learning rate", BLUE, "-")})
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    # The power of ten would stand where the mark of stage 2 has its label.
    axes.yaxis.offsetText.set_position((-0.16, 0))
    epoch_axis(axes, history)


def _epochs(history: list[dict]) -> str:
    losses = ("train_loss", "arch_loss", "val_loss", "val_dice", "val_iou")
    head = ["Epoch", "Stage", "Training loss", "Architecture loss", "Validation loss"]
    head += ["Validation Dice", "Validation IoU", "Learning rate", "Entropy"]
    rows = []
    for row in history:
        cells = [str(row["epoch"]), count(row.get("stage"))]
        cells += [number(row.get(key)) for key in losses]
        cells += [number(row.get("learning_rate"), ".2e"), number(row.get("entropy"))]
        seconds = row.get("seconds") or {}
        rows.append(cells + [number(seconds.get(phase), ".1f") for phase in PHASES])
    return html_table(head + [f"{phase}, s" for phase in PHASES.values()], rows)


def _operations(operations: dict | None, history: list[dict]) -> str:
    """The distribution of operations (Fig. C2): the weight of an operation is softmax(alpha)."""
    if operations is None:
        return ""
    names, layers, epochs = (operations[key] for key in ("operations", "layers", "epochs"))
    if not epochs or not layers:
        return section("Operations", note("No state of the architecture was recorded."))
    path = np.array([state["softmax"] for state in epochs])  # (epochs, layers, operations)
    steps = np.array([state["epoch"] for state in epochs])
    search = {"history": history, "steps": steps, "path": path}
    figures = figure_group(
        svg_figure(
            "mean",
            f"Mean weight over the {len(layers)} layers after epoch {steps[-1]}; thin lines span "
            "the layers from the least to the greatest.",
            partial(_draw_mean_weights, names=names, weights=path[-1]),
        ),
        svg_figure(
            "path",
            "Mean weight over the layers by epoch, from the start (epoch \N{MINUS SIGN}1).",
            partial(_draw_path, names=names, **search),
        ),
        svg_figure(
            "entropy",
            "Entropy of the weights, mean over the layers; the lower, the more decided.",
            partial(_draw_entropy, **search),
        ),
    )
    return section("Operations", figures + _heat_map(names, layers, path[-1], int(steps[-1])))


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
    epoch_axis(axes, history)


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
    epoch_axis(axes, history)


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


def _trainable(metrics: dict) -> int | None:
    """The number of trained parameters, as told or as the sum of what is not frozen."""
    if metrics.get("trainable_parameters") is not None:
        return metrics["trainable_parameters"]
    parts = metrics.get("parameters") or {}
    return reduce_known(sum, [parts.get(part) for part in ("decoder", "adapter", "architecture")])


def _share_of_model(metrics: dict) -> str:
    trainable, frozen = _trainable(metrics), (metrics.get("parameters") or {}).get("frozen")
    if not is_known(trainable) or not is_known(frozen) or trainable + frozen == 0:
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
    rows = [[label, count(counts.get(part))] for part, label in parts.items()]
    rows.append(["Total trainable", count(_trainable(metrics))])
    return section("Parameters", html_table(["Part", "Parameters"], rows, total=True))


def _times(metrics: dict, history: list[dict]) -> str:
    total = metrics.get("seconds")
    if not history and not is_known(total):
        return ""
    rows, spent = [], 0.0
    for phase, label in PHASES.items():
        seconds = [(row.get("seconds") or {}).get(phase) for row in history]
        # The mean is over the epochs that had such steps: stage 1 has no architecture steps.
        ran = [value for value in seconds if is_known(value) and value > 0]
        spent += sum(ran)
        mean = number(reduce_known(average, ran), ".2f")
        rows.append([label, f"{sum(ran):,.1f}", mean, str(len(ran))])
    if is_known(total):
        rows.append(["Everything else", f"{max(0.0, total - spent):,.1f}", "", ""])
        rows.append(["Total", f"{total:,.1f}", "", ""])
    head = ["", "Seconds", "Seconds per epoch", "Epochs"]
    return section("Time", html_table(head, rows, total=is_known(total)))


def _scores(metrics: dict) -> str:
    splits = {label: metrics[split] for split, label in SPLITS.items() if metrics.get(split)}
    for mode, scores in (metrics.get("test_merged") or {}).items():
        splits[f"Test, merged ({mode})"] = scores
    if not splits:
        return section("Scores", note("This run has neither validation nor test scores."))
    tables = "".join(_score_table(label, scores) for label, scores in splits.items())
    body = f'<div class="tables">{tables}</div>{_metric_table(metrics.get("test") or {})}'
    if not metrics.get("test"):
        body += note("This run has no test scores.")
    return section("Scores", body)


def _score_table(label: str, scores: dict) -> str:
    keys = ("dice", "iou")
    classes = scores.get("per_class") or {}
    rows = [
        [str(name), *(number((classes[name] or {}).get(key)) for key in keys)] for name in classes
    ]
    rows.append(["Mean", *(number(scores.get(key)) for key in keys)])
    if is_known(scores.get("accuracy")):
        label = f"{label}, pixel accuracy {number(scores['accuracy'])}"
    return html_table(["Class", "Dice", "IoU"], rows, label, total=True)


def _metric_table(scores: dict) -> str:
    """What the data set is reported by: over the whole test split, and over its groups."""
    if not scores.get("metrics"):
        return ""
    head, rows = metric_rows(scores)
    caption = f"Test, scored at the resolution {scores.get('resolution', MISSING)}"
    return html_table(head, rows, caption)


def metric_rows(scores: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of text of a split's metrics.

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
                [f"{label}, {part}", *(number(column[name].get(part)) for column in columns)]
                for part in value
            ]
        else:
            rows.append([label, *(number(column[name]) for column in columns)])
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
            note(f"{escape(mode)}: {escape(str(merge[key]))}.")
            for key in ("refused", "warning")
            if merge.get(key)
        ]
        if merge.get("refused"):
            continue
        layers = merge.get("layers") or []
        rows.append(_merge_row(mode, before, (merged.get(mode) or {}).get("dice"), merge))
        worst = reduce_known(max, [layer.get("update_error") for layer in layers])
        if worst is not None and worst < ROUNDING:
            notes.append(
                note(f"{escape(mode)}: no error beyond rounding, at most {number(worst, '.1e')}.")
            )
        elif worst is not None:
            figures.append(_merge_figure(index, mode, layers))
    head = ["Mode", "Test Dice before", "Test Dice after", "Difference", "Update error, mean"]
    head += ["Update error, max", "Output error, mean", "Output error, max"]
    head += ["Update error on held-out tokens, mean", "Measured on"]
    annealing = _annealing(metrics.get("annealing") or {})
    return section(
        "Merging", html_table(head, rows) + "".join(notes) + annealing + figure_group(*figures)
    )


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
            cells.append(number(record.get("spatial"), ".2f"))
            rows.append(cells + [number(record.get(f"val_{k}")) for k in ("dice", "iou", "loss")])
    head = ["Annealing", "Epoch", "Share of the neighbours", "Val Dice", "Val IoU", "Val loss"]
    return html_table(head, rows)


def _merge_row(mode: str, before: float | None, after: float | None, merge: dict) -> list[str]:
    difference = after - before if is_known(before) and is_known(after) else None
    cells = [mode, number(before), number(after), number(difference, "+.4f")]
    for key in ("update_error", "output_error"):
        errors = [layer.get(key) for layer in merge.get("layers") or []]
        cells += [number(reduce_known(function, errors), ".3g") for function in (average, max)]
    held_out = [layer.get("held_out_error") for layer in merge.get("layers") or []]
    cells.append(number(reduce_known(average, held_out), ".3g"))
    return [*cells, str(merge.get("source") or MISSING)]


def _merge_figure(index: int, mode: str, layers: list[dict]) -> str:
    return svg_figure(
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
        axes.bar(places + shift, history_column(layers, key), width=0.38, color=colour, label=label)
    axes.set_xticks(places, names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error")
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
