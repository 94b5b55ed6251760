"""The methods that the paper compares: what each trains, computes, stores and merges."""

import copy
import functools
import json
import re
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapted_models import differing, snapshot, state_of, stir
from conftest import SHORT, error_of, scores_of, succeed, write_data
from segment_anything.modeling.image_encoder import add_decomposed_rel_pos
from torch import nn

from naslora import NASLoRAConfig, load_adapter, save_adapter, unmerge
from naslora.adapter.layer.layer import layer_generator
from naslora.adapter.layer.targets import find_targets
from naslora.files import read_safetensors
from naslora.methods import (
    METHODS,
    applied,
    apply,
    auxiliary_loss,
    configure,
    conv_lora,
    merge,
    merge_modes,
    mona,
    sam_adapter,
    searches,
    trainable_parameters,
)
from naslora.sam.encoders import checkpoint_blocks
from naslora.sam.precision import cast_frozen
from naslora.sam.segmentation import SamForSegmentation, build_model
from naslora.training import run as run_module

pytestmark = pytest.mark.usefixtures("tiny_vit")

DECODER = 3_505_536  # parameters of the mask decoder for binary segmentation
ENCODERS = ("vit_t", "mobile_sam")
SIZE = 64  # of the images in pixels: TinyViT's last windows are then not full
# MobileSAM's encoder takes a second. The fast tests have it where a method adds modules to it.
ADDING = ("sam-adapter", "mona")
fitting = pytest.mark.parametrize(
    "method, encoder",
    [
        pytest.param(m, e, marks=() if e == "vit_t" or m in ADDING else pytest.mark.campaign)
        for m in METHODS
        for e in ENCODERS
        if (m, e) != ("vpt", "mobile_sam")  # which is refused
    ],
)
LORA_KIND = ("lora", "dora", "vera", "conv-lora", "nas-lora", "nas-pc-lora")
PEFT = ("lora", "dora", "vera")
DEFAULT = NASLoRAConfig()
MERGING = (*PEFT, "nas-lora", "nas-pc-lora")


@functools.cache
def built(encoder):
    return build_model(encoder, SIZE).eval()


def untouched(encoder):
    """A model of one's own. MobileSAM takes long to build, a copy does not."""
    return copy.deepcopy(built(encoder))


def make(method, encoder="vit_t", lively=False, config=DEFAULT, seed=0):
    """A model with a method in evaluation mode; ``lively`` ones compute more than a fresh one."""
    model = untouched(encoder)
    apply(method, model, configure(method, config), seed)
    if lively:  # no gradient is zero by design
        stir(trainable_parameters(model), 0.02)
    return model


def images(count=2, seed=0):
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def embed(model):
    return model.image_encoder(images())


def loss_of(model, batch):
    """A training loss whose gradient is large enough to reach everything."""
    loss = model(batch).masks.square().mean()
    extra = auxiliary_loss(model)
    return loss if extra is None else loss + extra


# --- What is trained ---

