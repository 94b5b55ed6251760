"""A lock on an output, so that two processes do not write to one place."""

import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from naslora.errors import UserError
from naslora.files import LOCK

HOLDER = b"process "
"""What a lock file begins with, unless it is empty."""
_held: set[Path] = set()
"""The lock files that this process holds."""


@contextmanager
def locked(output: Path, folder: bool = True) -> Iterator[None]:
    """Holds the lock of an output while the body runs.

    The lock is one of the operating system on a file of naslora's own: ``.naslora.lock`` inside a
    folder, which every mount of the folder shows, or ``.NAME.naslora.lock`` beside anything that
    appears as a whole. It ends with the process, also if that is killed. The lock can be taken
    again by the process that holds it. Folders that had to be created for the file are removed
    again if they are empty at the end.

    ``output`` may not exist yet. ``folder`` says whether it is a folder that is filled file by
    file.

    Raises:
        UserError: another process holds the lock, the message names it; the output cannot be
            written, or is a file instead of a folder; a file of another program has the lock's
            name.
    """
    if folder and output.exists() and not output.is_dir():
        raise UserError(
            f"{output} cannot be written, because {output.name} is a file; choose another --output"
        )
    output = Path(os.path.realpath(output))
    path = output / LOCK if folder else output.with_name(f".{output.name[:200]}{LOCK}")
    if path in _held:  # closing a second descriptor would free it
        yield
        return
    missing = [parent for parent in path.parents if not parent.exists()]  # innermost first
    try:
        descriptor = _take(path, output)
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
            if os.name == "nt":  # an open file cannot be removed there
                os.close(descriptor)
            with suppress(OSError):
                path.unlink()
            if os.name != "nt":
                os.close(descriptor)
    finally:
        for parent in missing:
            with suppress(OSError):  # it holds the output now
                parent.rmdir()


def _take(path: Path, output: Path) -> int:
    """Opens and locks the file, and writes this process into it."""
    # No link is followed, and a pipe does not block.
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    foreign = UserError(f"{path} is no lock of naslora; remove it, or choose another --output")
    attempts = 0
    while True:
        attempts += 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempts <= 100:
                continue  # another process may have removed its empty folder
            if path.is_symlink() or path.is_dir():
                raise foreign from error
            raise UserError(f"{output} cannot be written: {error.strerror}") from error
        with ExitStack() as opened:
            opened.callback(os.close, descriptor)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise foreign
            try:
                _lock_file(descriptor)
            except OSError as error:
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                raise UserError(
                    f"{output} is in use by {holder or 'another process'}; wait until it ends, or "
                    "choose another --output"
                ) from error
            if os.read(descriptor, len(HOLDER)) not in (b"", HOLDER):
                raise foreign
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            text = f"{os.getpid()} on {socket.gethostname()}, which started at {started}"
            with suppress(OSError):  # a full disk: the lock holds without its text
                os.lseek(descriptor, 0, os.SEEK_SET)  # Windows has no pwrite
                os.ftruncate(descriptor, 0)
                os.write(descriptor, HOLDER + text.encode())
            # The process that held the lock may have removed the file since it was opened.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    opened.pop_all()
                    return descriptor


if os.name == "nt":
    import msvcrt

    def _lock_file(descriptor: int) -> None:
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # others cannot read the bytes that are locked
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock_file(descriptor: int) -> None:
        # Not flock: processes that the holder forked would keep that lock when the holder dies.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
