"""Adapters on the Hugging Face Hub, and models of Hugging Face with an adapter inside."""

import re
import tempfile
from pathlib import Path
from typing import Any, TypeVar, cast

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import HFValidationError
from torch import nn

from naslora.adapter.io.base_state import ADAPTER_FOLDER
from naslora.adapter.io.storage import CONFIG_NAME, save_adapter
from naslora.errors import UserError
from naslora.files import read_json, reason_of, write_text
from naslora.methods import load_adapter

Model = TypeVar("Model", bound=nn.Module)

# What huggingface_hub raises. Its errors of the network and of the Hub derive from OSError.
REFUSALS = (HFValidationError, OSError)

CARD = """---
library_name: naslora
tags:
- segment-anything
- lora
{base_line}---

# NAS-LoRA adapter

{description}

```python
from naslora.integrations.hub import from_pretrained

model = from_pretrained(model, "{repo_id}")  # the model that was adapted, without adapters
```
"""


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a NAS-LoRA adapter",
    endpoint: str | None = None,
    **options: Any,
) -> str:
    """Saves the model's adapter and uploads it, with a model card. Creates the repository.

    Args:
        model: as for ``save_adapter``.
        repo_id: "owner/name".
        private: whether a new repository is private; None takes the owner's default.
        token: an access token; None takes the one of ``hf auth login``.
        revision: the branch; None is the main one.
        commit_message: the message of the commit.
        endpoint: the Hub's address; None takes huggingface_hub's.
        options: as for ``save_adapter``, such as ``include``.

    Returns:
        The address of the commit.

    Raises:
        UserError: there is nothing to save, or the Hub refuses.
    """
    api = HfApi(endpoint=endpoint, token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder, **options)
        stored = read_json(Path(folder) / CONFIG_NAME)
        base, layers = stored["base_model_name_or_path"] or "", len(stored["layers"])
        card = CARD.format(
            # The Hub takes nothing but names of its repositories here.
            base_line=f"base_model: {base}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else "",
            description=f"{layers} adapted layers. Base model: {base or 'not recorded'}.",
            repo_id=repo_id,
        )
        write_text(Path(folder) / "README.md", card)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
            )
        except REFUSALS as error:
            raise UserError(f"repo_id {repo_id!r}: {reason_of(error)}") from error
    return str(commit.commit_url)


def from_pretrained(
    model: type[Model] | Model,
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    **options: Any,
) -> Model:
    """Loads an adapter from a folder or the Hub, and the model under it if that is a class.

    Args:
        model: the model that was adapted, which then gets the adapter in place; or its class in
            transformers, such as ``SamModel``.
        source: a folder, or "owner/name" on the Hub: of ``save_adapter`` and ``push_to_hub`` (the
            adapter alone), or of ``save_pretrained`` of an injected model.
        revision: branch, tag or commit on the Hub; None is the main branch.
        token: an access token for the Hub.
        endpoint: the Hub's address; None takes huggingface_hub's.
        options: for the class's own ``from_pretrained``, such as ``dtype``.

    Returns:
        The injected model, in evaluation mode if ``model`` is a class.

    Raises:
        UserError: no adapter there, an adapter alone whose file does not name its base model for a
            class, an adapter that does not fit the model, or the Hub refuses.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            found = snapshot_download(
                str(source), revision=revision, token=token, endpoint=endpoint
            )
        except REFUSALS as error:
            reason = reason_of(error)
            raise UserError(f"{source} is no folder, and the Hub gives none: {reason}") from error
        folder = Path(found)
    whole = (folder / ADAPTER_FOLDER / CONFIG_NAME).is_file()
    adapter = folder / ADAPTER_FOLDER if whole else folder
    if not (adapter / CONFIG_NAME).is_file():
        raise UserError(f"{source} holds no adapter: neither {CONFIG_NAME} nor {ADAPTER_FOLDER}/")
    if isinstance(model, nn.Module):
        if options:
            raise UserError(f"options of a class, but model is a module: {', '.join(options)}")
        loaded = model
    else:
        base = folder if whole else read_json(adapter / CONFIG_NAME).get("base_model_name_or_path")
        if not base:
            raise UserError(
                f"{adapter / CONFIG_NAME} does not name the base model; load that model yourself "
                "and give it instead of its class"
            )
        from transformers.utils import logging

        # On loading, transformers lists the adapter's tensors as unexpected. ``load_adapter``
        # compares the weights under the adapter with those that it was made for.
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            loaded = cast(Any, model).from_pretrained(base, **options)
        finally:
            logging.set_verbosity(verbosity)
    load_adapter(loaded, adapter)
    return cast(Model, loaded)
