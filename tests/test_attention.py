"""Fused attention against stock: outputs, gradients, and everything that must not change."""

import copy
import io
import math
import pickle
import types
import warnings
from typing import Any

import pytest
import torch
from adapted_models import (
    Calls,
    adapted_encoder,
    as_torch,
    build_encoder,
    images,
    randomize,
    relative,
    shard,
    stir,
)
from conftest import SHORT, succeed
from hugging_face import batch_loss, batch_of, build_sam, build_sam2
from sam_families import PLAIN
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention as SamAttention
from segment_anything.modeling.image_encoder import Block as SamBlock
from segment_anything.modeling.image_encoder import window_partition, window_unpartition
from timm.models.hieradet_sam2 import MultiScaleAttention
from timm.models.tiny_vit import Attention as TimmAttention
from torch import nn
from transformers import SamHQVisionConfig, SamVisionConfig
from transformers.models.sam import modeling_sam
from transformers.models.sam_hq import modeling_sam_hq

from bench.families import first
from naslora import NASLoRAConfig, UserError, fuse_attention, inject, merge, unfuse_attention
from naslora.adapter.layer.windows import Windows
from naslora.methods import METHODS, apply
from naslora.sam.attention import FusedAttention
from naslora.sam.families import plain_vits
from naslora.sam.segmentation import build_model
from naslora.trained import load_model, merge_run

BLOCKS = ["blocks.0.attn", "blocks.1.attn"]  # a windowed and a global one


def stirred(model: nn.Module, evaluates: bool = False) -> nn.Module:
    """Moves every parameter: a fresh SAM's relative positions and biases are zero."""
    stir(model.parameters(), 0.3)
    if evaluates:
        model.eval()  # of timm's attention it returns None
    return model


def encoder() -> ImageEncoderViT:
    """4 x 4 tokens in windows of 3 x 3, of which three are padded."""
    return stirred(build_encoder())


def fused(model: nn.Module) -> nn.Module:
    fuse_attention(model)
    return model


# ---- Families ------------------------------------------------------------------------------------


def sam_attention(size=(4, 6), kind=SamAttention, **options) -> SamAttention:
    return kind(32, num_heads=2, use_rel_pos=True, input_size=size, **options)


