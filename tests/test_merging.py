"""Merging and its reports, against weights and errors that the tests compute themselves."""

import copy
import pickle
import re
from dataclasses import asdict, replace

import definition
import numpy as np
import pytest
import torch
from adapted_models import (
    adapted_encoder,
    adapted_layer,
    build_encoder,
    differing,
    images,
    named,
    outputs,
    relative,
    snapshot,
    state_of,
    stir,
    tokens,
)
from conftest import error_of
from torch import nn
from torch.testing import assert_close

from naslora import NASLoRALinear, merge, unmerge
from naslora.adapter.layer.cell import LEFT_OUT
from naslora.adapter.layer.modules import adapter_layers
from naslora.adapter.merging.merged import restore_merged
from naslora_kernels import OPERATIONS


def centre_map(layer: NASLoRALinear) -> torch.Tensor:
    """M (r, r) of mode "center", from its definition: what each operation does with one token."""
    alpha, pw, *depthwise = (
        value.detach().double() for value in (layer.alpha, layer.cell.pw, *layer.cell.depthwise)
    )
    units = torch.eye(layer.rank, dtype=torch.float64)[:, None, None]  # as maps of one pixel
    return definition.cell(units, alpha, depthwise, pw, layer.channels, share=0)[:, 0, 0].T


# ---------------------------------------------------------------- exact


MODES, RATIOS = ("exact", "center"), (0, 1 / 3, 2 / 3, 1)

# float32 rounds at 6e-8. The cell adds some hundred products and the layer some ten more, in
# another order and with the weights of the operations multiplied in beforehand: a few 1e-6.
# 16-bit outputs are rounded to 2**-9 (bfloat16) or 2**-12 (float16) of their own size, the folded
# weight as well, and the convolution and the poolings on the way: some five roundings.
ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 5 * 2**-9, torch.float16: 5 * 2**-12}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("preset", ["linear", "paper"])
def test_exact_equals_the_unmerged_layer(preset, ratio, dtype):
    model = adapted_layer(dtype, preset=preset, channel_ratio=ratio)
    if ratio == 2 / 3:
        model.qkv.channels.copy_(torch.tensor([2, 0]))  # in any order
    for shape in [(2, 7, 7, 16), (1, 1, 1, 16), (2, 3, 10, 16), (2, 25, 16)]:
        x = tokens(*shape, dtype=dtype)
        expected = model(x)
        merge(model, "exact")
        assert (type(model.qkv) is nn.Linear) == (ratio == 0)
        merged = model(x)
        unmerge(model)
        assert merged.dtype == dtype and merged.shape == expected.shape
        assert relative(merged - expected, expected) < ROUNDING[dtype]
        # The adapter is not too small to matter: it changes the output.
        assert relative(model.qkv.base(x) - expected, expected) > 5 * ROUNDING[dtype]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("preset", ["linear", "paper"])
def test_exact_equals_the_unmerged_encoder(preset, ratio):
    """In training mode too: errors are measured, and the merged cell stays, in evaluation mode."""
    model = adapted_encoder(preset=preset, channel_ratio=ratio)
    expected = outputs(model)
    assert relative(outputs(build_encoder()) - expected, expected) > 1e-3
    generator = torch.get_rng_state()
    assert merge(model.train()).max_update_error < 1e-5
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(outputs(model), merged := outputs(model.eval()))
    # Two blocks and the neck propagate the rounding of a layer.
    assert relative(merged - expected, expected) < 1e-5
    unmerge(model)
    assert merge(model.train(), "exact", [images()]).max_update_error < 1e-5
    if ratio == 0:  # there is nothing to fit
        unmerge(model)
        merge(model.eval(), "calibrated", [images(seed) for seed in range(8)])
        assert relative(outputs(model) - expected, expected) < 1e-5


