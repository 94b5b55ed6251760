"""DINOv3, DINOv2 and PE Spatial under SAM's decoder, against timm."""

import re

import pytest
import timm
import torch
from adapted_models import description, differing, randomize
from conftest import error_of
from safetensors.torch import save_file
from sam_families import PLAIN, pixels, randomize_all, small_models
from timm.models import eva, load_checkpoint, vision_transformer

from naslora import merge
from naslora.adapter.layer.modules import adapter_layers
from naslora.methods import apply
from naslora.sam.export import export
from naslora.sam.families import find_family
from naslora.sam.runtimes import load_class_map
from naslora.sam.segmentation import SamForSegmentation, build_model

NAMES = ("dinov3_s", "dinov2_s", "pe_spatial_t", "pe_spatial_l")


@pytest.fixture(scope="module", autouse=True)
def small():
    with small_models():
        yield


def of_timm(name, image_size):
    size = PLAIN[name][1]
    sizes = {"embed_dim": size.width, "depth": size.depth, "num_heads": size.heads}
    model = timm.create_model(size.timm_name, num_classes=0, img_size=image_size, **sizes)
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint of timm, of images of 4 x 4 patches."""

    def write(name, suffix=".pth"):
        torch.manual_seed(0)
        model = of_timm(name, 4 * find_family(name).patch)
        randomize_all(model)
        path = tmp_path / f"{name}{suffix}"
        (torch.save if suffix == ".pth" else save_file)(model.state_dict(), path)
        return path

    return write


@pytest.mark.parametrize("grid", [4, 6])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_equal_those_of_timm(name, grid, checkpoint):
    """Position embeddings are resized as timm does."""
    path, family = checkpoint(name), find_family(name)
    size = grid * family.patch
    model, reference = build_model(name, size, 1, path), of_timm(name, size)
    filters = vision_transformer if name == "dinov2_s" else eva
    load_checkpoint(reference, path, filter_fn=filters.checkpoint_filter_fn)
    expected = reference.forward_features(pixels(size))[:, reference.num_prefix_tokens :]
    found = model.image_encoder(pixels(size))
    assert found.shape == (2, 32, grid, grid) and found.std() > 0.1
    assert (found.flatten(2).mT - expected).abs().max() < 1e-5
    assert model.eval()(pixels(size)).masks.shape == (2, 1, size, size)
    config = reference.pretrained_cfg
    torch.testing.assert_close(model.pixel_mean.flatten(), torch.tensor(config["mean"]))
    torch.testing.assert_close(model.pixel_std.flatten(), torch.tensor(config["std"]))


def authors_names(state, name):
    """The names in the checkpoints of DINOv3's, DINOv2's and PE's authors."""
    pairs = {
        "dinov3_s": (("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"),
                     ("gamma_2", "ls2.gamma")),
        "dinov2_s": (("reg_token", "register_tokens"),),
        "pe_spatial_t": (("patch_embed.proj", "conv1"), ("pos_embed", "positional_embedding"),
                         ("blocks.", "transformer.resblocks."), ("norm_pre", "ln_pre"),
                         ("norm", "ln_"), ("qkv.", "in_proj_"), ("attn.proj", "attn.out_proj"),
                         ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
                         ("cls_token", "class_embedding")),
    }[name]  # fmt: skip
    found = {}
    for key, tensor in state.items():
        for own, theirs in pairs:
            key = key.replace(own, theirs)
        found[key] = tensor
    if name == "dinov3_s":
        found["blocks.0.attn.qkv.bias"] = torch.zeros(96)
    if name == "dinov2_s":
        found["mask_token"] = torch.zeros(1, 32)
        found["pos_embed"] = torch.cat([torch.zeros(1, 1, 32), found["pos_embed"]], 1)
    if name == "pe_spatial_t":
        found["class_embedding"] = found["class_embedding"][0, 0]
        found["positional_embedding"] = found["positional_embedding"][0]
    return found


@pytest.mark.parametrize("name", NAMES[:3])
def test_checkpoints_of_the_authors_load(name, checkpoint, capsys):
    path, size = checkpoint(name), 6 * find_family(name).patch
    encoder = build_model(name, size, 1, path).image_encoder.state_dict()
    torch.save(authors_names(torch.load(path), name), path)
    assert not differing(build_model(name, size, 1, path).image_encoder.state_dict(), encoder)
    assert capsys.readouterr().out == ""


def test_the_decoder_keeps_new_weights_and_a_whole_model_comes_back(checkpoint, tmp_path):
    """Trained, merged and exported it is a checkpoint that fills every tensor, at any size."""
    path = checkpoint("dinov2_s", ".safetensors")
    model, new = (build_model("dinov2_s", 84, 3, given) for given in (path, "none"))
    assert not differing(model.mask_decoder.state_dict(), new.mask_decoder.state_dict())
    apply("nas-pc-lora", model)
    assert {layer.prefix_tokens for _, layer in adapter_layers(model)} == {5}
    trained = {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert model.mask_decoder.neck[0].weight.requires_grad
    assert trained == {"image_encoder", "mask_decoder"}
    randomize(model)
    merge(model, "center")
    out = tmp_path / "out.safetensors"
    export(model, description(model), "safetensors", out)
    class_map, _ = load_class_map(out)
    expected = model.eval()(pixels(84)).class_map()
    assert (class_map(pixels(84)) - expected).abs().max() < 1e-5  # positions are resized again
    again = build_model("dinov2_s", 84, 3, out)
    assert again.left_out.keys() == {"image_encoder.trunk.pos_embed"}
    assert not differing(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("name", "made_for", "size", "message"),
    [
        ("dinov3_b", "dinov3_s", 64, r"is DINOv3 \(dinov3_s\), and --model says dinov3_b; choose"),
        ("pe_spatial_t", "dinov2_s", 64, r"is DINOv2 \(dinov2_s\), and --model says pe_spatial_t"),
        ("vit_b", "pe_spatial_t", 64, r"is PE Spatial \(pe_spatial_t\), and --model says vit_b"),
        ("dinov3_s", "vit_b", 64, r"is SAM \(vit_b\), and --model says dinov3_s; choose"),
        ("dinov3_s", None, 64, "holds no SAM checkpoint: it has no image_encoder weights"),
        ("dinov2_s", "dinov2_s", 512, "multiple of 14 for DINOv2, got 512; choose 504 or 518"),
        ("dinov2_s", "dinov2_s", 4090, "multiple of 14 for DINOv2, got 4090; choose 4088$"),
    ],
)
def test_what_does_not_fit(name, made_for, size, message, checkpoint, tmp_path):
    path = tmp_path / "other.pth"
    if made_for in PLAIN:
        path = checkpoint(made_for)
    else:
        state = SamForSegmentation("vit_b", 64).state_dict() if made_for else {}
        torch.save({**state, "something": torch.ones(2)}, path)
    assert re.search(message, error_of(build_model, name, size, 1, path))