class _MobileSAM(nn.Module):
    """MobileSAM's TinyViT attention, written from its description. The package is not installed."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.d = 2, 16, 16
        self.scale, self.dh = 16**-0.5, 32
        self.norm, self.qkv, self.proj = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.attention_biases = nn.Parameter(torch.zeros(2, 24))
        own = TimmAttention(32, 16, 2, attn_ratio=1, resolution=(4, 6)).attention_bias_idxs
        self.register_buffer("attention_bias_idxs", own, persistent=False)

    @torch.no_grad()
    def train(self, mode: bool = True) -> "_MobileSAM":
        super().train(mode)
        if mode and hasattr(self, "ab"):
            del self.ab
        elif not mode:
            self.ab = self.attention_biases[:, self.attention_bias_idxs]
        return self

    def forward(self, x):
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, self.num_heads, -1)
        q, k, v = (part.permute(0, 2, 1, 3) for part in qkv.split([16, 16, 16], dim=3))
        index = self.attention_bias_idxs
        bias = self.attention_biases[:, index] if self.training else self.ab
        logits = (q @ k.transpose(-2, -1)) * self.scale + bias
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, self.dh))


def named(kind: type[nn.Module], module: str, name: str = "Attention") -> type[nn.Module]:
    """The class as another package defines it."""
    code: Any = kind.forward
    forward = types.FunctionType(code.__code__, code.__globals__, argdefs=code.__defaults__)
    forward.__module__ = module
    return type(name, (kind,), {"__module__": module, "forward": forward})


def timm_attention(sdpa: bool) -> TimmAttention:
    attention = TimmAttention(32, 16, 2, attn_ratio=2, resolution=(4, 6))
    attention.fused_attn = sdpa
    return attention


def hiera(pool: nn.Module | None, sdpa: bool) -> MultiScaleAttention:
    attention = MultiScaleAttention(32, 32, 2, pool)
    attention.fused_attn = sdpa
    return attention


def hugging_face(name: str, **options) -> nn.Module:
    hq = "HQ" in name
    module, config = (modeling_sam_hq, SamHQVisionConfig) if hq else (modeling_sam, SamVisionConfig)
    shape = {"hidden_size": 32, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    return getattr(module, name)(config(**shape, **options), 0)


FAMILIES = {
    "segment_anything": sam_attention,
    "segment_anything, other tables": lambda: sam_attention((5, 3)),
    "segment_anything, no positions": lambda: SamAttention(32, num_heads=2),
    "segment_anything, no bias": lambda: sam_attention(qkv_bias=False),
    "SAM-HQ's copy": lambda: sam_attention(
        kind=named(SamAttention, "segment_anything_hq.modeling.image_encoder")
    ),
    "transformers": lambda: hugging_face("SamVisionAttention"),
    "transformers, sdpa": lambda: hugging_face("SamVisionSdpaAttention"),
    "transformers, no positions": lambda: hugging_face("SamVisionAttention", use_rel_pos=False),
    "transformers, dropout": lambda: hugging_face("SamVisionAttention", attention_dropout=0.5),
    "transformers, SAM-HQ": lambda: hugging_face("SamHQVisionAttention"),
    "transformers, SAM-HQ, sdpa": lambda: hugging_face("SamHQVisionSdpaAttention"),
    "timm's TinyViT": lambda: timm_attention(False),
    "timm's TinyViT, sdpa": lambda: timm_attention(True),
    "timm's Hiera": lambda: hiera(None, True),
    "timm's Hiera, pooled": lambda: hiera(nn.MaxPool2d(2, 2), False),
    "MobileSAM's TinyViT": lambda: named(_MobileSAM, "mobile_sam.modeling.tiny_vit_sam")(),
}
every_family = pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES)


def tokens_for(attention: nn.Module, dtype=torch.float32) -> torch.Tensor:
    shape = (2, 24, 32) if hasattr(attention, "attention_biases") else (2, 4, 6, 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)


def outcome(attention: nn.Module, dtype, training: bool) -> dict[str, torch.Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    attention.to(dtype).train(training)
    x = tokens_for(attention, dtype).requires_grad_()
    torch.manual_seed(0)  # of dropout
    output = first(attention(x))
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    (output * weight).sum().backward()
    gradients = {name: p.grad for name, p in attention.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": x.grad, **gradients}


@every_family
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_outputs_and_gradients_are_those_of_stock(build, training):
    attention = stirred(build())
    # transformers' eager attention computes softmax in float32.
    rounded = type(attention).__name__ in ("SamVisionAttention", "SamHQVisionAttention")
    for dtype in (torch.float64, torch.float32):
        stock, ours = copy.deepcopy(attention), copy.deepcopy(attention)
        assert fuse_attention(ours) == [""]
        expected, found = (outcome(model, dtype, training) for model in (stock, ours))
        assert expected.keys() == found.keys() >= {"output", "x", "qkv.weight", "proj.bias"}
        precision = torch.finfo(torch.float32 if rounded else dtype).eps
        for name, value in expected.items():
            # Sums of up to 48 products, in another order.
            assert value.norm() > 0 and relative(found[name] - value, value) < 20 * precision, name


@every_family
def test_bfloat16_autocast(build):
    """As near to the float32 result as stock is: the same roundings of inputs, fewer after them."""
    stock = stirred(build(), evaluates=True)
    ours = fused(copy.deepcopy(stock))
    x = tokens_for(stock)
    with torch.no_grad():
        exact = first(stock(x))
        with torch.autocast("cpu", torch.bfloat16):
            theirs, found = first(stock(x)), first(ours(x))
    assert found.dtype == theirs.dtype == torch.bfloat16
    assert relative(found - exact, exact) <= 1.5 * relative(theirs - exact, exact)


def test_hugging_faces_attention_weights():
    """Asked for weights, the eager attention computes as stock; else it returns None for them."""
    eager = stirred(FAMILIES["transformers"](), evaluates=True)
    x = tokens_for(eager)
    output, weights = eager(x, output_attentions=True)
    fuse_attention(eager)
    assert eager(x)[1] is None
    ours, our_weights = eager(x, output_attentions=True)
    assert torch.equal(ours, output) and torch.equal(our_weights, weights)


# ---- Whole models --------------------------------------------------------------------------------


MODELS = {
    "segment_anything": (encoder, lambda model: model(images()).square().mean(), 2),
    "transformers": (build_sam, lambda model: batch_loss(model, batch_of(2)), 2),
    "MobileSAM": (
        lambda: stirred(build_model("mobile_sam", 64).image_encoder).requires_grad_(True),
        lambda model: model(torch.rand(1, 3, 64, 64, generator=torch.manual_seed(0))).abs().mean(),
        10,
    ),
}


@pytest.mark.parametrize("build, loss, count", MODELS.values(), ids=MODELS)
def test_whole_models(build, loss, count):
    model = build().train()
    for norm in model.modules():  # statistics of few pixels magnify roundings
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.eval()
    values, gradients = [], []
    for fuse in (False, True):
        if fuse:
            assert len(fuse_attention(model)) == count
        model.zero_grad()
        value = loss(model)
        value.backward()
        values.append(value.detach())
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    assert relative(gradients[1] - gradients[0], gradients[0]) < 1e-5


def test_names_children_and_state_stay():
    model = encoder()
    model.blocks[0].attn.eval()
    modules = dict(model.named_modules())
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    keys, text = list(model.state_dict()), repr(model)
    training = [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    expected = model(images())

    for _ in range(2):
        assert fuse_attention(model) == BLOCKS
        assert dict(model.named_modules()) == modules
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
        assert list(model.state_dict()) == keys and repr(model) == text
        assert [module.training for module in model.modules()] == training
        assert isinstance(model.blocks[0].attn, SamAttention)
    torch.testing.assert_close(model(images()), expected)

    assert unfuse_attention(model) == BLOCKS
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(images()), expected)
    assert unfuse_attention(model) == []

    assert fuse_attention(model.blocks[1]) == ["attn"] and fuse_attention(model) == BLOCKS
    assert unfuse_attention(model.blocks[0]) == ["attn"]
    assert [isinstance(block.attn, FusedAttention) for block in model.blocks] == [False, True]


# ---- Windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 4), (3, 6), (2, 7), (6, 2), (1, 1)], ids=str)
def test_windows_are_segment_anythings(grid):
    x = torch.randn(2, *grid, 5, dtype=torch.float64, requires_grad=True)
    expected, padded = window_partition(x, 3)
    cut = Windows(3, grid)
    windows = cut.partition(x)
    assert torch.equal(windows, expected)
    assert torch.equal(cut.unpartition(windows), window_unpartition(windows, 3, padded, grid))

    fill = torch.randn(5, dtype=torch.float64, requires_grad=True)
    outside = window_partition(torch.ones_like(x), 3)[0] == 0
    assert torch.equal(cut.partition(x, fill), torch.where(outside, fill, expected))
    assert torch.autograd.gradcheck(cut.partition, (x, fill))
    assert torch.autograd.gradcheck(Windows(3, grid, by_shape=True).partition, (x, fill))
    assert torch.autograd.gradcheck(cut.unpartition, (windows,))


@pytest.mark.parametrize("grid", [(4, 4), (3, 6), (2, 7), (6, 2), (1, 1)], ids=str)
def test_queries_beyond_the_images_are_left_out(grid):
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    cut = Windows(3, grid, by_shape=True)
    windows = cut.partition(x).requires_grad_()
    assert torch.equal(cut.ordered(Windows(3, grid).partition(x)), windows)
    parts = cut.heads(windows, 2)
    assert sum(q[..., 0, 0].numel() for q, _, _ in parts) == 2 * math.prod(grid)
    assert torch.equal(cut.join([q.flatten(3) for q, _, _ in parts]), x[..., :4])
    keys, values = (torch.cat([own[i] for own in parts]).flatten(3) for i in (1, 2))
    assert torch.equal(torch.cat([keys, values], 3), windows[..., 4:])

    def joined(windows):
        parts = cut.heads(windows, 2)
        o = [(q * k[:, : q.shape[1], : q.shape[2]]).flatten(3) for q, k, _ in parts]
        return cut.join(o), *(v for _, _, v in parts)

    assert torch.autograd.gradcheck(joined, (windows,))


QKV = {
    "frozen": None,
    "LoRA": NASLoRAConfig("qkv", channel_ratio=0.0),
    "NAS-LoRA": NASLoRAConfig("qkv", channel_ratio=1.0),
    "NAS-PC-LoRA": NASLoRAConfig("qkv"),
    "the paper's operations": NASLoRAConfig("qkv", preset="paper"),
}


@pytest.mark.parametrize("config", QKV.values(), ids=QKV)
def test_the_padding_of_windows_is_not_projected(config):
    models = [encoder() for _ in range(2)]
    for model in models:
        if config is not None:
            inject(model, config)
            randomize(model)
        model.double()
    block = fused(models[1]).blocks[0]
    x = torch.randn(2, 4, 4, 32, generator=torch.Generator().manual_seed(3)).double()
    results = []
    for model in models:
        copied = x.clone().requires_grad_()
        with Calls(torch.ops.aten.addmm.default) as products:
            output = model.blocks[0](copied)
        output.square().sum().backward()
        gradients = [p.grad for p in model.blocks[0].parameters() if p.grad is not None]
        results.append((output, copied.grad, *gradients, most_tokens(products)))
    *expected, of_stock = results[0]
    *found, of_ours = results[1]
    torch.testing.assert_close(found, expected)
    assert (of_stock, of_ours) == (2 * 36, 2 * 16)
    assert isinstance(block, SamBlock)


def most_tokens(products: Calls) -> int:
    """The most tokens that the wide products with frozen weights take."""
    return max(tokens.shape[0] for _, tokens, w in products.arguments if min(w.shape) >= 32)


def merged_encoder(preset: str) -> ImageEncoderViT:
    model = encoder()
    inject(model, NASLoRAConfig("qkv", preset=preset))
    randomize(model)
    merge(model.eval(), "exact")
    return model


BLOCKS_OF = {
    "merged": lambda: merged_encoder("linear").blocks,
    "merged, the paper's operations": lambda: merged_encoder("paper").blocks,
    "transformers": lambda: build_sam().vision_encoder.layers,
}


@torch.no_grad()
@pytest.mark.parametrize("build", BLOCKS_OF.values(), ids=BLOCKS_OF)
def test_nor_is_that_of_merged_layers_and_of_hugging_faces(build):
    block = build()[0].double()
    side = block.window_size + 1
    x = torch.randn(2, side, side, 32, dtype=torch.float64)
    expected = block(x)
    fuse_attention(block)
    with Calls(torch.ops.aten.addmm.default) as products:
        torch.testing.assert_close(block(x), expected)
    assert most_tokens(products) == 2 * side * side


def test_a_watched_layer_sees_whole_windows():
    model, shapes = fused(adapted_encoder()), []
    expected, attention = model(images()), model.blocks[0].attn
    for watched in (attention.qkv, attention):
        hook = watched.register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
        torch.testing.assert_close(model(images()), expected)
        hook.remove()
    assert {shape[1:] for shape in shapes} == {(3, 3, 32)} and len(shapes) == 2


# ---- With adapters -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, tiny_vit):
    """VPT computes attention itself, from the attention's layers."""
    stock, ours = (build_model("vit_t", 32, attention=kind).eval() for kind in ("stock", "fused"))
    x = torch.rand(2, 3, 32, 32, generator=torch.manual_seed(0))
    for model in (stock, ours):
        apply(method, model)
    assert stock.state_dict().keys() == ours.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(ours(x).masks, stock(x).masks, rtol=1e-4, atol=1e-5)


