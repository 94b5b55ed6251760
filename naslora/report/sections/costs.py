"""Sections "Parameters" and "Time": what the run trained, and how long it took."""

from naslora.report.html import section
from naslora.report.numbers import average, count, is_known, number, reduce_known
from naslora.report.tables import Table, html_table
from naslora.results import Epoch, RunResult


def trainable_parameters(result: RunResult) -> int | None:
    """The number of trained parameters; None if unknown."""
    if result.trainable_parameters is not None:
        return result.trainable_parameters
    return None if result.parameters is None else result.parameters.trainable


def share_of_model(result: RunResult) -> str:
    """The trained share of all parameters in words; empty if unknown."""
    trainable = trainable_parameters(result)
    if trainable is None or result.parameters is None:
        return ""
    total = trainable + result.parameters.frozen
    return f"{trainable / total:.2%} of all" if total else ""


def parameters_section(result: RunResult) -> str:
    """A table of parameters by part of the model; empty if they were not counted."""
    counts = result.parameters
    if counts is None:
        return ""
    rows = [
        ["Frozen", count(counts.frozen)],
        ["Decoder", count(counts.decoder)],
        ["Trained in the encoder", count(counts.adapter)],
        ["Architecture (α)", count(counts.architecture)],
        ["Total trainable", count(trainable_parameters(result))],
    ]
    return section("Parameters", html_table(Table(["Part", "Parameters"], rows), total=True))


def times_section(history: list[Epoch], total: float | None) -> str:
    """A table of seconds by phase; empty if nothing was timed.

    Args:
        history: one record an epoch; may be empty.
        total: seconds of the whole run; None if unknown.
    """
    if not history and not is_known(total):
        return ""
    phases = {
        "Weight steps": [epoch.seconds.weights for epoch in history],
        "Architecture steps": [epoch.seconds.architecture for epoch in history],
        "Evaluation": [epoch.seconds.evaluation for epoch in history],
    }
    rows, spent = [], 0.0
    for label, seconds in phases.items():
        # The mean is over the epochs that had such steps. Stage 1 has no architecture steps.
        ran = [value for value in seconds if is_known(value) and value > 0]
        spent += sum(ran)
        mean = number(reduce_known(average, ran), ".2f")
        rows.append([label, f"{sum(ran):,.1f}", mean, str(len(ran))])
    if is_known(total):
        rows.append(["Everything else", f"{max(0.0, total - spent):,.1f}", "", ""])
        rows.append(["Total", f"{total:,.1f}", "", ""])
    head = ["", "Seconds", "Seconds per epoch", "Epochs"]
    return section("Time", html_table(Table(head, rows), total=is_known(total)))
