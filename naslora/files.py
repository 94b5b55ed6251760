"""Atomic writing of files and folders, and reading of JSON, safetensors and PyTorch files.

JSON and safetensors files carry the SHA-256 of their content, which reading them verifies. Files
without one, which others wrote or edited, are read without. PyTorch's files are zip archives, which
carry a CRC-32 of each record.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from naslora.errors import UserError
from naslora.state_dicts import plain_tensors, tensors_checksum

FORMAT = 1
"""Version of the files' format, under the key "version" in JSON files."""
CHECKSUM = "sha256"
"""Key of the checksum in JSON files and in the metadata of safetensors files."""
# The names start with a dot, and say that the files are naslora's: others are never removed.
LOCK = ".naslora.lock"
PARTIAL = ".naslora.partial"
NO_SAFETENSORS = "is damaged or no safetensors file"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)

# ---- Writing -------------------------------------------------------------------------------------


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path. The file that the body writes there replaces ``path`` at the end.

    If the body raises, or the process is killed, ``path`` keeps its old content. The next call
    removes what a killed process leaves. Missing parent folders are created.

    Raises:
        UserError: ``path`` cannot be written, for instance because the disk is full.
    """
    with _temporary(path, folder=False) as temporary:
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes the file unreadable for others
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder, which becomes ``path`` at the end; else as ``replaced_file``.

    ``path`` must not exist, or be an empty folder.
    """
    with _temporary(path, folder=True) as temporary:
        yield temporary
        try:
            if path.is_dir():
                path.rmdir()
            os.replace(temporary, path)
        except OSError as error:
            if error.errno != errno.EBUSY:  # a mount point, such as a container's volume
                raise
            for file in temporary.iterdir():
                shutil.move(file, path)