def test_a_declared_grid_survives():
    model = adapted_layer()
    model.qkv.grid = (3, 5)
    x = tokens(2, 15, 16)
    expected = model(x)
    merge(model)
    assert relative(model(x) - expected, expected) < ROUNDING[torch.float32]
    reloaded = named(qkv=nn.Linear(16, 12))
    restore_merged(reloaded, ["qkv"], model.state_dict())
    reloaded.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(reloaded(x), model(x))


def only(*names: str) -> torch.Tensor:
    """alpha with equal weights for some operations and weight zero for the others."""
    alpha = torch.full((8,), LEFT_OUT)
    alpha[[OPERATIONS.index(name) for name in names]] = 0.0
    return alpha


@pytest.mark.parametrize(
    "operations, size",
    [
        (("skip_connect",), 1),
        (("none",), 1),
        (("sep_conv_3x3", "skip_connect"), 3),
        (("sep_conv_5x5",), 5),
        (("dil_conv_3x3", "avg_pool_3x3"), 5),
        (("dil_conv_5x5", "sep_conv_3x3"), 9),
    ],
    ids=str,
)
def test_the_folded_kernel_is_cropped_to_its_taps(operations, size):
    model = adapted_layer()
    with torch.no_grad():
        model.qkv.alpha.copy_(only(*operations))
    x = tokens(2, 6, 6, 16)
    expected = model(x)
    merge(model)
    assert model.qkv.mixture.kernel.shape == (2, 2, size, size)
    assert relative(model(x) - expected, expected) < ROUNDING[torch.float32]


# ---------------------------------------------------------------- center


@pytest.mark.parametrize(
    "options, channels",
    [*(({"channel_ratio": ratio}, None) for ratio in RATIOS),
     ({"rank": 5, "channel_ratio": 0.6}, [4, 0, 2])],
)  # fmt: skip
def test_center_is_the_original_module_with_the_folded_weight(options, channels):
    model = adapted_layer(**options)
    layer = model.qkv
    if channels:
        layer.channels.copy_(torch.tensor(channels))
    token_map = centre_map(layer) if options["channel_ratio"] else torch.eye(3).double()
    update = layer.lora_B.double() @ token_map @ layer.lora_A.double()
    expected = layer.base.weight.double() + layer.scaling * update
    merge(model, "center")
    assert type(model.qkv) is nn.Linear
    # Summed in float64 and rounded once; weights are below 1.
    assert_close(model.qkv.weight.double(), expected, rtol=2**-23, atol=1e-8)
    assert torch.equal(model.qkv.bias, layer.base.bias)


# ---------------------------------------------------------------- reports


@torch.no_grad()
def test_report_on_calibration_batches():
    """Sums over all batches of each layer's inputs in the unmerged model."""
    model = adapted_encoder().train()
    batches = [images(seed) for seed in range(3)]
    layers = dict(adapter_layers(model))
    seen = {name: [] for name in layers}
    recorded = copy.deepcopy(model)
    for name in layers:
        recorded.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: seen[name].append((inputs[0], output))
        )
    for batch in batches:
        recorded(batch)
    report = merge(model, "center", calibration=iter(batches))
    assert report.source == "calibration images"
    assert [error.name for error in report.layers] == list(layers)
    for error in report.layers:
        sums = np.zeros(3)
        for x, h in seen[error.name]:
            difference = model.get_submodule(error.name)(x) - h
            update = h - layers[error.name].base(x)
            sums += [float(v.double().square().sum()) for v in (difference, update, h)]
        assert error.update_error == pytest.approx((sums[0] / sums[1]) ** 0.5, rel=1e-4)
        assert error.output_error == pytest.approx((sums[0] / sums[2]) ** 0.5, rel=1e-4)
    assert report.max_update_error == max(e.update_error for e in report.layers)
    mean = np.mean([error.update_error for error in report.layers])
    assert report.mean_update_error == pytest.approx(mean)
    assert asdict(report)["layers"][0]["name"] == report.layers[0].name
    assert "8 layers" in str(report) and "'center'" in str(report)


