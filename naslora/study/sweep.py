"""The sweep behind ``naslora compare`` and ``naslora ablate``: a table of runs, rows x seeds.

A row is a method or a variant of the configuration. A cell is the run of one row with one seed, in
the folder runs/ROW/SEED of the sweep's output.
"""

import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from naslora.errors import UserError
from naslora.report.numbers import MISSING
from naslora.results import MeanAndSpread

Result = TypeVar("Result")


class CellKey(NamedTuple):
    """Names a cell."""

    row: str
    """The method, or the variant's folder."""
    seed: int

    def folder(self, output: Path) -> Path:
        """Folder of the cell's run, in the sweep's folder ``output``."""
        return output / "runs" / self.row / str(self.seed)


def cell_keys(rows: Sequence[str], seeds: Sequence[int]) -> list[CellKey]:
    """All cells, seed by seed: a sweep that is interrupted can compare its rows on one seed."""
    return [CellKey(row, seed) for seed in seeds for row in rows]


def check_distinct(name: str, values: Sequence[Any]) -> None:
    """Checks that rows or seeds can be the axis of a table.

    Raises:
        UserError: there are no values, or one is given twice.
    """
    if not values:
        raise UserError(f"{name} must name at least one")
    if len(set(values)) != len(values):
        raise UserError(f"{name} must be distinct, got {' '.join(map(str, values))}")


def run_cells(
    pending: Mapping[CellKey, str],
    cells: dict[CellKey, Result],
    run: Callable[[CellKey], Result],
    write: Callable[[], None],
    say: Callable[[str], None],
    failed: Callable[[CellKey, str], Result] | None = None,
    outcome: Callable[[Result], str] | None = None,
) -> None:
    """Runs cells one after the other.

    Args:
        pending: the cells to run, in order, with the title of each for the progress messages.
        cells: what is known of each cell; each result is added here.
        run: runs one cell.
        write: writes the tables of ``cells``; called before the first cell and after each.
        say: prints a progress message.
        failed: makes the result of a cell that raised, from the error in one line; the other cells
            go on. Without it, an error ends the sweep.
        outcome: describes a result in the progress messages.
    """
    write()
    started = time.perf_counter()
    for done, (key, title) in enumerate(pending.items(), 1):
        say(title)
        try:
            cells[key] = run(key)
        except Exception as error:  # any error of one cell must not end the others
            if failed is None:
                raise
            cells[key] = failed(key, _one_line(error))
        write()
        left = (time.perf_counter() - started) / done * (len(pending) - done)
        text = f"about {left / 60:.0f} min left"
        say(f"{outcome(cells[key])}; {text}" if outcome else text)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def say(command: str, text: str) -> None:
    """Prints a progress message of a command to the standard error."""
    print(f"{command}: {text}", file=sys.stderr, flush=True)


# ---- A process for a cell ------------------------------------------------------------------------


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function in a fresh process and returns its result.

    The process ends when this one ends.

    Raises:
        RuntimeError: the process was killed.
        Exception: whatever the function raises.
    """
    # The fork server imports the function's module once. A process forked from it has all imports
    # and no results of an earlier cell.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([function.__module__])
    try:
        with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as pool:
            try:
                return pool.submit(function, *arguments).result()
            except KeyboardInterrupt:  # the pool would wait for the process
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    except BrokenProcessPool as error:
        raise RuntimeError("its process was killed, perhaps for lack of memory") from error


def _end_with_parent() -> None:
    """Ends this process when its parent ends.

    Otherwise the cell of a killed sweep would train on in a folder that a resumed sweep uses. An
    interrupt from the terminal is the parent's, which then terminates this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # a pool starts this process

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# ---- Numbers over the seeds ----------------------------------------------------------------------


def mean_and_spread(values: Sequence[float | None]) -> MeanAndSpread:
    """Mean and standard deviation (n - 1) of one number a seed.

    There is no mean if a value is None, and no spread of a single value.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return MeanAndSpread(None, None, list(values))
    spread = statistics.stdev(known) if len(known) > 1 else None
    return MeanAndSpread(statistics.mean(known), spread, list(values))


def mean_text(number: MeanAndSpread | None, form: str = ".3f") -> str:
    """``mean ± spread`` for a table; ``MISSING`` without a mean.

    Args:
        number: None if there is none.
        form: format of the mean; the spread has three decimals.
    """
    if number is None or number.mean is None:
        return MISSING
    mean = format(number.mean, form)
    return mean if number.spread is None else f"{mean} ± {number.spread:.3f}"


def spread_columns(name: str, number: MeanAndSpread) -> dict[str, float | None]:
    """The columns of a CSV table for a number: its mean and its spread."""
    return {name: number.mean, f"{name}_spread": number.spread}
