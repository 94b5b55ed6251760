"""Adapters and checkpoints on a Hugging Face Hub, which runs on this machine."""

from functools import partial

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download

from naslora import UserError, inject, save_adapter
from naslora.integrations.hub import from_pretrained, push_to_hub
from naslora.sam.shipped import find_checkpoint
from tests.adapted_models import adapted_encoder, build_encoder, images, randomize
from tests.hub_server import COMMIT, local_hub
from tests.hugging_face import build_sam, logits
from tests.run_configs import run_config


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with local_hub() as (endpoint, files):
        yield endpoint, files


def test_an_adapter_goes_to_the_hub_and_comes_back_equal(hub, tmp_path):
    endpoint, files = hub
    model = adapted_encoder()
    url = push_to_hub(model, "me/polyps", token="hf_test", endpoint=endpoint)
    assert url == f"{endpoint}/me/polyps/commit/{COMMIT}"
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert set(files["me/polyps"]) == names
    assert b'from_pretrained(model, "me/polyps")' in files["me/polyps"]["README.md"]
    again = from_pretrained(build_encoder(), "me/polyps", endpoint=endpoint)
    assert torch.equal(again(images()), model(images()))


def encoder():
    return build_encoder().requires_grad_(False)


# What is called with the Hub's address and a folder that holds an adapter, and the line.
REFUSED = {
    "no repository": (
        lambda hub, folder: from_pretrained(encoder(), "me/nothing", endpoint=hub, token="hf_test"),
        r"^me/nothing is no folder, and the Hub gives none: .+$",
    ),
    "bad name": (
        lambda hub, folder: push_to_hub(adapted_encoder(), "a/b/c", endpoint=hub, token="hf_test"),
        r"^repo_id 'a/b/c': .+$",
    ),
    "nothing to upload": (
        lambda hub, folder: push_to_hub(encoder(), "me/nothing", endpoint=hub), "nothing to save"
    ),
    "no adapter": (lambda hub, folder: from_pretrained(encoder(), folder.parent), "holds no adapt"),
    "no base": (
        lambda hub, folder: from_pretrained(type(encoder()), folder), "does not name the base model"
    ),
    "options of a class": (
        lambda hub, folder: from_pretrained(encoder(), folder, dtype=torch.float32),
        "options of a class, but model is a module: dtype",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call, line", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_in_one_line(hub, tmp_path, call, line):
    save_adapter(adapted_encoder(), tmp_path / "adapter")
    with pytest.raises(UserError, match=line):
        call(hub[0], tmp_path / "adapter")
    assert not hub[1]


def test_an_adapter_names_the_model_it_was_made_for(tmp_path):
    base = build_sam()
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    inject(model)
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    again = from_pretrained(type(base), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@pytest.fixture
def checkpoints(hub, monkeypatch):
    """A Hub with a folder of transformers, single files, and one whose licence is not accepted."""
    endpoint, files = hub
    for function in (snapshot_download, HfApi):
        name = f"huggingface_hub.{function.__name__}"
        monkeypatch.setattr(name, partial(function, endpoint=endpoint))
    folder = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"a card"}
    files |= {"me/sam": folder, "gated/sam": folder, "me/files": {"a.pt": b"a", "sub/b.pth": b"b"}}
    return files


def test_a_checkpoint_by_name_is_downloaded_once_and_pinned_to_its_commit(checkpoints, monkeypatch):
    folder = find_checkpoint("vit_b", "hf:me/sam")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert find_checkpoint("vit_b", "hf:me/files@main/sub/b.pth").read_bytes() == b"b"
    run = run_config(name="vit_b", checkpoint="hf:me/files/a.pt").model
    assert run.checkpoint == f"hf:me/files@{COMMIT}/a.pt"
    checkpoints.clear()  # from here on the Hub has nothing
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_checkpoint("vit_b", run.checkpoint).read_bytes() == b"a"
    assert run_config(name="vit_b", checkpoint=run.checkpoint).model == run


NAMES = {
    "hf:sam": "is no name of the Hub: it is hf:owner/name",
    "hf:me/nothing": "the Hub has no such repository, or it is private",
    "hf:me/sam@other": "the repository has no revision other",
    "hf:me/sam/c.pt": "the repository has no file c.pt; name one of model.safetensors",
    "hf:me/files": "the repository has no model*.safetensors; name one of a.pt, sub/b.pth",
    "hf:gated/sam": "its licence must be accepted at https://huggingface.co/gated/sam",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_without_a_checkpoint_is_refused_in_one_line(checkpoints, name):
    with pytest.raises(UserError) as error:
        run_config(name="vit_b", checkpoint=name)
    assert NAMES[name] in str(error.value) and "\n" not in str(error.value)


def test_without_a_network_a_name_that_is_not_in_the_cache_is_refused(checkpoints, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="is not in the cache, and the Hub cannot be reached"):
        find_checkpoint("vit_b", "hf:me/sam")