def test_conv_lora_draws_the_random_numbers_of_stock():
    """It draws some for each window, so the windows keep their order."""
    stock = encoder()
    apply("conv-lora", stock, METHODS["conv-lora"].config(target="qkv"))
    stirred(stock).train()
    ours = fused(copy.deepcopy(stock))
    outputs = []
    for model in (stock, ours):
        torch.manual_seed(0)
        outputs.append(model(images()))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


# ---- Copies, wrappers, compilers -----------------------------------------------------------------


def test_copies_and_pickles():
    model = fused(adapted_encoder())
    expected = model(images())
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in (*twins, torch.load(io.BytesIO(as_torch(model)), weights_only=False)):
        assert torch.equal(twin(images()), expected)
        assert unfuse_attention(twin) == BLOCKS
        assert type(twin.blocks[0].attn) is SamAttention
    assert isinstance(model.blocks[0].attn, FusedAttention)


@pytest.mark.parametrize(
    "name, dynamic",
    [("segment_anything", True), ("transformers", False), ("timm's TinyViT", False)],
)
def test_torch_compile_in_one_graph(name, dynamic):
    torch.compiler.reset()
    attention = fused(stirred(FAMILIES[name]()))
    x = tokens_for(attention)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    expected = first(attention(x))
    torch.testing.assert_close(first(compiled(x)), expected)
    first(compiled(x)).sum().backward()
    assert attention.qkv.weight.grad.abs().max() > 0