# (method, configuration, parameters on ViT-H beside the decoder): the arithmetic of the layers'
# sizes, 32 blocks of width 1280 on 64 x 64 tokens. The paper's totals, in millions, follow.
COUNTS = [
    ("full", {}, 637_026_048),  # SAM's image encoder
    ("decoder-only", {}, 0),  # 3.51
    # norms 2 * 1280, qkv 3840, projection 1280, MLP 5120 + 1280; patch embedding; two neck norms
    ("bitfit", {}, 32 * 14_080 + 1280 + 2 * 256),  # 3.96
    ("vpt", {}, 32 * 12 * 1280),  # 4.00
    ("sam-adapter", {},
     (3 * 16 * 16 * 80 + 80) + (1280 * 80 + 80) + 32 * (80 * 80 + 80) + (80 * 1280 + 1280)),  # 3.98
    ("mona", {},  # 17.08; no definition that we found gives it, this one gives 15.02
     64 * (4 * 1280 + (1280 * 64 + 64) + 64 * (9 + 25 + 49 + 3) + (64 * 64 + 64)
           + (64 * 1280 + 1280))),
    ("lora", {}, 32 * 3 * (1280 + 3840)),  # 4.00
    ("dora", {}, 32 * (3 * (1280 + 3840) + 3840)),  # 4.04, for a magnitude of length 1280
    ("vera", {}, 32 * (256 + 3840)),  # 0.32 in all; no definition that we found gives it
    ("conv-lora", {}, 32 * (3 * (1280 + 3840) + 8 * (27 * 3 + 3) + 2 * 3 * 8)),  # 4.02
    ("nas-lora", {}, 32 * (3 * (1280 + 3840) + (9 + 25 + 9 + 25) * 3 + 4 * 9 + 8)),
    ("nas-pc-lora", {"channel_ratio": 0}, 32 * 3 * (1280 + 3840)),  # plain LoRA
    ("nas-lora", {"preset": "paper"}, 32 * (3 * (1280 + 3840) + 168 * 3 + 8 * 9 + 8)),  # 4.016
    ("nas-pc-lora", {"preset": "paper"}, 32 * (3 * (1280 + 3840) + 168 * 2 + 8 * 4 + 8)),  # 4.009
    ("nas-pc-lora", {"preset": "paper", "channel_ratio": 1 / 3},
     32 * (3 * (1280 + 3840) + 168 + 8 + 8)),  # 4.003
]  # fmt: skip


@pytest.mark.parametrize("method, config, parameters", COUNTS)
def test_parameters_on_vit_h(method, config, parameters):
    with torch.device("meta"):
        model = SamForSegmentation("vit_h", 1024)
    apply(method, model, configure(method, NASLoRAConfig("qkv", **config)))
    assert sum(p.numel() for p in trainable_parameters(model)) == parameters
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == DECODER + parameters
    assert {method for method, *_ in COUNTS} == set(METHODS)
    counts = run_module.count_parameters(model)
    assert counts.decoder == DECODER
    assert counts.adapter + counts.architecture == parameters
    ratio = config.get("channel_ratio")
    assert counts.architecture == (32 * 8 if searches(method) and ratio != 0 else 0)
    assert counts.total == sum(p.numel() for p in model.parameters())


@fitting
def test_gradients_reach_all_that_trains_and_nothing_else(method, encoder):
    model = make(method, encoder, lively=True).train()
    if encoder == "mobile_sam":  # untrained, some of its norms scale with zero
        for module in model.image_encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
    for seed in range(6 if method == "conv-lora" else 1):  # until every expert was selected
        torch.manual_seed(seed)
        loss_of(model, images(8, seed)).backward()
    names = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}


@fitting
def test_the_seed_decides_the_start(method, encoder):
    one, other = (state_of(make(method, encoder)) for _ in range(2))
    assert not differing(one, other)
    reseeded = state_of(make(method, encoder, seed=1))
    drawn = method not in ("full", "decoder-only", "bitfit")
    assert bool(differing(one, reseeded)) == drawn
    if method in LORA_KIND:  # a fresh one changes no output
        assert torch.equal(embed(make(method, encoder)), embed(built(encoder)))


@fitting
def test_gradient_checkpointing_and_bfloat16(method, encoder):
    gradients = []
    for checkpointing in (False, True):
        model = make(method, encoder, lively=True).train()
        if checkpointing:
            checkpoint_blocks(model.image_encoder)
        mlp, calls = next(m for n, m in model.named_modules() if n.endswith(".mlp")), []
        hook = mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(0)
        loss_of(model, images()).backward()
        hook.remove()
        assert len(calls) == 1 + (checkpointing and method != "decoder-only")
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        # The backward repeats forwards; their losses are not kept.
        assert auxiliary_loss(model) is None
        # A forward leaves no autograd graph behind, because graphs cannot be copied.
        twin = copy.deepcopy(model).eval()
        assert torch.equal(embed(twin), embed(model.eval()))
    for plain, repeated in zip(*gradients, strict=True):
        assert (plain is None) == (repeated is None)
        if plain is not None:  # the same operations in the same order; threads may split sums
            torch.testing.assert_close(repeated, plain, rtol=1e-5, atol=1e-9)
    # Autocast to bfloat16 trains float32 weights.
    model.train().zero_grad()
    cast_frozen(model.image_encoder, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, images())
    loss.backward()
    assert loss.isfinite()
    trained = [p for p in trainable_parameters(model) if p.grad is not None]
    assert trained or method == "decoder-only"
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained)
    assert all(p.grad.isfinite().all() for p in trained)


