"""How a command ends: signals, what the machine refuses, and the one line of text for each."""

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch

from naslora.errors import LostProcessError, UserError, one_line, warn
from naslora.files import disk_error, reason_of


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived. The argument is its number."""


def fail(
    text: str, status: int = 2, kind: str = "error: ", every_process: bool = False
) -> NoReturn:
    """Ends the process with one line of text, which the first process of a run prints, or all."""
    with contextlib.suppress(UserError):  # the text tells of the first error
        flush_results()
    if every_process or os.environ.get("RANK", "0") == "0":
        print(f"naslora: {kind}{one_line(text)}", file=sys.stderr)
    raise SystemExit(status) from None


def refusal(error: Exception) -> str | None:
    """What the machine refused; None for any other error, which is a defect of naslora."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "there is not enough memory; lower --batch-size or --image-size, or use a GPU"
    if _is_lost_worker(error):
        return f"{reason_of(error)}; lower --workers, or free some memory"
    reason, name = disk_error(error), getattr(error, "filename", None)
    if reason is None and isinstance(error, OSError) and error.errno is not None:
        reason = error.strerror
    return reason if reason is None or name is None else f"{str(name)[:300]}: {reason}"


def _is_lost_worker(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def flush_results() -> None:
    """Writes what was printed: Python would print a traceback if it failed when it ends.

    Raises:
        UserError: standard output is closed or full.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(f"the results cannot be printed: {error.strerror}") from error


def _signal_main_thread(number: int) -> None:
    main = threading.main_thread().ident
    if main is not None and hasattr(signal, "pthread_kill"):  # it also wakes a thread that waits
        signal.pthread_kill(main, number)
    else:
        signal.raise_signal(number)


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Turns the first SIGINT or SIGTERM into ``Interrupted``. A second one ends the process.

    Python drops what is raised in a destructor, such as that of a data loader, or by a library's
    hook around a fork, so a signal that arrives there is sent again. What these raise after a
    signal is not printed, also later: it may have left objects half built, such as the iterator of
    a data loader. A worker, which inherits the handler, raises nothing: it would print a traceback.
    A worker that was killed is reported by the loader that needs it. TensorBoard's writer raises an
    OSError of its thread in the main thread, too.
    """
    arrived: list[int] = []
    dropped: list[int] = []
    owner = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() != owner and number == signal.SIGINT:
            return  # the owner ends its loader's workers
        if arrived or os.getpid() != owner:
            os._exit(128 + number)
        arrived.append(number)
        raise Interrupted(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    excepthook, unraisablehook = threading.excepthook, sys.unraisablehook

    def report(arguments: Any) -> None:
        writer = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (writer and isinstance(arguments.exc_value, OSError)):
            excepthook(arguments)

    def unraisable(arguments: Any) -> None:
        if not isinstance(arguments.exc_value, Interrupted):
            if not (arrived or dropped or _is_lost_worker(arguments.exc_value)):
                unraisablehook(arguments)
            return
        dropped.extend(arrived)
        arrived.clear()
        # Later: Python also drops what is raised in this hook.
        threading.Timer(0.05, _signal_main_thread, arguments.exc_value.args).start()

    threading.excepthook, sys.unraisablehook = report, unraisable
    try:
        yield
    finally:
        threading.excepthook = excepthook
        if not arrived:
            sys.unraisablehook = unraisablehook
        for number, handler in before.items():
            signal.signal(number, handler)


def guarded(run: Callable[[list[str]], None], resumable: Sequence[str]) -> None:
    """Runs a command, whose arguments are those of the program.

    What the user or the machine refuses becomes one line of text and exit status 2. SIGINT and
    SIGTERM become one line and status 130 and 143.

    ``resumable`` are the commands with --resume.
    """
    warnings.showwarning = lambda message, *_args, **_options: warn(str(message))
    try:
        with signals():
            try:
                run(sys.argv[1:])
            except SystemExit:
                flush_results()
                raise
            flush_results()
    except UserError as error:
        fail(str(error), every_process=isinstance(error, LostProcessError))
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if isinstance(interrupt, Interrupted) else signal.SIGINT
        what = "terminated" if number == signal.SIGTERM else "interrupted"
        known = bool({*resumable} & {*sys.argv[1:2]})
        advice = "; --resume continues the run" if known else ""
        fail(f"{what}{advice}", 128 + number, kind="")
    except (MemoryError, RuntimeError, OSError) as error:
        reason = refusal(error)
        if reason is None:
            raise
        fail(reason)
    finally:
        # The group's threads, if they live until the interpreter ends, can abort the process and
        # change its exit status.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
