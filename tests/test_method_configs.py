"""The configurations of the methods: what each takes, refuses, stores and reads."""

import dataclasses
import json
import re

import pytest
from adapted_models import differing
from conftest import error_of

from naslora import NASLoRAConfig, load_adapter, save_adapter
from naslora.adapter.layer.config import LowRankConfig
from naslora.files import read_json, write_json
from naslora.methods import METHODS, applied, apply, configure, merge_modes, searches
from naslora.methods.conv_lora import ConvLoRAConfig
from naslora.methods.mona import MonaConfig
from naslora.methods.peft_lora import VeRAConfig
from naslora.methods.sam_adapter import SAMAdapterConfig
from naslora.methods.vpt import VPTConfig
from naslora.sam.segmentation import build_model

pytestmark = pytest.mark.usefixtures("tiny_vit")

SIZE = 64
SETTINGS = NASLoRAConfig(rank=6, lora_alpha=16.0, target="qkv$", blocks=(1,), preset="paper")

# (configuration other than the default, a tensor whose shape shows it on an encoder of width 32)
CHANGED = {
    "vpt": (VPTConfig(prompts=5), "blocks.0.prompts", (5, 32)),
    "sam-adapter": (SAMAdapterConfig(scale_factor=4), "sam_adapter.stages.0.up.weight", (32, 8)),
    "mona": (MonaConfig(width=8), "blocks.1.mona2.up.weight", (32, 8)),
    "lora": (LowRankConfig(rank=5), "blocks.0.attn.qkv.lora_A.default.weight", (5, 32)),
    "dora": (LowRankConfig(rank=5), "blocks.0.attn.qkv.lora_A.default.weight", (5, 32)),
    "vera": (VeRAConfig(rank=7), "blocks.0.attn.qkv.vera_lambda_d.default", (7,)),
    "conv-lora": (ConvLoRAConfig(experts=3, blocks=(1,)), "blocks.1.attn.qkv.gate", (3, 3)),
    "nas-lora": (NASLoRAConfig(rank=4), "blocks.0.attn.qkv.cell.pw", (4, 4, 4)),
    "nas-pc-lora": (NASLoRAConfig(rank=6), "blocks.0.attn.qkv.cell.pw", (4, 4, 4)),
}


# --- Types and checks ---


@pytest.mark.parametrize("method", METHODS)
def test_a_configuration_is_frozen_checked_and_survives_json(method):
    config = CHANGED[method][0] if method in CHANGED else METHODS[method].config()
    assert type(config) is METHODS[method].config
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 1
    bad = {"rank": 0, "lora_alpha": 0.0, "target": 3, "blocks": (-1,), "width": 0, "prompts": 0}
    bad |= {"scale_factor": True, "experts": 1, "colour": "red"}
    for name in (config.to_dict().keys() | {"colour"}) & bad.keys():
        assert name in error_of(type(config).from_dict, {name: bad[name]})


# --- What a method takes ---


@pytest.mark.parametrize("method", METHODS)
def test_a_comparison_shares_the_fields_that_several_methods_have(method):
    taken = configure(method, SETTINGS)
    assert type(taken) is METHODS[method].config
    for name, value in taken.to_dict().items():
        if method == "vera" and name == "rank":
            assert value == 256  # a rank of VeRA costs less than a rank of LoRA
        elif name in SETTINGS.to_dict():
            assert value == SETTINGS.to_dict()[name], name
        else:
            assert value == METHODS[method].config().to_dict()[name], name


@pytest.mark.parametrize("method, config, words", [
    ("mona", VPTConfig(), "method mona takes a MonaConfig, got a VPTConfig"),
    ("lora", NASLoRAConfig(), "method lora takes a LowRankConfig, got a NASLoRAConfig"),
    ("bitfit", VPTConfig(), "method bitfit takes a MethodConfig, got a VPTConfig"),
    ("nas-lora", MonaConfig(), "method nas-lora takes a NASLoRAConfig, got a MonaConfig"),
    ("sam-adapter", SAMAdapterConfig(scale_factor=33),
     "scale_factor must be at most the encoder's width 32"),
    ("adalora", None, "method must be one of full, .*, got 'adalora'"),
])  # fmt: skip
def test_other_configurations_are_refused(method, config, words):
    model = build_model("vit_t", SIZE)
    assert re.search(words, error_of(apply, method, model, config)) and applied(model) is None


def test_what_a_configuration_decides():
    assert searches("nas-pc-lora") and not searches("nas-pc-lora", NASLoRAConfig(channel_ratio=0))
    assert searches("nas-lora", NASLoRAConfig(channel_ratio=0))
    assert not any(searches(name) for name in METHODS if not name.startswith("nas-"))
    assert merge_modes("vera", VeRAConfig(rank=4)) == ["exact"]


# --- What is stored ---


@pytest.mark.parametrize("method", CHANGED)
def test_a_file_rebuilds_its_configuration(tmp_path, method):
    config, tensor, shape = CHANGED[method]
    model = build_model("vit_t", SIZE)
    apply(method, model, config)
    assert model.image_encoder.state_dict()[tensor].shape == shape
    save_adapter(model, tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["method"] == method
    assert stored["config"] == applied(model).config.to_dict()
    if "target" in stored["config"]:  # the file holds names, which load without an expression
        blocks = config.blocks or (0, 1)
        linears = ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
        names = [f"blocks.{i}.{linear}" for i in blocks for linear in linears]
        assert stored["config"]["target"] == names
    fresh = build_model("vit_t", SIZE)
    load_adapter(fresh, tmp_path)
    assert applied(fresh) == applied(model)
    assert not differing(fresh.state_dict(), model.state_dict())


@pytest.mark.parametrize("method", ["vpt", "nas-pc-lora"])
@pytest.mark.parametrize("changes, words", [
    ({"colour": "red"}, "there is no setting 'colour'"),
    ({"target": "(a+)+$"}, "target: expected the names of layers"),
])  # fmt: skip
def test_what_a_file_may_not_hold(tmp_path, method, changes, words):
    model, fresh = build_model("vit_t", SIZE), build_model("vit_t", SIZE)
    apply(method, model)
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    stored = read_json(path)
    write_json(path, stored | {"config": stored["config"] | changes})
    before = list(fresh.state_dict())
    assert words in error_of(load_adapter, fresh, tmp_path)
    assert applied(fresh) is None and list(fresh.state_dict()) == before
