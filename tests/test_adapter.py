"""Configuration, injection, the layer, and adapters on disk."""

import math

import pytest
import torch
from adapted_models import build_encoder, images
from fresh_process import run_fresh
from torch import nn
from torch.testing import assert_close

import naslora
from naslora import (
    NASLoRAConfig,
    NASLoRALinear,
    UserError,
    arch_parameters,
    inject,
    load_adapter,
    methods,
)
from naslora.adapter.layer.cell import LinearCell, mixture_entropy
from naslora.adapter.layer.modules import adapter_layers
from naslora_kernels.operations import SKIP

WIDTH, DEPTH = 32, 3
QKV_NAMES = [f"blocks.{i}.attn.qkv" for i in range(DEPTH)]


def adapted(seed: int = 0, **options) -> nn.Module:
    model = build_encoder(DEPTH)
    inject(model, NASLoRAConfig(**options), seed=seed)
    return model


# ---------------------------------------------------------------- what importing imports


def test_importing_inject_imports_the_adapter_alone():
    """No baseline, no data reader, no report."""
    result = run_fresh("import sys; from naslora import inject; print(*sorted(sys.modules))")
    loaded = {name for name in result.out.split() if name.split(".")[0] == "naslora"}
    modules = {name for name in loaded if not name.startswith("naslora.adapter.")} - {"naslora"}
    alone = ("adapter", "errors", "files", "settings", "state_dicts")
    assert modules == {f"naslora.{module}" for module in alone}
    for heavy in ("triton", "torchvision", "segment_anything", "peft", "matplotlib"):
        assert heavy not in result.out.split()


def test_every_public_name_can_be_imported():
    assert {name for name in naslora.__all__ if hasattr(naslora, name)} == set(naslora.__all__)
    assert set(naslora.__all__) <= set(dir(naslora))
    assert naslora.load_adapter is load_adapter is methods.load_adapter
    assert naslora.merge is methods.merge
    with pytest.raises(AttributeError, match="No naslora attribute injct"):
        _ = naslora.injct


# ---------------------------------------------------------------- injection


@pytest.mark.parametrize("ratio", [0, 1 / 3, 2 / 3, 1])
@pytest.mark.parametrize("preset", ["linear", "paper"])
def test_a_fresh_adapter_changes_no_bit_of_the_output(preset, ratio):
    model = build_encoder(DEPTH)
    expected = model(images())
    assert inject(model, NASLoRAConfig("qkv", preset=preset, channel_ratio=ratio)) == QKV_NAMES
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"target": r"blocks\.[02]\.attn\.qkv$"}, [QKV_NAMES[0], QKV_NAMES[2]]),
        ({"target": r"blocks.*mlp\.lin1$"}, [f"blocks.{i}.mlp.lin1" for i in range(DEPTH)]),
        ({"target": "qkv", "blocks": (2, 0)}, [QKV_NAMES[0], QKV_NAMES[2]]),  # in the model's order
    ],
)
def test_the_layers_that_are_adapted(options, expected):
    model = build_encoder(DEPTH)
    assert inject(model, NASLoRAConfig(**options)) == expected
    assert [name for name, _ in adapter_layers(model)] == expected
    assert {layer.config.target for _, layer in adapter_layers(model)} == {tuple(expected)}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": "nowhere"}, "no layer matches target 'nowhere'.*blocks.0.attn.qkv"),
        ({"target": "norm1$"}, "matches 'blocks.0.norm1', a LayerNorm, not nn.Linear"),
        ({"blocks": (0, 3)}, r"blocks must lie in 0\.\.2, because 3 blocks have.*, got \[0, 3\]"),
        ({"preset": "maximal"}, "preset: expected one of linear, paper, got 'maximal'"),
    ],
)
def test_an_impossible_injection_leaves_the_model_alone(options, message):
    model = build_encoder(DEPTH)
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(UserError, match=message) as error:
        inject(model, NASLoRAConfig(**options))
    assert "\n" not in str(error.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("selection", ["random", "resample"])
def test_drawn_channels_are_distinct_and_differ_between_layers(selection):
    for _, layer in adapter_layers(adapted(rank=6)):  # not drawn
        assert layer.channels.tolist() == [0, 1, 2, 3]
    model = adapted(rank=24, channel_selection=selection)
    drawn = [layer.channels.tolist() for _, layer in adapter_layers(model)]
    assert all(len(set(c)) == 16 and c == sorted(c) and set(c) <= set(range(24)) for c in drawn)
    assert len({tuple(c) for c in drawn}) > 1


@pytest.mark.parametrize("mode", [True, False])
def test_injection_keeps_the_training_mode_and_the_global_generator(mode):
    model = build_encoder(DEPTH).train(mode)
    state = torch.get_rng_state()
    inject(model, NASLoRAConfig(preset="paper", channel_selection="random"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training is mode for module in model.modules())


# ---------------------------------------------------------------- the layer


def make_layer(c_in=8, c_out=12, dtype=torch.float32, seed=0, **options) -> NASLoRALinear:
    torch.manual_seed(seed)
    layer = NASLoRALinear(nn.Linear(c_in, c_out).to(dtype), NASLoRAConfig(**options))
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(seed))
    return layer


def test_a_declared_grid_orders_the_tokens():
    layer = make_layer()
    x = torch.randn(2, 3, 5, 8)
    expected = layer(x).reshape(2, 15, 12)
    layer.grid = (3, 5)
    assert torch.equal(layer(x.reshape(2, 15, 8)), expected)
    with pytest.raises(ValueError, match="16 tokens are no 3 x 5 grid"):
        layer(torch.randn(2, 16, 8))
    layer.grid = (5, 3)
    assert not torch.allclose(layer(x.reshape(2, 15, 8)), expected)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 17, 8), "17 tokens are no 4 x 4 grid; set the layer's `grid`"),
        ((16, 8), r"expected \(B, H, W, C_in\) or \(B, N, C_in\), got \(16, 8\)"),
        ((1, 2, 4, 4, 8), r"got \(1, 2, 4, 4, 8\)"),
        ((2, 4, 4, 9), r"weight: expected shape \(C_out, 9\)"),
    ],
)
def test_other_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        make_layer()(torch.randn(shape))


