"""Section "Scores": what the model reaches on each split, before and after merging."""

from naslora.metrics import METRICS
from naslora.report.html import note, section
from naslora.report.numbers import MISSING, is_known, number
from naslora.report.tables import Table, html_table
from naslora.results import MetricValue, RunResult, SplitScores


def scores_section(result: RunResult) -> str:
    """A table for each split and each way of merging, and one of the metrics of the data set."""
    named = {"Validation": result.val, "Test": result.test}
    named |= {f"Test, merged ({m})": scores for m, scores in (result.test_merged or {}).items()}
    tables = "".join(_score_table(label, scores) for label, scores in named.items() if scores)
    if not tables:
        return section("Scores", note("This run has neither validation nor test scores."))
    body = f'<div class="tables">{tables}</div>'
    if result.test is None:
        body += note("This run has no test scores.")
    elif result.test.metrics:
        caption = f"Test, scored at the resolution {result.test.resolution or MISSING}"
        body += html_table(metric_table(result.test), caption)
    return section("Scores", body)


def _score_table(label: str, scores: SplitScores) -> str:
    rows = [
        [name, number(own.dice), number(own.iou)] for name, own in (scores.per_class or {}).items()
    ]
    rows.append(["Mean", number(scores.dice), number(scores.iou)])
    if is_known(scores.accuracy):
        label = f"{label}, pixel accuracy {number(scores.accuracy)}"
    return html_table(Table(["Class", "Dice", "IoU"], rows), label, total=True)


def metric_table(scores: SplitScores) -> Table:
    """The metrics of a split, over all its images and over each of its groups.

    A metric is a row. A metric of classes has one row a class.
    """
    metrics, groups = scores.metrics or {}, scores.groups or {}
    head = ["Metric", "All", *(f"{name} ({group.images})" for name, group in groups.items())]
    columns = [metrics, *(group.metrics for group in groups.values())]
    rows = []
    for name, value in metrics.items():
        label = METRICS[name].label if name in METRICS else name
        values = [column[name] for column in columns]
        if isinstance(value, dict):
            rows += [
                [f"{label}, {part}", *(number(_of_class(value, part)) for value in values)]
                for part in value
            ]
        else:
            rows.append([label, *(number(_of_all(value)) for value in values)])
    return Table(head, rows)


def _of_class(value: MetricValue, name: str) -> float | None:
    return value.get(name) if isinstance(value, dict) else None


def _of_all(value: MetricValue) -> float | None:
    return None if isinstance(value, dict) else value
