"""Exported models: computed by other runtimes, loaded by other packages; and error messages."""

from pathlib import Path

import numpy as np
import pytest
import torch
from adapted_models import (
    adapted_encoder,
    description,
    images,
    original_sam,
    randomize,
    relative,
    smooth_images,
    stir,
    tokens,
)
from conftest import error_of, refusal
from miniatures import save
from safetensors.torch import load_file, save_file
from torch import nn

from naslora import NASLoRAConfig, UserError, inject, merge
from naslora.sam.checkpoint import load_sam_checkpoint
from naslora.sam.encoders import build_image_encoder
from naslora.sam.export import Embedding, Scores, export
from naslora.sam.families.mobile_sam import NAMING
from naslora.sam.runtimes import load_class_map
from naslora.sam.segmentation import SamForSegmentation, build_model, labels_of

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("tiny_vit")
ROOT = Path(__file__).parent.parent
SIZE = 64


def tiny_sam(size: int) -> nn.Module:
    torch.manual_seed(0)
    return original_sam(build_image_encoder("vit_t", size), size)


def segmenter(
    size=SIZE, num_classes=1, checkpoint=None, mode="exact", name="vit_t", calibration=None
) -> SamForSegmentation:
    """Builds a merged model whose adapter and decoder differ from their initial values."""
    model = build_model(name, size, num_classes, checkpoint).eval()
    inject(model, NASLoRAConfig())
    randomize(model)
    stir(model.mask_decoder.parameters(), 0.01)
    merge(model, mode, calibration)
    return model


# ---------------------------------------------------------------- graphs


def assert_onnx_runtime_computes(module, path, size):
    import onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    for batch in (1, 3):  # the trace has a batch of two
        x = tokens(batch, 3, size, size).sigmoid()
        with torch.no_grad():
            expected = module(x)
        found = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        # float32 rounding over a few layers, with a margin.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    domains = {node.domain for node in onnx.load(path, load_external_data=False).graph.node}
    assert domains <= {"", "ai.onnx"}
    assert not list(path.parent.glob(".*"))


@pytest.mark.campaign
@pytest.mark.parametrize(
    "size, num_classes, mode, part",
    [
        (64, 1, "exact", "model"),
        (240, 3, "exact", "model"),
        (240, 1, "center", "encoder"),
        (64, 1, "exact", "encoder"),
    ],
)
def test_onnx_runtime_computes_what_pytorch_does(tmp_path, size, num_classes, mode, part):
    """Two sizes test that no constant depends on the image size."""
    model, path = segmenter(size, num_classes, mode=mode), tmp_path / "model.onnx"
    export(model, description(model, part), "onnx", path)
    assert_onnx_runtime_computes((Scores if part == "model" else Embedding)(model), path, size)


def test_torch_export_computes_and_predicts_what_pytorch_does(tmp_path):
    # Three classes, because a test of the command line has a binary model.
    model, path = segmenter(SIZE, 3), tmp_path / "model.pt2"
    export(model, description(model), "torch-export", path)
    program = torch.export.load(path)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "naslora" in name]  # it must load without naslora
    x = tokens(3, 3, SIZE, SIZE).sigmoid()
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), Scores(model)(x))
        expected = labels_of(model(x).class_map())
    class_map, held = load_class_map(path, trust=True)
    assert held == description(model)
    # Labels may differ at pixels where two scores are equal up to rounding.
    assert (labels_of(class_map(x)) == expected).float().mean() > 0.999


def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    """A protobuf file is limited to 2 GiB; the weights of a ViT-H exceed it."""
    monkeypatch.setattr("naslora.sam.export.MOST_BYTES", 1000)
    model = segmenter(240)  # has several windows, and padded ones
    path = tmp_path / "model.onnx"
    export(model, description(model, "encoder"), "onnx", path)
    assert path.stat().st_size < 2e6 < (tmp_path / "model.onnx.data").stat().st_size
    assert_onnx_runtime_computes(Embedding(model), path, 240)
    assert "holds only the image encoder" in error_of(load_class_map, path)
    content = bytearray((tmp_path / "model.onnx.data").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.onnx.data").write_bytes(content)
    assert "model.onnx is damaged" in error_of(load_class_map, path)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["exact", "center", "calibrated"])
def test_a_merged_model_compiles_in_one_graph_and_runs_in_16_bits(mode):
    """Equals the float32 result up to the rounding of each layer to 8 bits."""
    model = adapted_encoder()
    merge(model, mode, [smooth_images(4, seed) for seed in range(4)])
    expected = model(images())
    if mode == "exact":  # merged in another mode it has the original modules
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images()), expected)
    low = model.bfloat16()(images().bfloat16())
    assert low.dtype == torch.bfloat16
    assert relative(low.float() - expected, expected) < 10 * 2**-9


# ---------------------------------------------------------------- SAM's own format


