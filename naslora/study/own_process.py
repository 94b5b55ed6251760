"""A fresh process for one call of a function. It ends when its parent ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function in a fresh process and returns its result.

    The process ends when this one ends.

    Raises:
        RuntimeError: the process was killed.
        Exception: whatever the function raises.
    """
    # The fork server imports the function's module once. A process forked from it has all imports
    # and no results of an earlier run.
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

    Otherwise the run of a killed study would train on in a folder that a resumed one uses. An
    interrupt from the terminal is the parent's, which then terminates this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # a pool starts this process

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