# ---------------------------------------------------------------- unmerge and state


@pytest.mark.parametrize(
    "mode, calibration, dtype",
    [
        *((mode, None, dtype) for mode in MODES for dtype in (torch.float32, torch.float64)),
        *((mode, [images()], torch.float32) for mode in MODES),
        ("calibrated", [images(seed) for seed in range(4)], torch.float32),
    ],
)
def test_unmerge_brings_the_very_same_layers_back(mode, calibration, dtype):
    """Merging computes in float64, where a conversion of float64 weights copies nothing."""
    model = adapted_encoder().to(dtype).train()
    before = snapshot(model)
    report = merge(model, mode, calibration)
    assert not list(adapter_layers(model))
    merged = snapshot(model)
    assert "merged already; call unmerge" in error_of(merge, model, mode, calibration)
    assert snapshot(model) == merged
    unmerge(model)
    assert snapshot(model) == before
    assert merge(model, mode, calibration) == report


def test_statistics_do_not_move_while_merging():
    model = adapted_encoder(preset="paper").train()
    before = state_of(model)
    merge(model, calibration=[images()])
    merged, kept = model.state_dict(), state_of(model)
    unmerge(model)
    assert not differing(state_of(model), before)
    assert any(name.endswith("running_mean") for name in merged)
    model.train()(images())  # training moves these statistics, not those of the merged copy
    assert not differing(merged, kept)
    assert differing(state_of(model), before) >= {name for name in before if "running" in name}


@pytest.mark.parametrize("mode", MODES)
def test_a_merged_model_carries_no_originals(mode):
    """Its state and its pickles are those of the merged model alone."""
    model = adapted_encoder()
    merge(model, mode)
    twin = copy.deepcopy(model)
    assert b"NASLoRAConfig" not in pickle.dumps(model)
    layer = model.blocks[0].attn.qkv
    held = {"weight", "bias"}
    if mode == "exact":
        held = {"base.weight", "base.bias", "lora_A", "lora_B"}
        held |= {"mixture.kernel", "mixture.pooling"}
        assert layer.lora_A.shape == (2, 32) and layer.lora_B.shape == (96, 2)
    assert set(layer.state_dict()) == held
    assert torch.equal(outputs(twin), outputs(model))
    assert "it was read from a file" in error_of(unmerge, pickle.loads(pickle.dumps(model)))


@pytest.mark.parametrize("mode", MODES)
def test_a_deep_copy_can_be_unmerged(mode):
    """The layers of a copy are as they were when it was copied, and they are its own."""
    model = adapted_encoder()
    layers = dict(adapter_layers(model))
    before, expected = state_of(model), outputs(model)
    merge(model, mode)
    twins = [copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))]
    unmerge(model)
    assert dict(adapter_layers(model)) == layers
    for twin in twins:
        stir(model.parameters(), 1.0)  # the original trains on
        unmerge(twin)
        assert not differing(state_of(twin), before)
        assert not {*twin.parameters()} & {*model.parameters()}
        assert torch.equal(outputs(twin), expected)
    assert not {*twins[0].parameters()} & {*twins[1].parameters()}


def test_unmerge_through_a_parent_and_a_part():
    model = adapted_encoder().train()
    before = snapshot(model)
    parent = nn.Sequential(nn.Identity(), model)
    merge(model, "center")
    unmerge(parent)
    assert snapshot(model) == before
    merge(parent)
    assert "merged already; call unmerge" in error_of(merge, model)
    unmerge(model.blocks[0])
    unmerge(model.blocks[1])
    assert snapshot(model) == before
    merge(parent)
    assert "single merged layer; give the model" in error_of(unmerge, model.blocks[0].attn.qkv)


# ---------------------------------------------------------------- refusals


def spoilt(value: float) -> torch.Tensor:
    batch = images(1).clone()
    batch[0, 0, 0, 0] = value
    return batch


