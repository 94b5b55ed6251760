"""NAS-LoRA as a custom module of PEFT: forward, training, files, several adapters, merging."""

import json
import re
import warnings

import pytest
import torch
from adapted_models import (
    adapted_encoder,
    build_encoder,
    differing,
    images,
    named,
    state_of,
    stir,
)
from conftest import error_of
from hugging_face import build_sam, logits
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn

import naslora
from naslora import NASLoRAConfig, NASLoRALinear, inject, merge
from naslora.peft import NasLoraConfig, get_peft_model


def wrapped(host: nn.Module | None = None, **options) -> PeftModel:
    """An adapted encoder in evaluation mode, with trainable parameters away from their start."""
    return moved(get_peft_model(host or build_encoder(), NasLoraConfig(**options)))


def moved(model: PeftModel) -> PeftModel:
    stir((parameter for parameter in model.parameters() if parameter.requires_grad), 0.1)
    return model.eval()


def files_of(model: PeftModel, directory) -> dict:
    model.save_pretrained(directory)
    return json.loads((directory / "adapter_config.json").read_text())


def test_it_computes_what_inject_computes():
    ours, theirs = adapted_encoder(), get_peft_model(build_encoder(), NasLoraConfig())
    state = {
        name.replace(".base.", ".base_layer.")
        .replace(".lora_A", ".lora_nas.default.encoder")
        .replace(".lora_B", ".lora_nas.default.decoder")
        .replace(".alpha", ".lora_nas.default.alpha")
        .replace(".channels", ".lora_nas.default.channels")
        .replace(".cell.", ".lora_nas.default.cell_"): value
        for name, value in ours.state_dict().items()
    }
    theirs.get_base_model().load_state_dict(state)
    first, second, *_ = (m.lora_A for m in theirs.modules() if isinstance(m, NASLoRALinear))
    assert torch.equal(theirs(images()), ours(images())) and not torch.equal(first, second)


