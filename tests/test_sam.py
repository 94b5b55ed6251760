"""Encoders, checkpoints and the segmentation model, against segment_anything."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapted_models import Calls, as_torch, build_encoder, differing, original_sam, state_of
from conftest import TINY, error_of
from safetensors.torch import load_file, save_file
from sam_families import pixels
from scipy.special import expit, softmax
from segment_anything import sam_model_registry
from torch import nn
from torch.testing import assert_close

from naslora import NASLoRAConfig, inject
from naslora.sam.checkpoint import load_sam_checkpoint
from naslora.sam.families.mobile_sam import NAMING
from naslora.sam.precision import cast_frozen
from naslora.sam.segmentation import (
    SamForSegmentation,
    SegmentationOutput,
    build_model,
    labels_of,
    mirror,
)
from naslora.sam.vits import VITS, ViT

# The weights are not part of the project. The tests that need them are skipped without them.
MOBILE_SAM = Path(__file__).parents[1].parent / "shared" / "weights" / "mobile_sam.safetensors"
needs_mobile_sam = pytest.mark.skipif(
    not MOBILE_SAM.is_file(), reason=f"needs MobileSAM's weights as {MOBILE_SAM}"
)

SMALL, BF16 = ViT(**TINY), torch.bfloat16


def build_sam(size: int, width: int = SMALL.width) -> nn.Module:
    """Builds segment_anything's own model with a small encoder."""
    sizes = {"img_size": size, "embed_dim": width, "out_chans": 256, "window_size": 14}
    encoder = build_encoder(**sizes, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    for name, parameter in encoder.named_parameters():
        if "pos" in name:  # zero without a checkpoint
            nn.init.normal_(parameter, std=0.3)
    return original_sam(encoder, size)


@pytest.fixture(autouse=True)
def small_vit_b(monkeypatch):
    """Makes ``vit_b`` small in this file. One test checks the real sizes."""
    monkeypatch.setitem(VITS, "vit_b", SMALL)


@pytest.fixture(scope="module")
def original():
    return build_sam(64)


@pytest.fixture(scope="module")
def checkpoints(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.save(original.state_dict(), folder / "sam.pth")
    save_file(original.state_dict(), folder / "sam.safetensors")
    return folder


# ---------------------------------------------------------------- encoders


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_official_models_have_segment_anything_tensors(name, monkeypatch):
    """Compares all names and shapes of the encoder and the prompt encoder, at 1024 pixels."""
    monkeypatch.undo()
    with torch.device("meta"):
        ours = SamForSegmentation(name).state_dict()
        theirs = sam_model_registry[name]().state_dict()
    shapes = {key: value.shape for key, value in theirs.items()}
    parts = ("image_encoder.", "prompt_encoder.")
    for key, value in ours.items():
        if key.startswith(parts) or "mask_tokens" not in key:
            assert value.shape == shapes[key], key
    assert {k for k in ours if k.startswith(parts)} == {k for k in shapes if k.startswith(parts)}
    assert [k for k in ours if k.startswith("mask_decoder.iou_prediction_head")] == []


@pytest.mark.parametrize(
    "name, options, message",
    [
        *(("vit_t", {"image_size": size}, f"of 16 for SAM, got {size}; choose {near}$")
          for size, near in ((0, 16), (8, 16), (100, "96 or 112"), (-16, 16))),
        ("vit_x", {}, r"model must be one of vit_t, .*mobile_sam, .*, got 'vit_x'"),
        ("vit_b", {"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_built(name, options, message):
    line = error_of(SamForSegmentation, name, **{"image_size": 64, **options})
    assert re.search(message, line)
    for shape in ((2, 3, 64, 48), (2, 3, 128, 128), (3, 64, 64), (2, 1, 64, 64)):
        with pytest.raises(ValueError, match=r"images: expected \(B, 3, 64, 64\), got \("):
            SamForSegmentation("vit_b", 64)(torch.zeros(shape))


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("file", ["sam.pth", "sam.safetensors"])
def test_embedding_equals_segment_anything(original, checkpoints, file):
    model = build_model("vit_b", 64, checkpoint=checkpoints / file).eval()
    images = pixels(64)
    with torch.no_grad():
        normalised = torch.stack([original.preprocess(255 * image) for image in images])
        expected = original.image_encoder(normalised)
        actual = model.image_encoder((images - model.pixel_mean) / model.pixel_std)
    # float32 rounding: the images are normalised on a scale of 1 here, and of 255 in SAM.
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for key, value in model.prompt_encoder.state_dict().items():
        assert torch.equal(value, original.prompt_encoder.state_dict()[key]), key


def test_multi_class_loads_the_tensors_that_fit(original, checkpoints):
    """Loads the first four of ten mask tokens and the first hypernetwork; the rest is random."""
    fresh = build_model("vit_b", 64, num_classes=3, seed=1)
    model = build_model("vit_b", 64, num_classes=3, checkpoint=checkpoints / "sam.pth", seed=1)
    tokens = model.mask_decoder.mask_tokens.weight
    assert torch.equal(tokens[:4], original.mask_decoder.mask_tokens.weight)
    assert torch.equal(tokens[4:], fresh.mask_decoder.mask_tokens.weight[4:])
    assert torch.equal(model.mask_decoder.class_head.weight, fresh.mask_decoder.class_head.weight)
    ours = model.mask_decoder.output_hypernetworks_mlps[0].layers[2].weight
    assert torch.equal(ours, original.mask_decoder.output_hypernetworks_mlps[0].layers[2].weight)


@pytest.mark.parametrize("size", [32, 96])
def test_another_image_size_resizes_the_positions(original, checkpoints, size):
    """4 x 4 tokens in the file, 2 x 2 or 6 x 6 in the model."""
    model = build_model("vit_b", size, checkpoint=checkpoints / "sam.pth").eval()
    grid, stored = size // 16, original.image_encoder
    maps = stored.pos_embed.permute(0, 3, 1, 2)
    bicubic = F.interpolate(maps, (grid, grid), mode="bicubic", align_corners=False)
    assert_close(model.image_encoder.pos_embed, bicubic.permute(0, 2, 3, 1))
    # Linear interpolation of the 7 relative positions at the centres of pixels, in NumPy.
    count = 2 * grid - 1
    at = (np.arange(count) + 0.5) * 7 / count - 0.5
    for axis in ("rel_pos_h", "rel_pos_w"):
        before = getattr(stored.blocks[1].attn, axis).detach().numpy()
        columns = [np.interp(at, np.arange(7), column) for column in before.T]
        actual = getattr(model.image_encoder.blocks[1].attn, axis)
        assert actual.shape == (count, 16)
        assert_close(actual.detach(), torch.tensor(np.stack(columns, 1), dtype=torch.float32))
        windowed = getattr(model.image_encoder.blocks[0].attn, axis)
        assert torch.equal(windowed, getattr(stored.blocks[0].attn, axis))
    assert model(pixels(size)).masks.shape == (2, 1, size, size)


PLAIN = "is not a plain state dict of tensors"
DAMAGED = "is truncated or is not a PyTorch state dict"
OTHER_MODEL = "does not fit model vit_b .*--model that the checkpoint was made for"
# The bytes made of a state dict, and the line. tests/reliability has damaged and malicious files.
BAD = {
    "text": (lambda state: b"<html>404: not found</html>\n", DAMAGED),
    "nested": (lambda state: as_torch({"state_dict": state}), PLAIN),
    "foreign": (
        lambda state: as_torch({"layer1.weight": torch.zeros(2, 2)}),
        "holds no SAM checkpoint: it has no image_encoder",
    ),
    "wider": (lambda state: as_torch(build_sam(64, width=48).state_dict()), OTHER_MODEL),
    "MobileSAM": (
        lambda state: as_torch(build_model("mobile_sam", 64).state_dict()),
        r"is MobileSAM \(mobile_sam\), and --model says vit_b",
    ),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_bad_checkpoints_are_refused_in_one_line(original, tmp_path, make, message):
    path = tmp_path / "bad.pth"
    path.write_bytes(make(original.state_dict()))
    model = build_model("vit_b", 64)
    before = state_of(model)
    assert re.search(rf"bad\.pth.* {message}", error_of(load_sam_checkpoint, model, path))
    assert not differing(model.state_dict(), before)


# ---------------------------------------------------------------- MobileSAM's weights


@needs_mobile_sam
@torch.no_grad()
def test_mobile_sam_is_that_of_the_original():
    """Compares with values that MobileSAM's implementation computed with the same weights."""
    model = build_model("mobile_sam", 1024, checkpoint=MOBILE_SAM).eval()
    y, x = torch.meshgrid(torch.arange(1024), torch.arange(1024), indexing="ij")
    phase = torch.stack([x / 97 + y / 41, x / 23 - y / 61, (x + y) / 151]).float()
    embedding = model.image_encoder((2 * phase.sin())[None])  # like a normalised image
    # float32 rounding of values below 1 after about thirty layers; the measured difference is 4e-7.
    expected = torch.tensor(EXPECTED_SAMPLE)
    assert_close(embedding[0, 17::60, 5::25, 40], expected, rtol=0, atol=1e-5)
    assert embedding.std().item() == pytest.approx(EXPECTED_STD, rel=1e-4)
    # Every tensor is loaded, except for the parts that the segmentation decoder lacks.
    state = model.state_dict()
    for key, value in load_file(MOBILE_SAM).items():
        ours = NAMING.ours(key)
        if ours in state and state[ours].shape == value.shape:
            assert torch.equal(state[ours], value), key
        else:
            dropped = ("iou_prediction_head.", "output_hypernetworks_mlps.", "mask_tokens.weight")
            assert key.removeprefix("mask_decoder.").startswith(dropped), key
    # TinyViT caches its attention biases in evaluation mode; loading renews the cache.
    late = build_model("mobile_sam", 64).eval()
    load_sam_checkpoint(late, MOBILE_SAM)
    assert not late.training
    fresh = build_model("mobile_sam", 64, checkpoint=MOBILE_SAM).eval()
    assert torch.equal(late(pixels(64)).masks, fresh(pixels(64)).masks)


EXPECTED_SAMPLE = [
    [-0.0012910, -0.0211010, 0.0100707],
    [-0.2494578, -0.3606926, -0.4093044],
    [-0.0314519, -0.0247031, 0.0095375],
    [0.0478589, 0.0231462, 0.0232440],
]
EXPECTED_STD = 0.0953994


# ---------------------------------------------------------------- the segmentation model


@pytest.mark.parametrize("name", ["vit_b", "mobile_sam"])
def test_frozen_weights_in_16_bits(name):
    """Matrices are cast once; norms and the adapter are not. The error is that of autocast."""
    model = build_model(name, 64).eval()
    inject(model, NASLoRAConfig())
    norms = {
        f"{prefix}.{n}"
        for prefix, module in model.image_encoder.named_modules()
        if "Norm" in type(module).__name__
        for n, _ in module.named_parameters(recurse=False)
    }
    assert norms
    outputs = []
    with torch.no_grad():
        exact = model.image_encoder(pixels(64))
        for _ in range(2):
            with Calls(torch.ops.aten._to_copy.default) as cast, torch.autocast("cpu", BF16):
                outputs.append(model.image_encoder(pixels(64)).float())
            cast_frozen(model.image_encoder, BF16)
    for n, parameter in model.image_encoder.named_parameters():
        stays = parameter.requires_grad or n in norms
        assert parameter.dtype == (torch.float32 if stays else BF16), n
    frozen = {p.data_ptr() for p in model.image_encoder.parameters() if not p.requires_grad}
    assert not frozen & {t.data_ptr() for t, *_ in cast.arguments if t.dtype == torch.float32}
    errors = [(output - exact).norm() for output in outputs]
    assert 0 < errors[1] < 1.2 * errors[0]


def test_class_map_is_the_papers():
    """Computes einsum("qk,qhw->khw", softmax(cls)[..., :-1], sigmoid(masks)) for each image."""
    model = build_model("vit_b", 64, num_classes=3).eval()
    with torch.no_grad():
        output = model(pixels(64))
    assert output.masks.shape == (2, 10, 64, 64) and output.classes.shape == (2, 10, 4)
    scores = output.class_map()
    assert scores.shape == (2, 3, 64, 64)
    for i in range(2):
        classes = softmax(output.classes[i].double().numpy(), -1)[..., :-1]
        expected = np.einsum("qk,qhw->khw", classes, expit(output.masks[i].double().numpy()))
        # float32 rounding of sums of ten products below 1.
        assert_close(scores[i].double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
        assert np.array_equal(labels_of(scores)[i].numpy(), scores[i].numpy().argmax(0))
    half = SegmentationOutput(torch.zeros(1, 2, 4, 4).half(), torch.zeros(1, 2, 3).half())
    assert half.class_map().dtype == torch.float32
    assert_close(half.class_map(), torch.full((1, 2, 4, 4), 2 * 0.5 / 3))
    # A binary model has one token and no classes.
    model = build_model("vit_b", 64).eval()
    assert model.mask_decoder.mask_tokens.num_embeddings == 1
    with torch.no_grad():
        output = model(pixels(64))
    assert output.masks.shape == (2, 1, 64, 64) and output.classes is None
    assert_close(output.class_map(), output.masks.sigmoid())
    labels = labels_of(output.class_map())
    assert labels.dtype == torch.int64 and labels.shape == (2, 64, 64)
    assert torch.equal(labels.bool(), output.masks[:, 0] > 0)


@pytest.mark.parametrize("axes", [[[-1]], [[-1], [-2], [-2, -1]]])
def test_a_mirrored_model_scores_an_image_and_its_mirror_image_alike(tiny_sam, axes):
    model, stock = (build_model("vit_t", 32, 3).eval() for _ in range(2))
    mirror(model, axes)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        own = model(images)
        mean = sum(stock(images.flip(a)).class_map().flip(a) for a in [[], *axes])
        torch.testing.assert_close(own.class_map(), mean / (len(axes) + 1))
        for turn in axes:
            torch.testing.assert_close(model(images.flip(turn)).class_map().flip(turn), own.mean)