# --- What is refused, before anything changes ---


NO_TARGET = NASLoRAConfig(target="attn.query$")
UNFIT = [
    ("vpt", lambda: untouched("mobile_sam"), None,
     "vpt needs the attention of SAM's plain ViTs.*TinyViTEncoder"),
    *((method, lambda: nn.Sequential(nn.Conv2d(3, 8, 4, bias=False)), None, "needs|no layer match")
      for method in METHODS if method not in ("full", "decoder-only")),
    *((method, lambda: untouched("vit_t"), NO_TARGET, "no layer matches")
      for method in LORA_KIND),
]  # fmt: skip


@pytest.mark.parametrize("method, make_model, config, words", UNFIT)
def test_a_model_that_does_not_fit_is_refused(method, make_model, config, words):
    model = make_model()
    before = snapshot(model)
    assert re.search(words, error_of(apply, method, model, configure(method, config or DEFAULT)))
    assert snapshot(model) == before and applied(model) is None


def test_one_method_a_model():
    model = make("bitfit")
    assert "has a method already: bitfit" in error_of(apply, "lora", model)
    assert applied(model).method.name == "bitfit"
    encoder = untouched("vit_t").image_encoder  # which can be adapted alone
    apply("mona", encoder)
    assert trainable_parameters(encoder) == [p for p in encoder.parameters() if p.requires_grad]


# --- What is stored ---


@fitting
def test_what_was_saved_loads(tmp_path, method, encoder):
    model = make(method, encoder, lively=True)
    with torch.no_grad():
        for name, buffer in model.image_encoder.named_buffers():
            if name in applied(model).tensors and buffer.is_floating_point():
                buffer += 0.1  # a value that a fresh one lacks
    save_adapter(model, tmp_path)
    fresh = untouched(encoder)
    embed(fresh)  # TinyViT then caches its attention biases
    load_adapter(fresh, tmp_path)
    assert applied(fresh) == applied(model)
    assert not differing(state_of(fresh), state_of(model))
    assert torch.equal(embed(fresh), embed(model))
    if method == "vera":  # its frozen matrices are stored and kept once
        stored = read_safetensors(tmp_path / "adapter_model.safetensors")
        assert sum("vera_A" in name or "vera_B" in name for name in stored) == 2
        matrices = {id(m.vera_A["default"]) for m in model.modules() if hasattr(m, "vera_A")}
        assert len(matrices) == 1
    # Again, into a model that has the method already.
    again = make(method, encoder)
    load_adapter(again, tmp_path)
    assert not differing(state_of(again), state_of(model))


ONE = {"blocks": (0,)}
# The method and its settings in the file, and in the model, and a part of the line.
OTHERS = [
    ("lora", {}, "dora", {}, "the method is lora in the file, dora here"),
    ("lora", {}, "vpt", {}, "the method is lora in the file, vpt here"),
    ("lora", {}, "lora", {"rank": 6}, "rank is 3 in the file, 6 here"),
    ("lora", {}, "lora", {"rank": 6},
     r"lora_A.default.weight has shape \(3, 32\) in the file, \(6, 32\) in the model"),
    ("vpt", {}, None, {}, "needs the attention"),
    ("mona", {}, None, {}, "is not in the model"),
    ("nas-pc-lora", ONE, "nas-pc-lora", {"lora_alpha": 16.0},
     r"layer \S*blocks.1.attn.qkv is not in the file.*lora_alpha is 32.0 in the file, 16.0 here"),
    ("nas-pc-lora", {}, "nas-pc-lora", ONE, r"layer \S*blocks.1.attn.qkv is not adapted in the mo"),
    ("nas-pc-lora", ONE, "nas-pc-lora", {**ONE, "channel_ratio": 1},
     r"cell\.pw has shape \(4, 2, 2\) in the file, \(4, 3, 3\)"),
    ("nas-lora", {}, "nas-lora", {"preset": "paper"}, "preset is linear in the file, paper here"),
    ("mona", {}, "nas-pc-lora", {}, "the method is mona in the file, nas-pc-lora here"),
]  # fmt: skip


