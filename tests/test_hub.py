"""Adapters on a Hugging Face Hub, which runs on this machine."""

import pytest
import torch

from naslora import UserError, save_adapter
from naslora.adapter.layer.modules import adapter_layers
from naslora.integrations.hub import from_pretrained, push_to_hub
from tests.adapted_models import adapted_encoder, build_encoder, images
from tests.hub_server import COMMIT, local_hub


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


def test_a_repository_that_does_not_exist_is_one_line(hub):
    with pytest.raises(UserError, match=r"^me/nothing is no folder, and the Hub gives none: .+$"):
        from_pretrained(build_encoder(), "me/nothing", endpoint=hub[0], token="hf_test")


def test_a_bad_name_is_one_line(hub):
    with pytest.raises(UserError, match=r"^repo_id 'a/b/c': .+$"):
        push_to_hub(adapted_encoder(), "a/b/c", endpoint=hub[0], token="hf_test")


def test_a_folder_without_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no adapter"):
        from_pretrained(build_encoder(), tmp_path)


def test_a_model_without_adapter_is_not_uploaded(hub):
    model = build_encoder().requires_grad_(False)
    with pytest.raises(UserError, match="nothing to save"):
        push_to_hub(model, "me/nothing", endpoint=hub[0])
    assert not hub[1]


def test_an_adapter_alone_needs_to_name_its_base_for_a_class(tmp_path):
    save_adapter(adapted_encoder(), tmp_path)
    with pytest.raises(UserError, match="does not name the base model"):
        from_pretrained(type(build_encoder()), tmp_path)


def test_options_belong_to_a_class(tmp_path):
    save_adapter(adapted_encoder(), tmp_path)
    model = build_encoder()
    with pytest.raises(UserError, match="options of a class, but model is a module: dtype"):
        from_pretrained(model, tmp_path, dtype=torch.float32)
    assert not any(adapter_layers(model))