def test_plain_lora_takes_any_shape_a_linear_takes():
    layer = make_layer(channel_ratio=0)
    for shape in [(8,), (17, 8), (2, 17, 8), (0, 4, 4, 8), (1, 2, 3, 4, 8)]:
        x = torch.randn(shape)
        update = layer.scaling * (x @ layer.lora_A.T) @ layer.lora_B.T
        # float32 sums of 8 and 3 terms near 10, in another order.
        assert_close(layer(x), layer.base(x) + update, rtol=1e-5, atol=1e-4)
    assert layer.alpha is None and layer.cell is None


@pytest.mark.parametrize("ratio", [0, 2 / 3])
@pytest.mark.parametrize("preset", ["linear", "paper"])
def test_update_is_the_difference_to_the_base(preset, ratio):
    layer = make_layer(preset=preset, channel_ratio=ratio, dtype=torch.float64).eval()
    assert all(p.dtype == torch.float64 for p in layer.parameters())
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    assert_close(layer(x), layer.base(x) + layer.update(x))


# ---------------------------------------------------------------- the start of the cell


def gains(init: str, channels: int, seeds: int = 20) -> torch.Tensor:
    """The fresh mixture of a constant map of ones, away from the border."""
    result = []
    for seed in range(seeds):
        cell = LinearCell(channels, init, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            y = cell(torch.ones(1, 9, 9, channels), torch.zeros(8), None)
        result.append(y[0, 4, 4])
    return torch.cat(result)


@pytest.mark.parametrize("channels", [1, 2, 16])
def test_the_gain_of_a_fresh_cell(channels):
    # Noise of 0.02 on the taps: 1/8 * 5/4 * 0.02 * sqrt(9 + 25 + 9 + 25) = 0.026; on the pointwise
    # weights: 1/8 * 0.02 * sqrt(4 c) <= 0.02. So one gain has a deviation below 0.035.
    measured = gains("identity", channels)
    assert abs(measured.mean() - 1) < 4 * 0.035 / len(measured) ** 0.5
    assert (measured - 1).abs().max() < 4 * 0.035
    # Average, maximum and skip give 3/8; the convolutions are random with mean zero.
    measured = gains("kaiming", channels)
    assert 0.25 < measured.mean() < 0.5


def test_alpha_starts_in_favour_of_the_skip_connection():
    for parameter in arch_parameters(adapted()):
        alpha = parameter.detach()
        others = torch.cat([alpha[:SKIP], alpha[SKIP + 1 :]])
        assert 0 < others.std() < 3e-3
        assert alpha[SKIP] - others.mean() == pytest.approx(NASLoRAConfig.skip_lead, abs=0.01)
        share = math.e**NASLoRAConfig.skip_lead / (math.e**NASLoRAConfig.skip_lead + 7)
        assert alpha.softmax(0)[SKIP] == pytest.approx(share, abs=1e-3)


def test_alpha_can_start_uniform():
    for alpha in arch_parameters(adapted(cell_init="identity")):
        assert 0 < alpha.std() < 3e-3
        assert mixture_entropy(alpha) == pytest.approx(torch.tensor(8.0).log().item(), abs=1e-4)