def test_gradient_checkpointing():
    theirs = fused(build_sam()).train()
    expected = batch_loss(theirs, batch_of(2))
    theirs.gradient_checkpointing_enable()
    loss = batch_loss(theirs, batch_of(2))
    assert torch.equal(loss, expected)
    loss.backward()
    assert theirs.vision_encoder.layers[0].attn.qkv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("fuse_first", [True, False])
def test_fully_shard(fuse_first, single_process_group):
    expected = fused(encoder())(images())
    model = shard(fused(encoder()) if fuse_first else encoder())
    assert fuse_attention(model) == BLOCKS
    output = model(images())
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert unfuse_attention(model) == BLOCKS
    torch.testing.assert_close(model(images()), expected)


# ---- What is not known ---------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["own forward", "further layer", "patched class"])
def test_unknown_attention_stays_and_is_named(change):
    patched = {"forward": lambda self, x: SamAttention.forward(self, x).tanh()}
    kind = type("Attention", (SamAttention,), {"__module__": SamAttention.__module__, **patched})
    unknown = sam_attention(kind=kind if change == "patched class" else SamAttention)
    if change == "own forward":
        unknown.forward = lambda x: SamAttention.forward(unknown, x)
    if change == "further layer":
        unknown.gate = nn.Linear(32, 32)
    model = nn.Sequential(sam_attention(), unknown)
    kind = type(unknown)
    expected = unknown(tokens_for(unknown))
    with pytest.warns(UserWarning) as caught:
        assert fuse_attention(model) == ["0"]
    assert len(caught) == 1 and caught[0].filename == __file__
    line = f"attention that is not known stays as it is: 1 ({kind.__name__})"
    assert str(caught[0].message) == line
    assert type(unknown) is kind and torch.equal(unknown(tokens_for(unknown)), expected)
    with pytest.raises(UserError, match=rf"it has 0 \({kind.__name__}\)$"):
        fuse_attention(nn.Sequential(unknown))