@pytest.fixture
def checkpoint(tmp_path):
    """Writes the state dict of segment_anything's model for images of twice the size."""
    path = tmp_path / "sam.safetensors"
    save_file(tiny_sam(2 * SIZE).state_dict(), path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("mode, num_classes", [("center", 1), ("calibrated", 3)])
def test_segment_anything_loads_it_strictly(mode, num_classes, checkpoint, tmp_path):
    batches = [smooth_images(4, seed) for seed in range(4)]
    model = segmenter(SIZE, num_classes, checkpoint, mode, calibration=batches)
    path = tmp_path / "merged.safetensors"
    export(model, description(model), "safetensors", path)

    exported, before = load_file(path), load_file(checkpoint)
    assert exported.keys() == before.keys()
    tiny_sam(2 * SIZE).load_state_dict(exported, strict=True)
    own = model.state_dict()
    changed = {name for name in before if not torch.equal(exported[name], before[name])}
    # Encoder: only the merged layers change. Resized positions have their original values.
    linears = ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
    weights = {f"image_encoder.blocks.{i}.{linear}.weight" for i in (0, 1) for linear in linears}
    biases = {name.replace("weight", "bias") for name in weights if mode == "calibrated"}
    assert {name for name in changed if "encoder" in name} == weights | biases
    assert all(torch.equal(exported[name], own[name]) for name in weights | biases)
    # Decoder: all trained tensors change. The tensors that the model lacks are the original ones.
    trained = {name for name in own if name.startswith("mask_decoder.")} & before.keys()
    assert trained <= changed
    assert {name for name in changed if name.startswith("mask_decoder.")} == trained
    tokens_before = before["mask_decoder.mask_tokens.weight"]
    kept = min(len(own["mask_decoder.mask_tokens.weight"]), 4)
    rows = exported["mask_decoder.mask_tokens.weight"]
    assert torch.equal(rows[:kept], own["mask_decoder.mask_tokens.weight"][:kept])
    assert torch.equal(rows[kept:], tokens_before[kept:])
    if (mode, num_classes) == ("center", 1):  # it loads back as a checkpoint
        again = build_model("vit_t", SIZE, 1, path).state_dict()
        assert own.keys() == again.keys()
        assert not [name for name in own if not torch.equal(own[name], again[name])]
        other = SamForSegmentation("vit_t", 2 * SIZE)
        load_sam_checkpoint(other, path)  # at the image size of the checkpoint


def test_mobile_sam_gets_its_own_names(tmp_path):
    torch.manual_seed(0)
    model = SamForSegmentation("mobile_sam", SIZE)
    state = {NAMING.theirs(k): v.clone() for k, v in model.state_dict().items()}
    spare = tiny_sam(SIZE).state_dict()
    state |= {k: v for k, v in spare.items() if k.startswith("mask_decoder.") and k not in state}
    state["mask_decoder.mask_tokens.weight"] = spare["mask_decoder.mask_tokens.weight"]
    # Names from MobileSAM's checkpoint.
    assert {
        "image_encoder.patch_embed.seq.0.c.weight",
        "image_encoder.patch_embed.seq.2.bn.running_mean",
        "image_encoder.layers.0.downsample.conv2.c.weight",
        "image_encoder.layers.1.blocks.0.local_conv.c.weight",
        "image_encoder.layers.3.blocks.1.attn.attention_biases",
        "image_encoder.neck.0.weight",
    } <= state.keys()
    state["image_encoder.head.weight"] = torch.ones(3, 320)  # unused, but kept
    save_file(state, tmp_path / "mobile.safetensors")
    model = build_model("mobile_sam", SIZE, 1, tmp_path / "mobile.safetensors").eval()
    inject(model, NASLoRAConfig(target="qkv"))
    randomize(model)
    merge(model, "center")
    path = tmp_path / "merged.safetensors"
    export(model, description(model), "safetensors", path)
    exported = load_file(path)
    assert exported.keys() == state.keys()
    assert all(exported[name].shape == state[name].shape for name in state)
    differing = {name for name in state if not torch.equal(exported[name], state[name])}
    assert differing and all(name.endswith("attn.qkv.weight") for name in differing)


def test_relative_positions_become_one_operator(tmp_path):
    """Padded windows and the whole image, in a graph that other runtimes fuse."""
    model = build_model("vit_b", 64, 1, "none").eval()
    model.image_encoder.blocks = model.image_encoder.blocks[1:3]  # a window, and the whole
    for block in model.image_encoder.blocks:
        nn.init.normal_(block.attn.rel_pos_h)
        nn.init.normal_(block.attn.rel_pos_w)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = Embedding(model)(x)
    path = tmp_path / "a.pt2"
    export(model, description(model, "encoder"), "torch-export", path)
    program = torch.export.load(path)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("scaled_dot_product_attention" in name for name in targets) == 2
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)


def test_what_is_refused(checkpoint, tmp_path):
    """tests/reliability has what the command line refuses, damaged files and files of others."""
    model, path = segmenter(num_classes=3, checkpoint=checkpoint, mode="center"), tmp_path / "c"
    export(model, description(model), "safetensors", path.with_suffix(".safetensors"))
    picture = save(tmp_path / "a.png", np.zeros((SIZE, SIZE, 3)))
    result = refusal("predict", f"{path}.safetensors", picture, "--output", tmp_path / "masks")
    assert "SAM has no classification branch for 3 classes" in result
    fresh = segmenter(mode="center")
    with pytest.raises(UserError, match="not made from a SAM checkpoint"):
        export(fresh, description(fresh), "safetensors", tmp_path / "merged.safetensors")
