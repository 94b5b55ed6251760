"""Configuration, injection, the layer, and adapters on disk."""

import dataclasses
import json
import math
import os
import re

import pytest
import torch
from fresh_process import run_fresh
from safetensors.torch import load_file, save_file
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import nn
from torch.testing import assert_close

import naslora
from naslora import (
    NASLoRAConfig,
    NASLoRALinear,
    UserError,
    adapter_parameters,
    arch_parameters,
    inject,
    load_adapter,
    methods,
    save_adapter,
)
from naslora.adapter.io.storage import CONFIG_NAME, WEIGHTS_NAME
from naslora.adapter.layer.cell import LinearCell, mixture_entropy
from naslora.adapter.layer.layer import SKIP_LEAD
from naslora.adapter.layer.modules import adapter_layers
from naslora.files import write_json
from naslora_kernels.operations import SKIP

torch.set_num_threads(1)

WIDTH, DEPTH, SIZE = 32, 3, 64
QKV_NAMES = [f"image_encoder.blocks.{i}.attn.qkv" for i in range(DEPTH)]


def build_sam(seed: int = 0) -> Sam:
    """An untouched segment_anything model, small: 4 x 4 tokens, windows of 3 and a global block."""
    torch.manual_seed(seed)
    encoder = ImageEncoderViT(
        img_size=SIZE,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=2,
        out_chans=WIDTH,
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
    )
    decoder = MaskDecoder(
        transformer_dim=WIDTH,
        transformer=TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=64, num_heads=2),
        iou_head_hidden_dim=16,
    )
    prompts = PromptEncoder(WIDTH, (SIZE // 16,) * 2, (SIZE, SIZE), mask_in_chans=4)
    return Sam(encoder, prompts, decoder).eval()


def embed(model: nn.Module, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return model.image_encoder(torch.randn(2, 3, SIZE, SIZE, generator=generator))


def predict(model: Sam) -> list[dict]:
    generator = torch.Generator().manual_seed(6)
    image = 255 * torch.rand(3, SIZE, SIZE, generator=generator)
    return model([{"image": image, "original_size": (SIZE, SIZE)}], multimask_output=True)


def train(model: nn.Module, steps: int = 2) -> None:
    """Takes a few steps, so that lora_B and the parameters behind it leave their start."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        # Not the plain mean of squares: the last layer norm holds it constant.
        output = embed(model, seed=step)
        (output * torch.arange(output.numel()).view_as(output).sin()).mean().backward()
        optimizer.step()


def adapted_sam(seed: int = 0, **options) -> Sam:
    model = build_sam()
    inject(model, NASLoRAConfig(**options), seed=seed)
    return model


# ---------------------------------------------------------------- what importing imports


def test_importing_inject_imports_the_adapter_alone():
    """No baseline, no data reader, no report."""
    result = run_fresh("import sys; from naslora import inject; print(*sorted(sys.modules))")
    loaded = {name for name in result.out.split() if name.split(".")[0] == "naslora"}
    modules = {name for name in loaded if not name.startswith("naslora.adapter.")}
    assert modules == {
        "naslora",
        *(
            f"naslora.{module}"
            for module in ("adapter", "errors", "files", "settings", "state_dicts")
        ),
    }
    for heavy in ("triton", "torchvision", "segment_anything", "peft", "matplotlib"):
        assert heavy not in result.out.split()


def test_every_public_name_can_be_imported():
    assert {name for name in naslora.__all__ if hasattr(naslora, name)} == set(naslora.__all__)
    assert set(naslora.__all__) <= set(dir(naslora))
    assert naslora.load_adapter is load_adapter is methods.load_adapter
    assert naslora.merge is methods.merge
    with pytest.raises(AttributeError, match="module 'naslora' has no attribute 'injct'"):
        _ = naslora.injct


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("rank", 0, "rank: expected int >= 1, got 0"),
        ("rank", 2.0, "rank: expected int, got 2.0"),
        ("rank", True, "rank: expected int, got True"),
        ("lora_alpha", 0.0, "lora_alpha: expected float > 0"),
        ("lora_alpha", "32", "lora_alpha: expected float, got '32'"),
        ("lora_alpha", float("inf"), "lora_alpha: expected a finite number"),
        ("channel_ratio", -0.1, "channel_ratio: expected float >= 0.0, got -0.1"),
        ("channel_ratio", 1.5, "channel_ratio: expected float <= 1.0"),
        ("channel_ratio", float("nan"), "channel_ratio: expected float"),
        ("channel_selection", "last", "channel_selection: expected one of first, random, resample"),
        ("cell_init", "zero", "cell_init: expected one of skip, identity, kaiming"),
        ("target", 3, "target: expected str | list, got 3"),
        ("blocks", (), "blocks: expected list of length >= 1"),
        ("blocks", (-1,), "blocks: expected int >= 0"),
        ("blocks", ("1",), "blocks: expected int, got"),
        ("operations", ("conv",), "operations: expected one of "),
        ("backend", "fast", "backend: expected one of cuda, triton, cpp, reference"),
    ],
)
def test_configuration_refuses(field, value, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        NASLoRAConfig(**{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "rank, ratio, channels",
    [
        (3, 0, 0),
        (3, 1 / 3, 1),
        (3, 2 / 3, 2),
        (3, 1, 3),
        (6, 2 / 3, 4),
        (12, 2 / 3, 8),
        (24, 2 / 3, 16),
        (3, 0.01, 1),  # at least one channel unless the ratio is 0
    ],
)
def test_ratio_decides_the_cell_channels(rank, ratio, channels):
    assert NASLoRAConfig(rank=rank, channel_ratio=ratio).cell_channels == channels


def test_configuration_survives_json():
    config = NASLoRAConfig(rank=6, blocks=[2, 0], channel_selection="random", target="qkv")
    assert config.blocks == (2, 0) and NASLoRAConfig().scaling == pytest.approx(32 / 3)
    assert NASLoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UserError, match="there is no setting 'colour' in NASLoRAConfig"):
        NASLoRAConfig.from_dict({"colour": "red"})


# ---------------------------------------------------------------- injection


@pytest.mark.parametrize("ratio", [0, 1 / 3, 2 / 3, 1])
@pytest.mark.parametrize("preset", ["linear", "paper"])
def test_a_fresh_adapter_changes_no_bit_of_the_output(preset, ratio):
    model = build_sam()
    expected = predict(model)
    assert inject(model, NASLoRAConfig(preset=preset, channel_ratio=ratio)) == QKV_NAMES
    for before, after in zip(expected, predict(model), strict=True):
        assert torch.equal(before["low_res_logits"], after["low_res_logits"])
        assert torch.equal(before["iou_predictions"], after["iou_predictions"])


@pytest.mark.parametrize("channel_selection", ["first", "random"])
@pytest.mark.parametrize("preset", ["linear", "paper"])
def test_gradients_reach_the_whole_adapter_and_nothing_else(preset, channel_selection):
    model = adapted_sam(preset=preset, channel_selection=channel_selection).train()
    ours = {id(p) for p in adapter_parameters(model) + arch_parameters(model)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == ours
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    train(model, steps=1)  # lora_B was zero, so the first step moves it alone
    model.zero_grad()
    output = embed(model)
    (output * torch.arange(output.numel()).view_as(output).sin()).mean().backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None and torch.equal(parameter, frozen[name]), name
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # Batch norm subtracts the mean, so the gradient of a bias before it is only rounding.
        before_norm = re.search(r"convolutions\.\d\.[1256]\.bias$", name)
        assert before_norm or parameter.grad.abs().sum() > 0, name


def test_parameters_are_named_as_peft_names_them():
    layer = next(iter(adapter_layers(adapted_sam())))[1]
    assert {name for name, _ in layer.named_parameters()} == {
        "lora_A",
        "lora_B",
        "alpha",
        "base.weight",
        "base.bias",
        "cell.dw_sep3",
        "cell.dw_sep5",
        "cell.dw_dil3",
        "cell.dw_dil5",
        "cell.pw",
    }
    assert set(layer.state_dict()) - {n for n, _ in layer.named_parameters()} == {"channels"}
    assert layer.lora_A.shape == (3, WIDTH) and layer.lora_B.shape == (3 * WIDTH, 3)


def test_parameter_lists_do_not_overlap():
    model = adapted_sam()
    weights, alphas = adapter_parameters(model), arch_parameters(model)
    assert len(weights) == DEPTH * 7 and len(alphas) == DEPTH
    assert all(alpha.shape == (8,) for alpha in alphas)
    assert not {id(p) for p in weights} & {id(p) for p in alphas}


def test_target_is_a_regular_expression_over_names():
    assert adapted_names(target=r"blocks\.[02]\.attn\.qkv$") == [QKV_NAMES[0], QKV_NAMES[2]]
    assert adapted_names(target=r"encoder\.blocks.*mlp\.lin1$") == [
        f"image_encoder.blocks.{i}.mlp.lin1" for i in range(DEPTH)
    ]


def test_blocks_choose_among_the_matches_in_model_order():
    assert adapted_names(blocks=(2, 0)) == [QKV_NAMES[0], QKV_NAMES[2]]


def adapted_names(**options) -> list[str]:
    model = build_sam()
    names = inject(model, NASLoRAConfig(**options))
    assert names == [name for name, _ in adapter_layers(model)]
    return names


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": "nowhere"}, "no layer matches target 'nowhere'.*blocks.0.attn.qkv"),
        (
            {"target": "norm1$"},
            "matches 'image_encoder.blocks.0.norm1', a LayerNorm, not nn.Linear",
        ),
        ({"blocks": (0, 3)}, r"blocks must lie in 0\.\.2, because 3 blocks have.*, got \[0, 3\]"),
        ({"preset": "maximal"}, "preset: expected one of linear, paper, got 'maximal'"),
    ],
)
def test_an_impossible_injection_leaves_the_model_alone(options, message):
    model = build_sam()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(UserError, match=message) as error:
        inject(model, NASLoRAConfig(**options))
    assert "\n" not in str(error.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(p.requires_grad for n, p in model.named_parameters() if "positional" not in n)


def test_a_second_injection_is_refused():
    model = adapted_sam()
    with pytest.raises(UserError, match=r"has NAS-LoRA layers already.*blocks.0.attn.qkv"):
        inject(model, NASLoRAConfig())
    assert len(list(adapter_layers(model))) == DEPTH


def test_the_seed_decides_every_random_number():
    torch.manual_seed(1)
    options = {"rank": 6, "channel_selection": "random"}
    one = adapted_sam(seed=7, **options).state_dict()
    torch.manual_seed(2)
    two = adapted_sam(seed=7, **options).state_dict()
    other = adapted_sam(seed=8, **options).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name in ("lora_A", "alpha", "cell.pw", "cell.dw_dil5"):
        assert not torch.equal(one[f"{QKV_NAMES[0]}.{name}"], other[f"{QKV_NAMES[0]}.{name}"])
    # Layers are drawn one after the other, not each from the same start.
    assert not torch.equal(one[f"{QKV_NAMES[0]}.lora_A"], one[f"{QKV_NAMES[1]}.lora_A"])


@pytest.mark.parametrize("selection", ["random", "resample"])
def test_drawn_channels_are_distinct_and_differ_between_layers(selection):
    for _, layer in adapter_layers(adapted_sam(rank=6)):  # not drawn
        assert layer.channels.tolist() == [0, 1, 2, 3]
    model = adapted_sam(rank=24, channel_selection=selection)
    drawn = [layer.channels.tolist() for _, layer in adapter_layers(model)]
    assert all(len(set(c)) == 16 and c == sorted(c) and set(c) <= set(range(24)) for c in drawn)
    assert len({tuple(c) for c in drawn}) > 1


def test_channels_can_be_drawn_anew():
    model = adapted_sam(rank=24, channel_selection="resample")
    layer = next(iter(adapter_layers(model)))[1]
    channels, before = layer.channels, layer.channels.clone()
    layer.draw_channels(torch.Generator().manual_seed(123))
    assert layer.channels is channels and not torch.equal(channels, before)
    assert len(set(channels.tolist())) == 16
    assert embed(model).isfinite().all()


@pytest.mark.parametrize("mode", [True, False])
def test_injection_keeps_the_training_mode_and_the_global_generator(mode):
    model = build_sam().train(mode)
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


@pytest.mark.parametrize("preset", ["linear", "paper"])
def test_square_sequences_are_grids(preset):
    layer = make_layer(preset=preset).eval()
    x = torch.randn(2, 4, 4, 8)
    assert torch.equal(layer(x.reshape(2, 16, 8)), layer(x).reshape(2, 16, 12))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["linear", "paper"])
def test_a_16_bit_base_keeps_float32_adapters(preset, dtype):
    layer = make_layer(preset=preset, dtype=dtype)
    x = torch.randn(2, 4, 4, 8).to(dtype)
    h = layer(x)
    assert h.dtype == dtype and layer.base.weight.dtype == dtype
    h.float().sum().backward()
    for name, parameter in layer.named_parameters():
        if not name.startswith("base."):
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name


@pytest.mark.parametrize("preset", ["linear", "paper"])
def test_autocast_keeps_float32_gradients(preset):
    layer = make_layer(preset=preset)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = layer(torch.randn(2, 4, 4, 8))
    assert h.dtype == torch.bfloat16
    h.float().sum().backward()
    assert layer.lora_A.grad.dtype == layer.alpha.grad.dtype == torch.float32


def test_attributes_of_a_linear():
    layer = make_layer(5, 7)
    assert (layer.in_features, layer.out_features) == (5, 7)
    for shown, own in ((layer.weight, layer.base.weight), (layer.bias, layer.base.bias)):
        assert (shown.dtype, shown.shape) == (own.dtype, own.shape) and isinstance(
            shown, torch.Tensor
        )
    unbiased = NASLoRALinear(nn.Linear(5, 7, bias=False), NASLoRAConfig())
    assert unbiased.bias is None and unbiased(torch.ones(1, 2, 2, 5)).shape == (1, 2, 2, 7)


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
    for parameter in arch_parameters(adapted_sam()):
        alpha = parameter.detach()
        others = torch.cat([alpha[:SKIP], alpha[SKIP + 1 :]])
        assert 0 < others.std() < 3e-3
        assert alpha[SKIP] - others.mean() == pytest.approx(SKIP_LEAD, abs=0.01)
        share = math.e**SKIP_LEAD / (math.e**SKIP_LEAD + 7)
        assert alpha.softmax(0)[SKIP] == pytest.approx(share, abs=1e-3)


def test_alpha_can_start_uniform():
    for alpha in arch_parameters(adapted_sam(cell_init="identity")):
        assert 0 < alpha.std() < 3e-3
        assert mixture_entropy(alpha) == pytest.approx(torch.tensor(8.0).log().item(), abs=1e-4)


# ---------------------------------------------------------------- adapters on disk


def trained_sam(tmp_path, **options) -> Sam:
    """A trained adapter and a decoder that is trained too, saved in ``tmp_path``."""
    model = adapted_sam(**options)
    model.mask_decoder.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.mask_decoder.parameters():
            parameter += 0.01
    model.image_encoder.train()  # so that batch-norm statistics move
    train(model)
    save_adapter(model.eval(), tmp_path)
    return model


@pytest.mark.parametrize("into", ["injected", "original"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channel_ratio": 0},
        {"preset": "paper"},
        {"rank": 6, "channel_selection": "random", "blocks": (1, 2)},
    ],
    ids=str,
)
def test_what_was_saved_loads_exactly(tmp_path, options, into):
    trained = trained_sam(tmp_path, **options)
    model = adapted_sam(**{**options, "seed": 99}) if into == "injected" else build_sam()
    load_adapter(model, tmp_path)
    expected, actual = trained.state_dict(), model.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    for before, after in zip(predict(trained), predict(model), strict=True):
        assert torch.equal(before["low_res_logits"], after["low_res_logits"])


def test_batch_norm_statistics_are_among_what_is_saved(tmp_path):
    trained_sam(tmp_path, preset="paper")
    saved = load_file(tmp_path / WEIGHTS_NAME)
    means = [value for name, value in saved.items() if name.endswith("running_mean")]
    assert len(means) == DEPTH * 8 and all(mean.abs().sum() > 0 for mean in means)


def test_only_what_was_trained_is_saved(tmp_path):
    model = adapted_sam()
    save_adapter(model, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / WEIGHTS_NAME)
    cell = [f"cell.{part}" for part in ("dw_sep3", "dw_sep5", "dw_dil3", "dw_dil5", "pw")]
    parts = ["lora_A", "lora_B", "alpha", "channels", *cell]
    assert set(saved) == {f"{name}.{part}" for name in QKV_NAMES for part in parts}
    stored = json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())
    assert stored["layers"] == QKV_NAMES and stored["config"]["rank"] == 3


def test_a_model_without_adapters_stores_its_trained_part(tmp_path):
    """Decoder only: there is no adapter, and the files hold everything that was trained."""
    model = build_sam(seed=1)
    model.requires_grad_(False).mask_decoder.requires_grad_(True)
    save_adapter(model, tmp_path)
    other = build_sam(seed=2)
    load_adapter(other, tmp_path, check_base=False)
    for name, value in model.mask_decoder.state_dict().items():
        assert torch.equal(other.mask_decoder.state_dict()[name], value)
    weights = [m.image_encoder.patch_embed.proj.weight for m in (model, other)]
    assert not torch.equal(*weights)


def test_nothing_to_save_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nothing to save"):
        save_adapter(build_sam().requires_grad_(False), tmp_path)
    assert not list(tmp_path.iterdir())


def snapshot(model: nn.Module) -> dict:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {
        "state": state,
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "training": [module.training for module in model.modules()],
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    state = before.pop("state")
    assert state.keys() == after["state"].keys()
    assert all(torch.equal(state[name], after["state"][name]) for name in state)
    after.pop("state")
    assert before == after


def test_mismatches_are_listed_and_the_model_stays(tmp_path):
    trained_sam(tmp_path)
    model = adapted_sam(rank=4, lora_alpha=16.0, blocks=(0, 1))
    before = snapshot(model)
    with pytest.raises(UserError, match="does not fit this model") as error:
        load_adapter(model, tmp_path)
    message = str(error.value)
    assert "\n" not in message
    for fragment in (
        f"layer {QKV_NAMES[2]} is not adapted in the model",
        "rank is 3 in the file, 4 here",
        "lora_alpha is 32.0 in the file, 16.0 here",
    ):
        assert fragment in message
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "saved, here, message",
    [
        (
            {"blocks": (0,)},
            {"blocks": (0,), "channel_ratio": 1},
            r"cell\.pw has shape \(4, 2, 2\) in the file, \(4, 3, 3\)",
        ),
        ({"blocks": (0,)}, {}, f"layer {QKV_NAMES[1]} is not in the file"),
        ({}, {"preset": "paper"}, "preset is linear in the file, paper here"),
    ],
)
def test_another_configuration_is_listed(tmp_path, saved, here, message):
    save_adapter(adapted_sam(**saved), tmp_path)
    with pytest.raises(UserError, match=message):
        load_adapter(adapted_sam(**here), tmp_path)


def test_an_adapter_for_another_width_leaves_the_original_model_as_it_was(tmp_path):
    """Loading injects first. The error must undo that, and restore `requires_grad`."""
    trained_sam(tmp_path)
    model = nn.Module()
    model.image_encoder = ImageEncoderViT(
        img_size=SIZE, embed_dim=48, depth=DEPTH, num_heads=2, out_chans=WIDTH, window_size=3
    )
    model.image_encoder.patch_embed.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(UserError, match=r"lora_A has shape \(3, 32\) in the file, \(3, 48\)"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def bad_rank(folder):
    stored = json.loads((folder / CONFIG_NAME).read_text())
    stored["config"]["rank"] = -3
    write_json(folder / CONFIG_NAME, stored)  # with a checksum that matches


def drop_a_tensor(folder):
    tensors = load_file(folder / WEIGHTS_NAME)
    del tensors[f"{QKV_NAMES[1]}.alpha"]
    save_file(tensors, folder / WEIGHTS_NAME)


DAMAGED = f"{WEIGHTS_NAME} is damaged or no safetensors file"
FOREIGN = f"{CONFIG_NAME} is not an adapter configuration"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / CONFIG_NAME).unlink(), f"{CONFIG_NAME} does not exist"),
        (lambda folder: (folder / WEIGHTS_NAME).unlink(), f"{WEIGHTS_NAME} does not exist"),
        (lambda folder: os.truncate(folder / WEIGHTS_NAME, 900), DAMAGED),
        (lambda folder: os.truncate(folder / WEIGHTS_NAME, 0), DAMAGED),
        (lambda folder: (folder / CONFIG_NAME).write_text("{rank"), "cannot be read as JSON"),
        (lambda folder: (folder / CONFIG_NAME).write_text('{"peft_type": "LORA"}'), FOREIGN),
        (lambda folder: (folder / CONFIG_NAME).write_text('{"config": 3, "layers": 4}'), FOREIGN),
        (bad_rank, r"rank: expected int|rank is -3 in the file"),
        (drop_a_tensor, f"{QKV_NAMES[1]}.alpha is missing in the file"),
    ],
)
def test_damaged_files_are_named_and_the_model_stays(tmp_path, damage, message):
    trained_sam(tmp_path)
    damage(tmp_path)
    for model in (build_sam(), adapted_sam()):
        before = snapshot(model)
        with pytest.raises(UserError, match=message) as error:
            load_adapter(model, tmp_path)
        assert "\n" not in str(error.value)
        assert_unchanged(model, before)


def test_files_are_replaced_as_a_whole(tmp_path, monkeypatch):
    """A save that fails while writing leaves the old files, and no others."""
    trained_sam(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {CONFIG_NAME, WEIGHTS_NAME}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr("naslora.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(adapted_sam(), tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after[WEIGHTS_NAME] == before[WEIGHTS_NAME] and set(after) == set(before)


def test_configuration_is_kept_with_each_layer():
    config = NASLoRAConfig(rank=5, channel_selection="random")
    model = build_sam()
    inject(model, config)
    named = dataclasses.replace(config, target=tuple(name for name, _ in adapter_layers(model)))
    assert all(layer.config == named for _, layer in adapter_layers(model))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 4