@pytest.mark.parametrize("saved, settings, method, own, words", OTHERS)
def test_an_adapter_for_another_model_lists_what_differs(
    tmp_path, saved, settings, method, own, words
):
    save_adapter(make(saved, config=NASLoRAConfig(**settings)), tmp_path)
    config = NASLoRAConfig(**own)
    model = make(method, config=config) if method else untouched("mobile_sam")
    before, held = snapshot(model), applied(model)
    assert re.search(words, error_of(load_adapter, model, tmp_path))
    assert snapshot(model) == before and applied(model) is held


# --- What merges ---


@pytest.mark.parametrize(
    "method, encoder",
    [*((method, "vit_t") for method in MERGING), ("dora", "mobile_sam"),
     ("nas-pc-lora", "mobile_sam")],
)  # fmt: skip
def test_merged_computes_the_same(method, encoder):
    model = make(method, encoder, lively=True)
    before, state = embed(model), state_of(model)
    report = merge(model, "exact")
    after = embed(model)
    # Rounding of float32 through the blocks; the adapters change the output by far more.
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    assert (embed(built(encoder)) - before).abs().max() > 1e-3 * before.abs().max()
    layers = list(find_targets(built(encoder).image_encoder, NASLoRAConfig()))
    assert [layer.name for layer in report.layers] == [f"image_encoder.{n}" for n in layers]
    # An update is a small part of an output, so its own relative error is that much larger.
    assert report.max_update_error < 1e-3 and report.source == "white noise"
    if method in PEFT:
        assert state_of(model).keys() == built(encoder).state_dict().keys()
        assert type(model.image_encoder.get_submodule(layers[0])) is nn.Linear
    unmerge(model)
    assert not differing(state_of(model), state)
    assert torch.equal(embed(model), before)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in MERGING])
def test_what_cannot_merge_says_why(method):
    model = make(method)
    before = snapshot(model)
    assert merge_modes(method) == []
    assert re.search(r"cannot be merged: .{20}", error_of(merge, model))
    assert snapshot(model) == before
    assert set(merge_modes("nas-lora")) >= {"exact", "center"}
    paper = merge_modes("nas-pc-lora", NASLoRAConfig(preset="paper"))
    assert "exact" in paper and "center" not in paper  # its cell is not linear


# --- Conv-LoRA against its formula, image by image in float64 ---


def expert_output(z, weight, bias, ratio):
    """One (r, H, W) map through an expert: up by ``ratio``, 3 x 3 convolution, GELU, back."""
    z, weight, bias = map(torch.from_numpy, (z[None], weight, bias))
    large = F.interpolate(z, scale_factor=ratio, mode="bicubic")
    out = F.gelu(F.conv2d(large, weight, bias, padding=1))
    return F.interpolate(out, z.shape[2:], mode="bicubic")[0].numpy()


