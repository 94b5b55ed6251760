"""Decoded and resized images on disk, under a key of their content: never stale, safe to share."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL

from naslora.errors import UserError

# Part of every key: a change of what an entry holds, or of the decoder, makes a new one.
VERSION = f"1 Pillow {PIL.__version__}"


class Cache:
    """A folder of arrays. Any number of workers, processes and runs may share it.

    An entry's name is a hash of the files' content and of what is done to them, so that an edited
    file has another entry. Entries appear whole; what cannot be read back is made anew.

    Args:
        directory: created if need be. It only grows; delete it at any time when no run uses it.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache {directory} cannot be made: {error.strerror}") from error

    def get(self, files: Sequence[bytes], how: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of these files, made if it is not there.

        Args:
            files: the content of the files that the array depends on.
            how: everything else that it depends on.
            make: makes the array; what it raises is raised, and nothing is kept.

        Raises:
            UserError: the entry cannot be written.
        """
        path = self.directory / f"{_key(files, how)}.npy"
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError):
            array = make()
        self._write(path, array)
        return array

    def _write(self, path: Path, array: np.ndarray) -> None:
        # A name of its own for each writer: two workers may meet at the same file.
        try:
            descriptor, name = tempfile.mkstemp(suffix=".partial", dir=self.directory)
            try:
                with open(descriptor, "wb") as file:
                    np.save(file, array)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(name, path)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"cache {self.directory} cannot be written: {error.strerror}; free some space, or "
                "leave out --cache"
            ) from error


def _key(files: Sequence[bytes], how: str) -> str:
    digest = hashlib.blake2b(f"{VERSION} {how}".encode(), digest_size=20)
    for content in files:
        # With its length, so that no two lists of files run into the same bytes
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()
