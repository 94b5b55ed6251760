"""Runs the command line: the script ``naslora``, and python -m naslora, also under torchrun."""

import os
import signal
from typing import Any, NoReturn


def main() -> None:
    """Runs ``naslora.cli.main``. A signal while the libraries are imported ends in one line."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from naslora.cli import main as run  # imports torch, which takes seconds

    run()


def _leave(number: int, frame: Any) -> NoReturn:
    """Ends the process at once: nothing has been started, or everything is written."""
    os.write(2, b"naslora: interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