def conv_lora_formula(layer, x, noise=None):
    """The output for a (B, H, W, C) array, the experts chosen, and the auxiliary loss.

    ``noise``: (B, 8) standard normal in training, None in evaluation mode.
    """
    p = {name: value.detach().double().numpy() for name, value in layer.state_dict().items()}
    normal = statistics.NormalDist()
    update, chosen, load = [], [], np.zeros(8)
    for index, tokens in enumerate(x):
        z = np.einsum("hwc,rc->rhw", tokens, p["lora_A"])
        pooled = z.mean((1, 2))
        clean = p["gate"] @ pooled
        logits = clean
        if noise is not None:
            deviation = np.log1p(np.exp(p["noise"] @ pooled)) + 1e-2
            logits = clean + deviation * noise[index]
            for i in range(8):  # would expert i be the first, were its noise drawn again?
                rival = np.delete(logits, i).max()
                load[i] += normal.cdf((clean[i] - rival) / deviation[i])
        best = int(logits.argmax())
        chosen.append(best)
        weight, bias = p[f"experts.{best}.weight"], p[f"experts.{best}.bias"]
        y = z + expert_output(z, weight, bias, best + 1)
        update.append(np.einsum("rhw,or->hwo", y, p["lora_B"]))
    h = x @ p["base.weight"].T + p["base.bias"] + 32 / 3 * np.stack(update)
    if noise is None:
        return h, chosen, None
    importance = np.bincount(chosen, minlength=8).astype(float)
    variation = sum(counted.var(ddof=1) / counted.mean() ** 2 for counted in (importance, load))
    return h, chosen, 1e-2 * variation


def conv_lora_layer():
    """A layer in float64 whose gate separates maps, so that several experts are selected."""
    torch.manual_seed(0)
    base = nn.Linear(6, 10).double().requires_grad_(False)
    config, balance = conv_lora.ConvLoRAConfig(), conv_lora.Balance()
    layer = conv_lora.ConvLoRALinear(base, config, balance, layer_generator(0, "qkv"))
    stir((p for name, p in layer.named_parameters() if not name.startswith("base")), 0.5)
    with torch.no_grad():
        layer.gate.mul_(3)
    return layer


@pytest.mark.parametrize("shape", [(24, 5, 4, 6), (24, 1, 1, 6), (1, 3, 7, 6)])
def test_conv_lora_computes_its_formula(shape):
    layer = conv_lora_layer().eval()
    x = torch.randn(shape, dtype=torch.float64)
    expected, quiet, _ = conv_lora_formula(layer, x.numpy())
    assert len(set(quiet)) >= min(4, shape[0])
    layer.balance.start(layer, ())
    # Rounding of float64; sums in another order. Values are about 10.
    torch.testing.assert_close(layer(x), torch.from_numpy(expected), rtol=1e-11, atol=1e-11)
    assert torch.equal(layer(x[:, :1, :1].flatten(1, 2)), layer(x[:, :1, :1]).flatten(1, 2))
    with pytest.raises(ValueError, match="15 tokens"):
        layer(torch.randn(2, 15, 6, dtype=torch.float64))
    assert layer.balance.take() is None  # only training balances
    layer.train()
    torch.manual_seed(3)
    noise = torch.randn(shape[0], 8, dtype=torch.float64)
    expected, chosen, loss = conv_lora_formula(layer, x.numpy(), noise.numpy())
    assert shape[0] == 1 or chosen != quiet  # the noise decides some of the choices
    layer.balance.start(layer, ())
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), torch.from_numpy(expected), rtol=1e-11, atol=1e-11)
    # The variation adds 1e-10 to its denominators, which are at least 1/64 here.
    assert layer.balance.take().item() == pytest.approx(loss, rel=1e-7)
    assert layer.balance.take() is None


def test_the_auxiliary_loss_sums_over_the_layers():
    model = make("conv-lora", lively=True).train()
    layers = [m for m in model.modules() if isinstance(m, conv_lora.ConvLoRALinear)]
    singles = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: singles.append(layer.balance.losses[-1]))
    model(images())
    total = auxiliary_loss(model)
    assert len(singles) == len(layers) == 8
    torch.testing.assert_close(total, sum(singles))
    total.backward()
    assert all(layer.gate.grad.any() and layer.lora_A.grad.any() for layer in layers)


# --- VPT against attention over the prompts and the window together ---


