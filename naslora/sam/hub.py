"""Checkpoints by name, ``hf:owner/name[@revision][/file]``: files of the Hugging Face Hub.

They are kept where huggingface_hub keeps them, and its settings count: HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE, HF_ENDPOINT.
"""

import re
from contextlib import suppress
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

    Errors as ``download``.
    """
    repository, revision, file = _parts(name)
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return name
    return f"{PREFIX}{repository}@{_snapshot(name).name}" + (f"/{file}" if file else "")


def download(name: str) -> Path:
    """The file or the folder that a name stands for, downloaded unless it is in the cache.

    Raises:
        UserError: the name is none, the Hub has nothing of it or does not give it, or it can be
            neither reached nor found in the cache.
    """
    return _snapshot(name) / (_parts(name)[2] or "")


def _parts(name: str) -> tuple[str | None, ...]:
    """The repository, the revision and the file; None for what the name does not say."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise UserError(f"{name} is no name of the Hub: it is hf:owner/name[@revision][/file]")
    return found.groups()


def _snapshot(name: str) -> Path:
    """The folder of a commit in the cache, with what is wanted of it."""
    from huggingface_hub import HfApi, errors, snapshot_download  # not for the help

    repository, revision, file = _parts(name)
    page = f"https://huggingface.co/{repository}"
    assert repository is not None
    reasons = {  # the more special errors first
        errors.GatedRepoError: f"its licence must be accepted at {page}, and `hf auth login` says "
        "who you are",
        errors.RepositoryNotFoundError: "the Hub has no such repository, or it is private and "
        "`hf auth login` is missing",
        errors.RevisionNotFoundError: f"the repository has no revision {revision}",
        errors.LocalEntryNotFoundError: "it is not in the cache, and the Hub cannot be reached: "
        "connect, unset HF_HUB_OFFLINE if it is set, or give --checkpoint a file",
    }
    try:
        wanted = file or _FOLDER
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except (errors.HFValidationError, errors.EntryNotFoundError, OSError) as error:
        known = (reason for kind, reason in reasons.items() if isinstance(error, kind))
        raise UserError(f"{name}: {next(known, reason_of(error))}") from error
    if (folder / file).is_file() if file else any(folder.glob(_FOLDER[1])):
        return folder
    problem = f"{name}: the repository has no {f'file {file}' if file else _FOLDER[1]}"
    with suppress(OSError):
        files = HfApi().list_repo_files(repository, revision=folder.name)
        found = ", ".join(file for file in files if file.endswith(_CHECKPOINTS))
        problem += f"; name one of {found}" if found else ", and no other checkpoint"
    raise UserError(problem)
