"""Programs in processes that have imported nothing but torch, without importing torch each time."""

import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import NamedTuple


class Result(NamedTuple):
    """What a program or a command ended with and wrote."""

    status: int
    """The exit status; -n if signal n killed it."""
    out: str
    err: str


def _run(program: str, environment: dict[str, str], streams: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


def run_fresh(program: str, **environment: str | None) -> Result:
    """Runs a program in a process of its own; None removes a variable of the environment."""
    changed = {**os.environ, **environment}
    kept = {name: value for name, value in changed.items() if value is not None}
    forks = multiprocessing.get_context("forkserver")  # of a process that has torch alone
    forks.set_forkserver_preload(["torch"])
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("out", "err")]
        process = forks.Process(target=_run, args=(program, kept, streams))
        process.start()
        process.join()
        return Result(process.exitcode, *(path.read_text() for path in streams))