@contextmanager
def _temporary(path: Path, folder: bool) -> Iterator[Path]:
    """Yields a new file or folder beside ``path``, which is removed at the end if it is there."""
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir() if folder else temporary.touch(exist_ok=False)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield temporary
    except Exception as error:  # the writers of the formats raise exceptions of many types
        reason = disk_error(error)
        if isinstance(error, UserError) and str(temporary) in str(error):
            raise UserError(str(error).replace(str(temporary), str(path))) from error
        if isinstance(error, UserError) or reason is None:
            raise
        raise UserError(f"{path} cannot be written: {reason}") from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether the file or folder is a lock, or what a killed process left, which means nothing."""
    return path.name.startswith(".") and path.name.endswith((PARTIAL, LOCK))


def disk_error(error: BaseException | None) -> str | None:
    """What the disk refused, and the advice; None if ``error`` has another cause."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        # safetensors' errors and those of PyTorch's shared memory name the number in the text only.
        if isinstance(error, SafetensorError | RuntimeError):
            found = re.search(r"os error (\d+)|unable to \w+ .*\((\d+)\)", str(error))
            number = int(found[1] or found[2]) if found else None
        if number in DISK_ERRORS:
            advice = ""
            if number in (errno.ENOSPC, errno.EDQUOT):
                advice = "; free some space and run the command again, with --resume if it has that"
            return os.strerror(number or 0) + advice
        error = error.__cause__ or error.__context__
    return None


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` in UTF-8, as ``replaced_file``."""
    with replaced_file(path) as temporary:
        # The name of an image need not be UTF-8: Python holds such bytes as lone surrogates.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, as ``replaced_file``. A dictionary also gets version and checksum."""
    if isinstance(value, dict):
        value = {"version": FORMAT, **value}
        value[CHECKSUM] = _json_checksum(value)
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file with its checksum beside other metadata, as ``replaced_file``."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = dict(metadata or {})
    described[CHECKSUM] = tensors_checksum(whole, described)
    with replaced_file(path) as temporary:
        save_file(whole, temporary, metadata=described)


def write_torch(path: Path, value: Any) -> None:
    """Writes ``value`` with ``torch.save``, as ``replaced_file``."""
    # A Python file: PyTorch's own one does not name the operating system's error.
    with replaced_file(path) as temporary, open(temporary, "wb") as file:
        torch.save(value, file)


# ---- Reading -------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """Reads a JSON file. Version and checksum are verified, and left out of a dictionary.

    Raises:
        UserError: the file is missing, cannot be read, is not JSON, does not match its checksum, or
            is of a later version.
    """
    with reading(path, "cannot be read as JSON"):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        return value
    version = value.get("version", 0)
    check_version(path, version)
    stored = value.pop(CHECKSUM, None)
    if (stored is not None or version > 0) and stored != _json_checksum(value):
        raise UserError(
            f"{path} does not match its checksum: it is damaged or was edited; if you edited it, "
            f"remove its entries {CHECKSUM!r} and 'version'"
        )
    value.pop("version", None)
    return value


def check_version(path: Path, version: Any) -> None:
    """Raises a ``UserError`` if ``version`` is no number, or greater than ``FORMAT``."""
    if not isinstance(version, int) or version > FORMAT:
        raise UserError(
            f"{path} has version {str(version)[:40]} of the format, and this naslora reads "
            f"versions up to {FORMAT}: update naslora"
        )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file to the CPU, and verifies its checksum if it has one.

    Raises:
        UserError: the file is missing, truncated, not a safetensors file, or does not match its
            checksum; as ``plain_tensors``.
    """
    metadata = read_metadata(path)
    with reading(path, NO_SAFETENSORS):
        tensors = plain_tensors(load_file(path), path)
    stored = metadata.pop(CHECKSUM, None)
    if stored is not None and stored != tensors_checksum(tensors, metadata):
        raise UserError(f"{path} is damaged: it does not match its checksum; use another copy")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, with its checksum. The tensors are not read.

    Raises:
        UserError: the file is missing, truncated or not a safetensors file.
    """
    with reading(path, NO_SAFETENSORS), safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def read_torch(path: Path) -> Any:
    """Reads a file that ``write_torch`` wrote. It executes no code from the file.

    Raises:
        UserError: the file is missing or damaged, or holds other objects than tensors and plain
            values.
    """
    with reading(path):
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def reading(path: Path, problem: str = "is damaged or has another format") -> Iterator[None]:
    """Turns every error of the body, which reads and checks ``path``, into one line that names it.

    Lack of memory is no error of the file, and is raised as it is. ``problem`` is what another
    error of the body means.

    Raises:
        UserError: the body raised, or ``path`` is neither a file nor a folder.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is neither a file nor a folder")  # reading a pipe could wait
    try:
        yield
    except MemoryError:
        raise
    except UserError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # what a damaged file raises depends on the library that reads it
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        raise UserError(f"{path} {problem}: {reason_of(error)}") from error


def check_archive(path: Path) -> None:
    """Verifies the CRC-32 of every record of a zip archive, such as PyTorch writes.

    Raises:
        UserError: one is damaged, or the file is no zip archive.
    """
    with reading(path), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise UserError(f"{path} is damaged: {damaged} in it does not match its checksum")


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, for a message of ours.

    PyTorch's advice to load with ``weights_only=False`` is left out, because that runs code.
    """
    text = " ".join(str(error).strip().split("\n")[0].split())
    if isinstance(error, KeyError):
        return f"it lacks {text[:300]}"
    if "weights_only" in text or "Weights only" in text:
        return "it holds other objects than tensors and plain values, or is no PyTorch file"
    return text[:300] or type(error).__name__


# ---- Checksums -----------------------------------------------------------------------------------


def file_checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _json_checksum(value: dict[str, Any]) -> str:
    """SHA-256 of a dictionary as JSON with sorted keys, without its own entry."""
    content = {key: item for key, item in value.items() if key != CHECKSUM}
    content = json.loads(json.dumps(content))  # keys become text, as in the file
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
