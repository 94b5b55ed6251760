"""Class and register tokens: they pass by the cell, and the other tokens are its grid."""

import copy

import pytest
import timm
import torch
from adapted_models import named, tokens
from conftest import error_of
from torch import nn
from torch.testing import assert_close

from bench.families import transformers_model
from naslora import (
    NASLoRAConfig,
    inject,
    load_adapter,
    load_merged,
    merge,
    save_adapter,
    save_merged,
)
from naslora.adapter.layer.modules import adapter_layers

PREFIX, GRID, WIDTH = 5, (3, 4), 16


def host() -> nn.Module:
    """One attention whose projection sees (B, 5 + 12, 16) tokens."""
    torch.manual_seed(0)
    return named(attn=named(qkv=nn.Linear(WIDTH, 3 * WIDTH)))


def adapted(**options) -> nn.Module:
    model = host()
    inject(model, NASLoRAConfig(prefix_tokens=PREFIX, **options))
    layer = model.attn.qkv
    layer.grid = GRID
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


@pytest.mark.parametrize("preset", ["linear", "paper"])
def test_the_prefix_gets_plain_lora_and_the_grid_the_cell(preset):
    model = adapted(preset=preset)
    layer, x = model.attn.qkv, tokens(2, PREFIX + 12, WIDTH)
    h = model(x)
    plain = layer.scaling * x[:, :PREFIX] @ layer.lora_A.T @ layer.lora_B.T
    # One rounding of sums of 16 products, as everywhere below.
    assert_close(h[:, :PREFIX], layer.base(x[:, :PREFIX]) + plain)
    on_grid = layer(x[:, PREFIX:].reshape(2, *GRID, WIDTH))
    assert_close(h[:, PREFIX:], on_grid.flatten(1, 2))
    assert_close(layer.base(x) + layer.update(x), h)
    assert_close(torch.jit.trace(model, x)(x), h)
    for count in (3, PREFIX, PREFIX + 11):  # no grid is left
        with pytest.raises(ValueError, match="prefix") as raised:
            model(tokens(1, count, WIDTH))
        assert "\n" not in str(raised.value)


@torch.no_grad()
def test_exact_merge_keeps_the_prefix(tmp_path):
    model, x = adapted(), tokens(2, PREFIX + 12, WIDTH)
    expected, images = model(x), [tokens(4, PREFIX + 12, WIDTH, seed=s) for s in range(2, 6)]
    calibrated = copy.deepcopy(model)
    report = merge(model, "exact", images)
    assert report.max_update_error < 1e-5  # rounding
    assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    save_merged(model, tmp_path)
    loaded = host()
    load_merged(loaded, tmp_path)
    assert torch.equal(loaded(x), model(x))
    # A plain layer cannot treat the prefix in a way of its own; the fit is nearer than the centre.
    centre = copy.deepcopy(calibrated)
    fitted = merge(calibrated, "calibrated", images).max_update_error
    assert 0 < fitted < merge(centre, "center", images).max_update_error


def test_an_adapter_keeps_its_prefix_and_fits_no_other(tmp_path):
    model, x = adapted(), tokens(1, PREFIX + 12, WIDTH)
    save_adapter(model, tmp_path)
    loaded = host()
    load_adapter(loaded, tmp_path)
    loaded.attn.qkv.grid = GRID
    assert torch.equal(loaded.eval()(x), model(x))
    other = host()
    inject(other, NASLoRAConfig(prefix_tokens=1))
    assert "prefix_tokens is 5 in the file, 1 here" in error_of(load_adapter, other, tmp_path)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "num_register_tokens": 4,
}
QKV = r"attention\.(q|k|v)_proj$"


def timm_with_registers():
    options = {"img_size": (56, 84), "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **options)


ENCODERS = {
    "DINOv2": (lambda: transformers_model("Dinov2WithRegistersModel", **SMALL), QKV, (64, 64)),
    "DINOv3": (lambda: transformers_model("DINOv3ViTModel", **SMALL), QKV, (64, 64)),
    # Of its last block the output depends on the class token alone.
    "timm": (timm_with_registers, "qkv", (56, 84)),
}


@pytest.mark.parametrize("make, target, size", ENCODERS.values(), ids=ENCODERS)
def test_encoders_with_class_and_register_tokens(make, target, size):
    torch.manual_seed(0)
    model, x = make(), tokens(1, 3, *size)

    def features():
        output = model.eval()(x)
        return output if isinstance(output, torch.Tensor) else output.last_hidden_state

    expected = features()
    if target == QKV:  # a target that matches nothing names the nearest layers
        line = error_of(inject, model, NASLoRAConfig(target=r"attention\.q_projection$"))
        nearest = line.split("names: ")[1].split(", ")[0]
        assert "no layer matches" in line and "layer.0.attention" in nearest and "q" in nearest
    inject(model, NASLoRAConfig(target=target, prefix_tokens=5 if target == QKV else None))
    assert_close(features(), expected)
    layers = [layer for _, layer in adapter_layers(model)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    features().square().sum().backward()
    assert all(layer.alpha.grad.abs().sum() > 0 for layer in layers)
    layers[0].prefix_tokens = 1
    with pytest.raises(ValueError, match="prefix_tokens=5 in NASLoRAConfig"):
        features()
