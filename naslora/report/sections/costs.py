"""Sections "Parameters" and "Time": what the run trained, and how long it took."""

from statistics import fmean

from naslora.report.numbers import is_known, number, reduce_known
from naslora.report.page import Part
from naslora.report.tables import Table
from naslora.results import Epoch, ParameterCounts


def parameters_parts(counts: ParameterCounts | None) -> list[Part]:
    """A table of parameters by part of the model; nothing if they were not counted."""
    if counts is None:
        return []
    parts = {
        "Frozen": counts.frozen,
        "Decoder": counts.decoder,
        "Trained in the encoder": counts.adapter,
        "Architecture (α)": counts.architecture,
        "Total trainable": counts.trainable,
    }
    rows = [[name, f"{count:,}"] for name, count in parts.items()]
    return [Table(["Part", "Parameters"], rows, total=True)]


def times_parts(history: list[Epoch], total: float | None) -> list[Part]:
    """A table of seconds by phase; nothing if nothing was timed.

    Args:
        history: one record an epoch; may be empty.
        total: seconds of the whole run; None if unknown.
    """
    if not history and not is_known(total):
        return []
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
        mean = number(reduce_known(fmean, ran), ".2f")
        rows.append([label, f"{sum(ran):,.1f}", mean, str(len(ran))])
    if is_known(total):
        rows.append(["Everything else", f"{max(0.0, total - spent):,.1f}", "", ""])
        rows.append(["Total", f"{total:,.1f}", "", ""])
    head = ["", "Seconds", "Seconds per epoch", "Epochs"]
    return [Table(head, rows, total=is_known(total))]