def prompted_attention(block, tokens):
    """(H, W, C): the image's rows of plain attention over [prompts, tokens] of one window."""
    attn, heads = block.attn, block.attn.num_heads
    height, width, channels = tokens.shape
    both = torch.cat([block.norm1(block.prompts), tokens.reshape(-1, channels)])  # (12 + N, C)
    parts = attn.qkv(both).unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)  # (3, h, 12 + N, d)
    tables, sizes, outputs = (attn.rel_pos_h, attn.rel_pos_w), [(height, width)] * 2, []
    for q, k, v in zip(*parts, strict=True):
        logits = q @ k.T * q.shape[1] ** -0.5
        image = logits[None, 12:, 12:]  # prompts have no position
        logits[12:, 12:] = add_decomposed_rel_pos(image, q[None, 12:], *tables, *sizes)[0]
        outputs.append(logits.softmax(-1) @ v)
    return attn.proj(torch.cat(outputs, 1)[12:]).reshape(tokens.shape)


@pytest.mark.parametrize("index", [0, 1])  # in windows of 14 x 14, and over the whole grid
def test_vpt_attends_to_prompts_and_window(index):
    model = make("vpt", lively=True)
    block = model.image_encoder.blocks[index]
    x = torch.randn(2, 4, 4, 32)
    with torch.no_grad():
        for name, parameter in block.attn.named_parameters():
            if "rel_pos" in name:
                parameter.normal_()
        expected = []
        for tokens in block.norm1(x):
            padded = tokens if index == 1 else F.pad(tokens, (0, 0, 0, 10, 0, 10))
            expected.append(prompted_attention(block, padded)[:4, :4])
        attended = x + torch.stack(expected)
        expected = attended + block.mlp(block.norm2(attended))
        # Rounding of float32 over some 200 keys.
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    assert block.window_size == (14 if index == 0 else 0) and block.prompts.shape == (12, 32)


# --- Mona and SAM-Adapter against their equations ---


def test_mona_computes_its_equation():
    torch.manual_seed(0)
    layer, x = mona.Mona(8, width=64), torch.randn(2, 5, 9, 8)
    stir(layer.parameters(), 0.1)
    with torch.no_grad():
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        normal = (x - mean) / (variance + 1e-5).sqrt() * layer.norm.weight + layer.norm.bias
        z = layer.down(normal * layer.norm_scale + x * layer.scale).permute(0, 3, 1, 2)
        # The three convolutions and the identity are one 7 x 7 convolution.
        kernel, bias = torch.zeros(64, 1, 7, 7), torch.zeros(64)
        for size, conv in zip((3, 5, 7), layer.depthwise, strict=True):
            edge = (7 - size) // 2
            kernel += F.pad(conv.weight, (edge,) * 4) / 3
            bias += conv.bias / 3
        kernel[:, :, 3, 3] += 1
        z = F.conv2d(z, kernel, bias, padding=3, groups=64)
        pointwise = layer.pointwise.weight[:, :, 0, 0] + torch.eye(64)
        z = torch.einsum("oi,bihw->bhwo", pointwise, z) + layer.pointwise.bias
        expected = x + F.gelu(z) @ layer.up.weight.T + layer.up.bias
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_monas_follow_attention_and_mlp():
    model = make("mona", lively=True)
    plain = built("vit_t").image_encoder.blocks[1]
    block, x = model.image_encoder.blocks[1], torch.randn(2, 4, 4, 32)
    with torch.no_grad():
        attended = block.mona1(x + plain.attn(plain.norm1(x)))
        expected = block.mona2(attended + plain.mlp(plain.norm2(attended)))
        torch.testing.assert_close(block(x), expected)


