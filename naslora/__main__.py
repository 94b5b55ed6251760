"""Runs the command line: the script ``naslora``, and python -m naslora, also under torchrun."""

import gc
import io
import os
import signal
import sys
from typing import Any, NoReturn


def main() -> None:
    """Runs ``naslora.cli.main``. A signal while the libraries are imported ends in one line."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    open_streams()
    gc.disable()  # what is imported is kept; to look through it takes a fourth of the time
    from naslora.cli import main as run  # imports torch, which takes seconds

    gc.freeze()
    gc.enable()
    run()


class _Log(io.FileIO):
    """Standard error: a message that cannot be written is lost, and the command goes on."""

    def write(self, text: Any) -> int:
        try:
            return super().write(text) or 0
        except OSError:
            return len(text)


def open_streams() -> None:
    """Makes standard output and error safe to print to.

    A closed stream is opened, because the next file would get its number: writing to standard
    output then fails, as it does if it is full. Characters that the encoding lacks are escaped.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, mode), number)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    else:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), errors="backslashreplace")
    log = io.BufferedWriter(_Log(2, "w", closefd=False))
    encoding = getattr(sys.stderr, "encoding", None)
    sys.stderr = io.TextIOWrapper(log, encoding, errors="backslashreplace", line_buffering=True)


def _leave(number: int, frame: Any) -> NoReturn:
    """Ends the process at once: nothing has been started, or everything is written."""
    os.write(2, b"naslora: interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
