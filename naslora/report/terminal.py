"""What commands print of finished runs."""

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from naslora.errors import printable
from naslora.report.run_report import metric_table
from naslora.results import REPORT, RunResult


def print_summary(result: RunResult, output: Path) -> None:
    """Prints the scores of a finished run, and the path of its report."""
    if os.environ.get("RANK", "0") != "0":
        return
    further = {} if result.untouched is None else {"untouched": result.untouched}
    further |= {} if result.test_last is None else {"last step's weights": result.test_last}
    further |= {} if result.test_float32 is None else {"in float32": result.test_float32}
    further |= {f"merged, {mode}": scores for mode, scores in result.test_merged.items()}
    whole, *others = (metric_table(scores) for scores in (result.test, *further.values()))
    table = Table("test images", f"epoch {result.kept_epoch}", *whole.head[2:], *further)
    for row, *rows in zip(whole.rows, *(other.rows for other in others), strict=True):
        table.add_row(*map(printable, (*row, *(own[1] for own in rows))))
    console = Console(markup=False, emoji=False)  # names of classes are text
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    console.print(f"scored at the resolution {result.test.resolution}", highlight=False)
    console.print(
        f"{result.trainable_parameters:,} parameters trained in {result.seconds:.0f} s; "
        f"look at {output / REPORT}",
        highlight=False,
        soft_wrap=True,
    )