def test_high_frequencies_lose_the_low_ones():
    place = torch.arange(64.0) * 2 * torch.pi / 64
    low, high = torch.cos(10 * place), torch.cos(20 * place)  # the mask reaches to 16
    image = (3 + low[:, None] * low + high[:, None] + low).expand(2, 3, 64, 64)
    expected = high[:, None].abs().expand(2, 3, 64, 64)
    # Rounding of a float32 transform of values up to 6.
    torch.testing.assert_close(sam_adapter.high_frequencies(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, widths", [("vit_t", [2]), ("mobile_sam", [8, 10, 20])])
@torch.no_grad()
def test_sam_adapter_adds_its_prompts_before_each_block(name, widths):
    model = make("sam-adapter", name, lively=True)
    encoder, batch = model.image_encoder, images()
    plain = built(name).image_encoder
    high = sam_adapter.high_frequencies(batch)

    def through(prompts, tokens, blocks, positions=0):
        """Tokens (B, H, W, C) through the blocks of a stage."""
        features = prompts.patch_embed(high).permute(0, 2, 3, 1) + prompts.embed(tokens)
        tokens = tokens + positions
        for block, mlp in zip(blocks, prompts.block_mlps, strict=True):
            tokens = block(tokens + prompts.up(F.gelu(mlp[0](features))))
        return tokens.permute(0, 3, 1, 2)

    stages = encoder.sam_adapter.stages
    if name == "vit_t":
        x = through(stages[0], plain.patch_embed(batch), plain.blocks, plain.pos_embed)
    else:
        x = plain.stages[0](plain.patch_embed(batch))
        for prompts, stage in zip(stages, plain.stages[1:], strict=True):
            x = through(prompts, stage.downsample(x).permute(0, 2, 3, 1), stage.blocks)
    torch.testing.assert_close(encoder(batch), plain.neck(x))
    assert all(stage.features is None for stage in encoder.sam_adapter.stages)
    assert [stage.up.in_features for stage in stages] == widths


# --- Runs ---


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data", train=8, val=2, test=2)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method(data, tmp_path, monkeypatch, method):
    """Two steps train what the method trains and nothing else."""
    models, build = [], run_module.build_adapted_model

    def watched(config):
        model = build(config)
        models.extend([model, copy.deepcopy(model)])
        return model

    monkeypatch.setattr(run_module, "build_adapted_model", watched)
    output = tmp_path / "run"
    succeed("train", "--data", data, *SHORT, "--method", method, "--output", output)
    model, start = models
    trained = {n for n, p in start.named_parameters() if p.requires_grad}
    changed = differing(state_of(model), state_of(start))
    buffers = {name for name, _ in start.named_buffers()}
    if method == "conv-lora":  # an expert without maps gets no gradient
        trained = {name for name in trained if ".experts." not in name}
        changed = {name for name in changed if ".experts." not in name}
    assert changed - buffers == trained
    assert any("image_encoder" in name for name in changed) == (method != "decoder-only")

    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["images"]["train"] == 8
    assert list(metrics.get("test_merged", {})) == merge_modes(method)
    assert (output / "operations.json").exists() == searches(method)
    parameters = (*trainable_parameters(start), *start.mask_decoder.parameters())
    assert metrics["trainable_parameters"] == sum(p.numel() for p in parameters)
    assert method in (output / "report.html").read_text()
    scores = scores_of(output)
    assert scores.pop("images") == 2 and scores == metrics["test"]


def test_conv_loras_noise_is_the_same_in_a_resumed_run(data, tmp_path):
    """Two epochs at once, and two with a stop between them."""
    options = ["--data", data, *SHORT, "--method", "conv-lora", "--schedule", "constant"]
    runs = [tmp_path / "unbroken", tmp_path / "resumed"]
    succeed("train", *options, "--epochs", 2, "--output", runs[0])
    succeed("train", *options, "--output", runs[1])
    config = json.loads((runs[1] / "config.json").read_text())
    config["training"]["epochs"] = 2
    del config["sha256"], config["version"]
    (runs[1] / "config.json").write_text(json.dumps(config))
    torch.rand(7)  # other code may draw from the generator
    succeed("train", *options, "--epochs", 2, "--output", runs[1], "--resume")
    one, other = (torch.load(run / "last.pt", weights_only=True)["model"] for run in runs)
    assert not differing(one, other)
