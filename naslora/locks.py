"""A lock on an output, so that two processes do not write to one folder."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from naslora.errors import UserError

_held: set[Path] = set()
"""Outputs that this process holds."""


@contextmanager
def locked(output: Path, folder: bool = True) -> Iterator[None]:
    """Holds the lock of an output while the body runs.

    The lock is one of the operating system on the file ``.NAME.lock`` beside the output, or inside
    it if the folder around it is read-only. It ends with the process, also if that is killed. The
    lock can be taken again by the process that holds it. Folders that had to be created for the
    file are removed again if they are empty at the end.

    Args:
        output: it may not exist yet.
        folder: whether the output is a folder, not a file.

    Raises:
        UserError: another process holds the lock, the message names it; the output cannot be
            written, or is a file instead of a folder.
    """
    if folder and output.exists() and not output.is_dir():
        raise UserError(
            f"{output} cannot be written, because {output.name} is a file; choose another --output"
        )
    output = output.resolve()
    if output in _held:
        yield
        return
    path, created = _place(output)
    try:
        descriptor = _take(path, output)
        _held.add(output)
        try:
            yield
        finally:
            _held.discard(output)
            _release(descriptor, path)
    finally:
        for parent in created:
            with suppress(OSError):  # it holds the output now
                parent.rmdir()


def _place(output: Path) -> tuple[Path, list[Path]]:
    """The lock's file, and the folders that were created for it, innermost first."""
    parent = output.parent
    created = []
    for folder in (parent, *parent.parents):
        if folder.exists():
            break
        created.append(folder)
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from error
    inside = output.is_dir() and not os.access(parent, os.W_OK)
    name = ".naslora.lock" if inside else f".{output.name[:200]}.lock"
    return (output if inside else parent) / name, created


def _take(path: Path, output: Path) -> int:
    """Opens and locks the file, and writes this process into it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{output} cannot be written: {error.strerror}") from error
        try:
            _lock(descriptor)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(
                f"{output} is in use by {holder or 'another process'}; wait until it ends, or "
                "choose another --output"
            ) from error
        # The process that held the lock may have removed the file since it was opened.
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    text = f"process {os.getpid()} on {socket.gethostname()}, which started at {started}"
    with suppress(OSError):  # a full disk: the lock holds without its text
        os.ftruncate(descriptor, 0)
        os.write(descriptor, text.encode())
    return descriptor


def _release(descriptor: int, path: Path) -> None:
    if os.name == "nt":  # an open file cannot be removed there
        os.close(descriptor)
        with suppress(OSError):
            path.unlink()
        return
    with suppress(OSError):
        path.unlink()
    os.close(descriptor)


if os.name == "nt":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # others cannot read the bytes that are locked
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        # Not flock: processes that the holder forked would keep that lock when the holder dies.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
