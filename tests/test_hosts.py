"""Hosts that compute with a layer's weight, or leave a layer out."""

import re
import warnings
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from naslora import AlphaSearch, NASLoRAConfig, UserError, inject, load_merged, merge, save_merged
from naslora.adapter.layer.modules import adapter_layers
from naslora.peft import NasLoraConfig, get_peft_model
from tests.adapted_models import randomize, tokens

TINY = {
    "vit_tiny_patch16_dinov3_qkvb": {"img_size": 64, "depth": 2, "embed_dim": 48},
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 2, "embed_dim": 48},
    "beit_base_patch16_224": {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3},
    "swinv2_tiny_window8_256": {"img_size": 64, "depths": (2,), "embed_dim": 24, "num_heads": (3,)},
}
"""Attentions with biases of their own, which read the weight of qkv unless they are switched."""


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **TINY[name]).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_a_switched_host_starts_as_it_was_trains_merges_and_loads(name, tmp_path):
    model, side = build(name), TINY[name]["img_size"]
    x = tokens(1, 3, side, side)
    start = model.forward_features(x)
    inject(model)
    # A switched attention adds its bias in another step, so float32 rounds otherwise.
    torch.testing.assert_close(model.forward_features(x), start, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("error")
        model(x).square().sum().backward()
    assert all(layer.lora_B.grad is not None for _, layer in adapter_layers(model))
    randomize(model)
    expected = model.forward_features(x)
    merge(model, "exact")
    torch.testing.assert_close(model.forward_features(x), expected, rtol=1e-4, atol=1e-4)
    save_merged(model, tmp_path)
    load_merged(fresh := build(name), tmp_path)
    assert torch.equal(fresh.forward_features(x), model.forward_features(x))


def test_the_refusal_counts_the_class_token_beside_a_window_that_spans_the_image():
    model = build("beit_base_patch16_224")
    model.num_prefix_tokens = 0  # as of a host that does not state them
    inject(model)
    with pytest.raises(ValueError, match=r"17 tokens .* or prefix_tokens=1 in NASLoRAConfig"):
        model(tokens(1, 3, 64, 64))


def test_a_class_token_that_comes_after_the_adapted_blocks_can_be_left_out():
    line = "prefix_tokens=0 in NASLoRAConfig if the sequence starts without"
    for prefix, outcome in ((None, pytest.raises(ValueError, match=line)), (0, nullcontext())):
        model = timm.create_model("cait_xxs24_224", img_size=64, depth=2).eval()
        inject(model, NASLoRAConfig(r"^blocks\.\d+\.attn\.qkv$", prefix_tokens=prefix))
        with outcome:
            model(tokens(1, 3, 64, 64))


class Host(nn.Module):
    """Three layers on (B, H, W, 8), and a way through them."""

    def __init__(self, way, qkv: nn.Module | None = None) -> None:
        super().__init__()
        self.way = way
        self.blocks = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(8, 8)}) for _ in range(3))
        self.unregistered = [block["qkv"] for block in self.blocks]
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = self.way(self, i, block["qkv"], x)
        return self.head(x)


def multihead(host, i, qkv, x):
    """As ``nn.MultiheadAttention``, which hands on the weight of its ``out_proj``."""
    flat = x.flatten(1, 2)
    three, bias = flat.new_ones(24, 8), flat.new_zeros(24)
    options = (8, 2, three, bias, None, None, False, 0.0, qkv.weight, qkv.bias)
    return F.multi_head_attention_forward(flat, flat, flat, *options)[0].view_as(x)


COMPUTES = "the model computes with the weight of blocks.0.qkv instead of calling the layer"
WAYS = [
    (lambda host, i, qkv, x: F.linear(x, qkv.weight, qkv.bias), COMPUTES),
    (lambda host, i, qkv, x: x @ qkv.weight.T, COMPUTES),
    (lambda host, i, qkv, x: F.linear(x, weight=qkv.weight), COMPUTES),
    (multihead, COMPUTES),
    (lambda host, i, qkv, x: qkv(x.to(qkv.weight.dtype).to(qkv.weight)), None),
    (lambda host, i, qkv, x: qkv(x) if qkv.weight.shape[0] == qkv.bias.numel() else x, None),
    (
        lambda host, i, qkv, x: qkv(x) if i != 1 else x,
        "did not call 1 of 3 adapted layers, so these do not train: blocks.1.qkv",
    ),
    (
        lambda host, i, qkv, x: host.unregistered[i](x),
        "did not call 3 of 3 adapted layers, .*: blocks.0.qkv, blocks.1.qkv, blocks.2.qkv",
    ),
]


@pytest.mark.parametrize("adapt", ["inject", "peft"])
@pytest.mark.parametrize(("way", "line"), WAYS)
def test_a_host_that_passes_a_layer_by_is_told_in_one_line(way, line, adapt):
    model = Host(way)
    if adapt == "inject":
        inject(model, NASLoRAConfig(target="qkv"), train="head")
    else:
        get_peft_model(model, NasLoraConfig(target_modules=["qkv"]))
    x = tokens(1, 4, 4, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if line == COMPUTES:
            with pytest.raises(UserError, match=line):
                model(x)
            return
        with torch.no_grad():
            model(x)
        assert not caught  # evaluation is not checked
        for _ in range(2):
            model(x)
    assert len(caught) == (line is not None)
    assert line is None or re.search(line, str(caught[0].message))


def test_merged_layers_are_not_missed():
    model = Host(lambda host, i, qkv, x: qkv(x))
    inject(model, NASLoRAConfig(target="qkv"), train="head")
    merge(model, "exact")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(1, 4, 4, 8))


def test_the_search_names_layers_that_are_never_called():
    model = Host(lambda host, i, qkv, x: host.unregistered[i](x))
    inject(model, NASLoRAConfig(target="qkv"))
    search = AlphaSearch(model, lr=0.01)
    with pytest.raises(UserError, match=r"never called blocks.0.qkv, blocks.1.qkv, blocks.2.qkv"):
        search.step(tokens(1, 4, 4, 8), lambda model, x: model(x).sum())


def test_the_fast_path_of_a_transformer_layer_is_left():
    """In evaluation it computes with all weights at once, unless one of them refuses."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    inject(model, NASLoRAConfig(target="linear[12]"))
    randomize(model)
    x = tokens(1, 16, 8)
    torch.testing.assert_close(torch.no_grad()(model)(x), model(x))