NAN, INF = (spoilt(float(value)) for value in ("nan", "inf"))
NEEDED = r"missing 1 required positional argument: 'size'; forward=lambda model, batch: "
IMAGES = [images()]


def with_an_idle_block() -> nn.Module:
    model = adapted_encoder()
    model.blocks[1].forward = nn.Identity().forward
    return model


# Arguments of merge, the line that refuses them, and the model unless it is a linear encoder.
REFUSED = [
    ({"mode": "magic"}, "mode must be one of exact, center.*, got 'magic'"),
    ({"calibration": []}, "calibration yielded no batches"),
    ({"calibration": "images/"}, "calibration must be an iterable of batches.*, got a str"),
    ({"calibration": images()}, r"calibration must be .* \[batch\], got a Tensor"),
    ({"calibration": [images(), "no batch"]},
     "^calibration batch 2, a str, does not fit the model: conv2d.*; forward=lambda "),
    ({"mode": "calibrated"}, "'calibrated' needs images"),
    ({"mode": "center", "calibration": [images(), tokens(2, 3, 80, 80)]},
     "batch 2 of shape .* does not fit"),
    *(({"mode": "calibrated", "calibration": [images(0), images(1), bad]}, "not finite")
      for bad in (NAN, INF)),
    *(({"mode": mode, "calibration": [bad]}, "not finite")
      for mode, bad in (("exact", NAN), ("center", INF))),
    ({"calibration": IMAGES, "forward": 3}, "forward must be a function .*, got int"),
    ({"forward": print}, "forward feeds calibration batches: give calibration as well"),
    ({"mode": "center"}, "'center' cannot fold the preset 'paper'",
     lambda: adapted_encoder(preset="paper")),
    ({"calibration": IMAGES}, NEEDED, lambda: Host()),
    ({"calibration": [{"pixels": images()}]}, NEEDED, lambda: Host()),
    # An error that was not measured is not reported as zero.
    ({"mode": "center", "calibration": IMAGES},
     r"no calibration batch reached .* blocks\.1\.attn\.qkv", with_an_idle_block),
    ({}, "no NAS-LoRA layers", build_encoder),
    ({}, "model is a single layer; give the model around it", lambda: adapted_layer().qkv),
]  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message, make", [(*row, adapted_encoder)[:3] for row in REFUSED]
)
def test_a_refused_merge_changes_nothing(arguments, message, make):
    model = make().train()
    before = snapshot(model)
    assert re.search(message, error_of(merge, model, **arguments))
    assert snapshot(model) == before
    if not isinstance(model, NASLoRALinear):
        assert "not merged" in error_of(unmerge, model)


class Host(nn.Module):
    """An encoder in a model that takes other arguments than a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = adapted_encoder()

    def forward(self, pixels: torch.Tensor, size: int) -> torch.Tensor:
        return self.encoder(pixels[..., :size, :size])


@pytest.mark.parametrize("mode", ["exact", "center", "calibrated"])
def test_forward_feeds_the_batches_of_any_host(mode):
    batches = [images(seed) for seed in range(4)]
    plain = adapted_encoder()
    expected = merge(plain, mode, batches)
    host, given = Host(), [{"pixels": batch, "size": batch.shape[-1]} for batch in batches]
    report = merge(host, mode, given, forward=lambda model, batch: model(**batch))
    found = [replace(error, name=error.name.removeprefix("encoder.")) for error in report.layers]
    assert found == expected.layers
    for name, value in plain.state_dict().items():
        assert torch.equal(host.state_dict()[f"encoder.{name}"], value)


def test_errors_of_the_hosts_own_forward_are_its_own():
    host = Host()
    before = snapshot(host)
    with pytest.raises(AttributeError, match="'int' object has no attribute 'pixels'"):
        merge(host, calibration=[3], forward=lambda model, batch: model(batch.pixels))
    assert snapshot(host) == before