def test_the_mask_decoder_is_not_meant(tiny_vit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (build_model("vit_t", 32), build_sam(), build_model("mobile_sam", 32)):
            names = fuse_attention(model)
            assert names and not [name for name in names if "decoder" in name]


def test_a_model_without_attention_is_refused():
    with pytest.raises(UserError, match="no attention that can be fused: none of"):
        fuse_attention(nn.Linear(3, 3))


def test_sam2_of_transformers():
    """The product that is left out is not used: outputs and gradients are the same."""
    model = build_sam2()
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = []
    for fuse in (False, True, False):
        names = fuse_attention(model) if fuse else unfuse_attention(model)
        assert not fuse or len(names) == len(model.vision_encoder.backbone.blocks)
        y = model.vision_encoder(x).last_hidden_state
        found.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(found[2][0], found[0][0])


def test_an_attention_that_is_not_known_stays_and_is_named():
    model = plain_vits.PlainViTEncoder(PLAIN["dinov3_s"][1], (64, 64))
    name = r"trunk\.blocks\.0\.attn \(EvaAttention\)"
    with pytest.raises(UserError, match=f"it has {name}"):
        fuse_attention(model)
    both = nn.ModuleList([model, sam_attention()])
    with pytest.warns(UserWarning, match=name):
        assert fuse_attention(both) == ["1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_model("dinov3_s", 32, attention="fused")


# ---- Export --------------------------------------------------------------------------------------


EXPORTED = ("segment_anything", "transformers", "transformers, SAM-HQ, sdpa", "timm's TinyViT",
            "MobileSAM's TinyViT", "timm's Hiera, pooled")  # fmt: skip


def operators(model: nn.Module, x: torch.Tensor, strict: bool = False) -> list[str]:
    program = torch.export.export(model, (x,), strict=strict)
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("name", EXPORTED)
def test_the_exported_graph_is_that_of_stock(name):
    attention = stirred(FAMILIES[name](), evaluates=True)
    x = tokens_for(attention)
    attention(x)  # TinyViT's cache
    stock = operators(attention, x)
    ours = operators(fused(attention), x)
    if name == "segment_anything":  # runtimes fuse one operator with a bias
        assert sum("scaled_dot_product_attention" in operator for operator in ours) == 1
        stock = ours
    assert ours == stock
    assert all(operator.startswith("aten") or "getitem" in operator for operator in ours)
    if name in ("segment_anything", "timm's TinyViT"):
        assert operators(attention, x, strict=True) == stock


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["segment_anything", "transformers", "MobileSAM's TinyViT"])
def test_torch_jit_trace(name):
    attention = stirred(FAMILIES[name](), evaluates=True)
    x = tokens_for(attention)
    expected = first(attention(x))
    traced = torch.jit.trace(fused(attention), x)
    torch.testing.assert_close(first(traced(x)), expected)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert {kind.partition("::")[0] for kind in kinds} == {"aten", "prim"}
    assert "prim::PythonOp" not in kinds


# ---- Runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["fused", "stock"])
def test_the_configuration_decides(clean_data, tiny_sam, tmp_path, attention):
    run, merged = tmp_path / "run", tmp_path / "merged"
    options = ("--data", clean_data, *SHORT, "--attention", attention, "--output", run)
    succeed("train", *options)
    merge_run(run, "exact", merged)
    for folder in (run, merged):
        model, config = load_model(folder)
        fused = any(isinstance(module, FusedAttention) for module in model.modules())
        assert config.model.attention == attention and fused == (attention == "fused")
