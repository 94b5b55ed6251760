"""Which (H, W) a sequence of tokens has: what the host states, else a square."""

import copy
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import timm
import torch
import transformers
from adapted_models import named, relative, tokens
from torch import nn

from naslora import NASLoRAConfig, inject, merge
from naslora.adapter.layer.grid import find_hint
from naslora.adapter.layer.modules import adapter_layers
from naslora.methods import apply


class Attention(nn.Sequential):
    """The name of the class tells what it is."""


def host(attention=(), block=(), **stated) -> nn.Module:
    """A model of one block, with attributes of the attention, of the block and of the model."""
    torch.manual_seed(0)
    attn = Attention(OrderedDict(qkv=nn.Linear(16, 48)))
    blocks = nn.Sequential(named(attn=attn, mlp=nn.Sequential(nn.Linear(48, 16))))
    model = named(blocks=blocks)
    for module, values in ((attn, attention), (blocks[0], block), (model, stated)):
        vars(module).update(values)
    return model


def config(**values) -> nn.Module:
    return host(config=SimpleNamespace(**values))


HOSTS = {
    "patch_embed": lambda h, w: host(patch_embed=SimpleNamespace(grid_size=(h, w))),
    "window of the attention": lambda h, w: host({"window_size": (h, w)}),
    "window of the block": lambda h, w: host(block={"window_size": (h, w)}),
    "resolution": lambda h, w: host({"resolution": (h, w)}),
    "grid_size": lambda h, w: host(grid_size=(h, w)),
    "config": lambda h, w: config(image_size=(4 * h, 4 * w), patch_size=4),
}
hosts = pytest.mark.parametrize("make", HOSTS.values(), ids=HOSTS)


def injected(host: nn.Module, **options) -> nn.Module:
    inject(host, NASLoRAConfig(**options))
    [(_, layer)] = adapter_layers(host)
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(1))
    return host.eval()


@hosts
def test_the_grid_that_the_host_states_is_taken(make):
    """The silent loss: 8 x 32 tokens were taken as 16 x 16."""
    model = injected(make(8, 32))
    x = tokens(2, 256, 16)
    expected = model(x.reshape(2, 8, 32, 16)).reshape(2, 256, 16)
    assert torch.equal(model(x), expected)
    square = model(x.reshape(2, 16, 16, 16)).reshape(2, 256, 16)
    assert relative(square - expected, expected) > 1e-3
    twin = copy.deepcopy(model)
    model.blocks[0].attn.qkv.grid = (16, 16)  # the user's wins
    assert torch.equal(model(x), square)
    assert torch.equal(twin(x), expected)
    merge(twin)
    torch.testing.assert_close(twin(x), expected, atol=1e-5, rtol=1e-5)  # rounding of the merge
    small = injected(make(4, 4))
    merge(small)
    assert not any("grid" in name for name in small.state_dict())


@hosts
def test_a_class_token_is_refused(make):
    """The silent loss: a class token beside 5 x 7 tokens was taken as a part of 6 x 6."""
    with pytest.raises(ValueError) as raised:
        injected(make(5, 7))(tokens(1, 36, 16))
    message = str(raised.value)
    assert "36 tokens at layer 'blocks.0.attn.qkv' are not the 5 x 7 grid" in message
    assert "\n" not in message and "`layer.grid = (H, W)`" in message
    assert "prefix_tokens=" in message


def test_conv_lora_takes_the_grid_too():
    model = HOSTS["patch_embed"](8, 32)
    apply("conv-lora", model)
    layer = model.blocks[0].attn.qkv
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(1))
    x = tokens(2, 256, 16)
    model.eval()
    assert torch.equal(model(x), model(x.reshape(2, 8, 32, 16)).reshape(2, 256, 16))
    with pytest.raises(ValueError, match="not the 8 x 32 grid"):
        model(tokens(1, 16, 16))


def test_windows_may_shrink_to_small_images():
    model = injected(HOSTS["window of the block"](7, 7))
    assert model(tokens(1, 16, 16)).shape == (1, 16, 16)
    with pytest.raises(ValueError, match="64 tokens"):
        model(tokens(1, 64, 16))


STATES_NOTHING = {
    "global block in an encoder with windows": host(block={"window_size": 0}, window_size=14),
    "one number on an attention": host({"window_size": 64}),
    "a number of splines": host(grid_size=5),
    "stages": config(image_size=64, patch_size=4, depths=[2, 2], window_size=7),
    "no patch size": config(image_size=64),
    "a dictionary": host(config={"image_size": 64, "patch_size": 4}),
}


@pytest.mark.parametrize("host", STATES_NOTHING.values(), ids=STATES_NOTHING)
def test_what_states_no_grid(host):
    assert find_hint(host, "blocks.0.attn.qkv") is None
    # The MLP of a windowed block sees no window.
    assert find_hint(HOSTS["window of the block"](7, 7), "blocks.0.mlp.0") is None


@pytest.mark.parametrize(
    ("name", "options", "size", "grid"),
    [
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, (80, 112), (5, 7)),
        ("swin_tiny_patch4_window7_224", {}, (64, 64), None),
        ("tiny_vit_5m_224", {}, (64, 64), None),
    ],
)
def test_models_of_timm(name, options, size, grid):
    if grid is not None:
        options = {**options, "img_size": size}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options).eval()
    x = tokens(1, 3, *size) if grid else tokens(1, 3, 224, 224)
    expected = model(x)
    inject(model)
    torch.testing.assert_close(model(x), expected)
    layer = next(layer for _, layer in adapter_layers(model))
    assert layer.grid == grid and layer.hint is not None


def test_a_class_token_of_other_libraries_is_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "image_size": (80, 112), "patch_size": 16}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inject(model, NASLoRAConfig([next(n for n in names if "quer" in n or "q_" in n)]))
    refusal = r"36 tokens .* 5 x 7 grid of the model's config.*prefix_tokens=1 in NASLoRAConfig"
    with pytest.raises(ValueError, match=refusal):
        model(tokens(1, 3, 80, 112))