def test_training_moves_the_adapter_and_modules_to_save_alone():
    model = get_peft_model(build_encoder(), NasLoraConfig(modules_to_save=["neck"])).train()
    before = state_of(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    for _ in range(2):  # lora_B is zero before the first step, so the rest moves in the second
        model(images()).abs().mean().backward()
        optimizer.step()
    trained = {n for n in before if ("lora_nas" in n and "channels" not in n) or "modules_to" in n}
    assert differing(model.state_dict(), before) == trained


@pytest.mark.parametrize("preset", ["linear", "paper"])
@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("door", ["PEFT", "Transformers"])
def test_files_round_trip_under_any_name(tmp_path, preset, name, door):
    options = {"preset": preset, "r": 4, "channel_ratio": 0.5}
    model = wrapped(build_sam(), modules_to_save=["mask_decoder"], **options)
    stored = files_of(model, tmp_path)
    assert (stored["peft_type"], stored["preset"], stored["r"]) == ("NASLORA", preset, 4)
    again = build_sam()
    if door == "PEFT":
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # as PEFT's about missing tensors
            again = PeftModel.from_pretrained(again, tmp_path, name)
    else:
        found = again.load_adapter(str(tmp_path), adapter_name=name)
        assert not (found.missing_keys or found.unexpected_keys or found.mismatched_keys)
    assert torch.equal(logits(again), logits(model))
    adapters = [layer for layer in again.modules() if isinstance(layer, NASLoRALinear)]
    assert len(adapters) == 8
    assert not any(p.requires_grad for layer in adapters for p in layer.parameters())


def test_transformers_adds_and_saves_adapters(tmp_path, monkeypatch):
    # Some versions of transformers ask for a PEFT that is not released yet.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = build_sam()
    model.add_adapter(NasLoraConfig(), "first")
    moved(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build_sam(), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_folders_of_save_adapter_and_of_peft_name_each_others_reader(tmp_path):
    naslora.save_adapter(adapted_encoder(), tmp_path / "ours")
    files_of(wrapped(), tmp_path / "pefts")
    for read in (PeftModel.from_pretrained, lambda m, folder: PeftConfig.from_pretrained(folder)):
        line = error_of(read, build_encoder(), tmp_path / "ours")
        assert "save_adapter wrote this adapter: call nas" in line
    line = error_of(naslora.load_adapter, build_encoder(), tmp_path / "pefts")
    assert "a PeftModel wrote " in line and ": call PeftModel.from_pretrained" in line


@pytest.mark.parametrize("first", ["NAS-LoRA", "LoRA"])
def test_lora_stands_on_other_layers(first, tmp_path):
    """Both are saved, loaded, switched and merged as PEFT's own."""
    configs = {
        "nas": NasLoraConfig(target_modules=["qkv"]),
        "plain": LoraConfig(target_modules=["lin1"], init_lora_weights=False),
    }
    names = list(configs) if first == "NAS-LoRA" else list(configs)[::-1]
    model = get_peft_model(build_encoder(), configs[names[0]], names[0])
    model.add_adapter(names[1], configs[names[1]])
    model.base_model.set_adapter(names)
    expected = moved(model)(images())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build_encoder(), tmp_path / names[0], names[0])
    again.load_adapter(tmp_path / names[1], names[1])
    alone = again.eval()(images())
    again.base_model.set_adapter(names)
    assert torch.equal(again(images()), expected) and not torch.equal(alone, expected)
    merged = again.merge_and_unload(adapter_names=names)
    assert (merged(images()) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_adapters_are_switched_disabled_and_deleted():
    plain, model = build_encoder()(images()), wrapped()
    first = model(images())
    model.add_adapter("second", NasLoraConfig(r=6))
    model.set_adapter("second")
    assert torch.equal(model(images()), plain)
    model.set_adapter("default")
    assert torch.equal(model(images()), first)
    with model.disable_adapter():
        assert torch.equal(model(images()), plain)
    model.delete_adapter("second")
    assert torch.equal(model(images()), first)
    assert torch.equal(model.unload()(images()), plain)


def test_two_active_adapters_add_their_updates():
    layer, x = named(qkv=nn.Linear(8, 6)), torch.randn(2, 4, 5, 8)
    model = get_peft_model(layer, NasLoraConfig(target_modules=["qkv"]))
    model.add_adapter("second", NasLoraConfig(target_modules=["qkv"], r=5))
    outputs = []
    for module in model.modules():
        if isinstance(module, NASLoRALinear):
            nn.init.normal_(module.lora_B)
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        outputs.append(model(x))
    first, second, both = outputs
    torch.testing.assert_close(both, first + second - layer.qkv.base_layer(x))  # float32 rounding


def test_a_center_merge_leaves_the_original_model():
    model = wrapped()
    merge(model, mode="center")
    expected = model(images())
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == build_encoder().state_dict().keys()
    assert torch.equal(merged(images()), expected)


@pytest.mark.parametrize(
    ("last", "line"),
    [
        (lambda model: model.merge_and_unload(), "call naslora.save_merged.* mode 'center'"),
        (lambda model: model.get_base_model(), "the adapter belongs to a PeftModel"),
        (lambda model: (merge(model, "center"), model.merge_and_unload())[1], None),
        (lambda model: model.unload(), None),
    ],
    ids=["exact", "adapted", "center", "unloaded"],
)
def test_save_pretrained_of_the_host_stores_all_weights_or_refuses(last, line, tmp_path):
    transformers = pytest.importorskip("transformers")
    host = last(get_peft_model(build_sam(), NasLoraConfig()))
    if line is not None:
        assert re.search(line, error_of(host.save_pretrained, tmp_path))
        assert not any(tmp_path.iterdir())
        return
    host.save_pretrained(tmp_path)
    again, info = transformers.SamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not differing(again.state_dict(), host.state_dict())


def test_other_ways_to_merge_are_refused():
    mixed = get_peft_model(build_encoder(), NasLoraConfig(), mixed=True)
    assert torch.equal(mixed(images()), build_encoder()(images()))
    assert "call merge_and_unload() of a PeftModel" in error_of(mixed.merge_and_unload)
    model = wrapped()
    assert "call merge_and_unload()" in error_of(model.merge_adapter)
    model.add_adapter("second", NasLoraConfig())
    line = error_of(model.merge_and_unload, adapter_names=["default", "second"])
    assert "one adapter merges at a time, got default, second" in line


def test_frozen_batch_norms_stay_as_they_are_and_trained_ones_do_not():
    head = nn.Sequential(nn.BatchNorm2d(6))
    model = named(qkv=nn.Linear(8, 6), norm=nn.BatchNorm2d(6), head=head)
    config = NasLoraConfig(target_modules=["qkv"], modules_to_save=["head"])
    adapted = get_peft_model(model, config).train()
    assert not model.norm.training and adapted.training
    assert model.head.modules_to_save["default"][0].training


def test_token_sequences_take_the_grid_that_the_host_states():
    host = named(qkv=nn.Linear(8, 6))
    host.grid_size = (2, 6)
    model = get_peft_model(host, NasLoraConfig(target_modules=["qkv"]))
    model.add_adapter("second", NasLoraConfig(target_modules=["qkv"]))
    model.set_adapter("second")
    assert model(torch.randn(1, 12, 8)).shape == (1, 12, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout must be 0.0, got 0.1"),
        ({"use_dora": True}, "use_dora must be False, got True"),
        ({"arrow_config": {}}, "arrow_config must be None, got {}"),
        ({"loftq_config": {"bits": 4}}, "loftq_config must be {}"),
        ({"bias": "all"}, "bias must be 'none', got 'all'"),
        ({"channel_ratio": 2}, "channel_ratio: expected float <= 1.0"),
        ({"preset": "none such"}, "preset"),
    ],
)
def test_what_the_cell_does_not_support_is_refused(options, message):
    assert message in error_of(lambda: get_peft_model(build_encoder(), NasLoraConfig(**options)))


def test_other_adapters_beside_it_are_refused():
    model, plain = wrapped(), LoraConfig(target_modules=["qkv"])
    assert "takes NasLoraConfig, got LoraConfig" in error_of(model.add_adapter, "plain", plain)
    other = get_peft_model(build_encoder(), plain)
    assert "qkv has plain LoRA already" in error_of(other.add_adapter, "nas", NasLoraConfig())
    assert "has NAS-LoRA layers already" in error_of(inject, model, NASLoRAConfig())
