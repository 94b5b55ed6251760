"""A cache of decoded and resized images on disk.

The key of an entry is a hash of the files' content, so an edited file never gets an old entry.
"""

import hashlib
import io
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import PIL
import torch
import torchvision

from naslora.errors import UserError

# Part of every key: increase the number when the content of entries changes. Another version may
# decode or resize a file to other pixels.
VERSION = f"5 Pillow {PIL.__version__} torchvision {torchvision.__version__}"
Tensors = TypeVar("Tensors")
"""A tensor, or a tuple or list of tensors and None."""


class Cache:
    """A folder of tensors. Any number of workers, processes and runs may share it.

    Entries are written atomically, with a CRC-32. An entry that is damaged is created again. The
    folder only grows; it may be deleted while no run uses it. It is created if it does not exist.

    Raises:
        UserError: the folder cannot be created.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache {directory} cannot be created: {error.strerror}") from error

    def get(self, files: Sequence[bytes], how: str, make: Callable[[], Tensors]) -> Tensors:
        """Reads an entry, or creates it: what ``make`` returns, or returned then, on the CPU.

        The tensors depend on the content of ``files`` and, as text, on ``how``. If ``make`` raises,
        no entry is written.

        Raises:
            UserError: the entry cannot be written.
        """
        key = hashlib.blake2b(f"{VERSION} {how}".encode(), digest_size=20)
        for content in files:
            # The length separates the files: two lists must not concatenate to the same bytes.
            key.update(len(content).to_bytes(8, "little"))
            key.update(content)
        path = self.directory / f"{key.hexdigest()}.pt"
        with suppress(OSError):
            content = path.read_bytes()
            if _checksum(content[:-4]) == content[-4:]:
                return torch.load(io.BytesIO(content[:-4]), weights_only=True)
        made, stored = make(), io.BytesIO()
        torch.save(made, stored)
        try:
            # Each writer uses its own temporary name, because two may write the same entry.
            descriptor, name = tempfile.mkstemp(suffix=".partial", dir=self.directory)
            try:
                with open(descriptor, "wb") as file:
                    file.write(stored.getvalue() + _checksum(stored.getvalue()))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(name, path)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"cache {self.directory} cannot be written: {error.strerror}; free some space, or "
                "omit --cache"
            ) from error
        return made


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")
