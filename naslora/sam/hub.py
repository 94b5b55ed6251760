"""Checkpoints by name, ``hf:owner/name[@revision][/file]``: files of the Hugging Face Hub.

They are kept where huggingface_hub keeps them, and its settings count: HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE, HF_ENDPOINT.
"""

import re
from pathlib import Path

from naslora.errors import UserError
from naslora.files import reason_of

PREFIX = "hf:"
_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/(.+))?")
_FOLDER = ["config.json", "model*.safetensors"]
"""What is wanted of a repository if no file is named: a folder of Hugging Face."""
_CHECKPOINTS = (".safetensors", ".pth", ".pt")


def pinned(name: str) -> str:
    """The name with the commit that its revision stands for now, as 40 hexadecimal digits.

    Raises:
        UserError: as ``download``.
    """
    repository, revision, file = _parts(name)
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return name
    folder = _snapshot(name)
    return f"{PREFIX}{repository}@{folder.name}" + (f"/{file}" if file else "")


def download(name: str) -> Path:
    """The file or the folder that a name stands for, downloaded unless it is in the cache.

    Raises:
        UserError: the name is none, the Hub has nothing of it or does not give it, or it can be
            neither reached nor found in the cache.
    """
    file = _parts(name)[2]
    return _snapshot(name) / (file or "")


def _parts(name: str) -> tuple[str, str | None, str | None]:
    found = _NAME.fullmatch(name)
    if found is None:
        raise UserError(f"{name} is no name of the Hub: it is hf:owner/name[@revision][/file]")
    repository, revision, file = found.groups()
    return repository, revision, file


def _snapshot(name: str) -> Path:
    """The folder of a commit in the cache, with what is wanted of it."""
    from huggingface_hub import errors, snapshot_download  # not for the help

    repository, revision, file = _parts(name)
    page = f"https://huggingface.co/{repository}"
    try:
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=file or _FOLDER)
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name}: its licence must be accepted at {page}, and `hf auth login` says who you are"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: the Hub has no such repository, or it is private and `hf auth login` is "
            "missing"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name}: the repository has no revision {revision}") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{name} is not in the cache, and the Hub cannot be reached: connect, unset "
            "HF_HUB_OFFLINE if it is set, or give --checkpoint a file"
        ) from error
    except (errors.HFValidationError, errors.EntryNotFoundError, OSError) as error:
        raise UserError(f"{name}: {reason_of(error)}") from error
    if not ((folder / file).is_file() if file else any(folder.glob(_FOLDER[1]))):
        missing = f"no file {file}" if file else f"no {_FOLDER[1]}"
        raise UserError(f"{name}: the repository has {missing}{_offered(repository, folder.name)}")
    return folder


def _offered(repository: str, commit: str) -> str:
    """What to give instead, if the Hub says it."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(repository, revision=commit)
    except OSError:
        return ""
    found = [file for file in files if file.endswith(_CHECKPOINTS)]
    return f"; name one of {', '.join(found)}" if found else ", and no other checkpoint"
