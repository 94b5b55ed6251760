"""Adapters on a Hugging Face Hub, which runs on this machine."""

import pytest
import torch

from naslora import UserError, inject, save_adapter
from naslora.integrations.hub import from_pretrained, push_to_hub
from tests.adapted_models import adapted_encoder, build_encoder, images, randomize
from tests.hub_server import COMMIT, local_hub
from tests.hugging_face import build_sam, logits


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
    assert set(files["me/polyps"]) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert b'from_pretrained(model, "me/polyps")' in files["me/polyps"]["README.md"]
    again = from_pretrained(build_encoder(), "me/polyps", endpoint=endpoint)
    assert torch.equal(again(images()), model(images()))


def test_a_folder_loads_into_the_model_that_is_given(tmp_path):
    model, fresh = adapted_encoder(), build_encoder()
    save_adapter(model, tmp_path)
    assert from_pretrained(fresh, tmp_path) is fresh
    assert torch.equal(fresh(images()), model(images()))


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
