"""SAM-HQ, SAM 2, SAM 3 and Hugging Face's folders, against the transformers library."""

import contextlib
import functools
import itertools
import json
import re

import numpy as np
import pytest
import torch
from adapted_models import description, randomize
from safetensors.torch import load_file, save_file
from sam_families import (
    SMALL,
    classes,
    our_masks,
    pixels,
    randomize_all,
    reference,
    side,
    small_models,
    their_masks,
)
from scipy.spatial.distance import cdist
from torch.testing import assert_close

from naslora import UserError, merge
from naslora.adapter.layer.modules import adapter_layers
from naslora.methods import METHODS, apply
from naslora.sam.encoders import checkpoint_blocks, transformer_blocks
from naslora.sam.export import export
from naslora.sam.families import FAMILIES, find_family
from naslora.sam.runtimes import load_class_map
from naslora.sam.segmentation import SamForSegmentation, build_model, labels_of
from naslora.study.encoder_statistics import block_statistics


def quickly(names, *chosen):
    """Parameters of which plain pytest runs the chosen ones, and make campaign all."""
    return [
        pytest.param(name, marks=() if name in chosen else pytest.mark.campaign) for name in names
    ]


@pytest.fixture(scope="module", autouse=True)
def small():
    with small_models():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes a folder of Hugging Face for a model, once."""

    @functools.cache
    def folder_of(name: str):
        made = tmp_path_factory.mktemp("hf") / name
        reference(name, side(name)).save_pretrained(made)
        return made

    return folder_of


# ---------------------------------------------------------------- the same masks


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *itertools.product(("vit_b", "sam_hq_b", "sam2.1_t", "sam2.1_l"), (64, 160)),
        *(("sam3", 56), ("sam3", 84)),
    ],
)
def test_masks_equal_those_of_transformers(name, size, tmp_path):
    original = reference(name, size)
    original.save_pretrained(tmp_path)
    model = build_model(name, size, 1, tmp_path)
    ours, theirs = our_masks(model, pixels(size)), their_masks(original, pixels(size))
    grid = size // find_family(name).patch
    assert ours.shape == theirs.shape == (2, 1, 4 * grid, 4 * grid) and ours.std() > 0.1
    # Rounding of float32, in sums of other orders, relative to the largest logit.
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    # The file without its folder is known by its names.
    again = build_model(name, size, 1, tmp_path / "model.safetensors")
    assert torch.equal(our_masks(again, pixels(size)), ours)


REAL = {name: table[name] for name, (table, _) in SMALL.items()}  # before the fixture


@contextlib.contextmanager
def real_size(name):
    with pytest.MonkeyPatch.context() as patch:
        if name in SMALL:
            patch.setitem(SMALL[name][0], name, REAL[name])
        yield


@pytest.mark.parametrize("name", ["vit_b", "sam_hq_b", "sam2.1_t", "sam3"])
def test_configurations_of_real_sizes_are_the_defaults_of_transformers(name):
    family = find_family(name)
    with real_size(name):
        config = family.huggingface.config(name, family.image_size)
    scales = config["vision_config"].pop("scale_factors", None)  # the tracker drops the last
    assert scales == ([4, 2, 1] if name == "sam3" else None)

    def assert_within(ours, default):
        for key, value in ours.items():
            if isinstance(value, dict):
                assert_within(value, default[key])
            else:
                assert np.array_equal(value, default[key]), key

    _, theirs = classes(family.huggingface.architecture)
    assert_within(config, json.loads(theirs().to_json_string(use_diff=False)))


# ---------------------------------------------------------------- folders of Hugging Face


@pytest.mark.parametrize("name", ["vit_b", "sam_hq_b", "sam2.1_t", "sam3"])
def test_a_folder_comes_back_without_a_missing_key(name, tmp_path):
    """Merged, with a trained mask token: the other tensors of the decoder have the same bits."""
    family, size = find_family(name), side(name)
    kind, config_kind = classes(family.huggingface.architecture)
    original = kind(config_kind(**family.huggingface.config(name, size)))
    randomize_all(original)
    original.save_pretrained(tmp_path / "in")
    model = build_model(name, size, 1, tmp_path / "in")
    apply("nas-pc-lora", model)
    randomize(model)
    merge(model, "center")
    with torch.no_grad():
        model.mask_decoder.mask_tokens.weight.add_(1)
    export(model, description(model), "huggingface", tmp_path / "out")
    loaded, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    tokens, before = (one.mask_decoder.mask_tokens.weight for one in (loaded, original))
    assert torch.equal(tokens[0], before[0] + 1) and torch.equal(tokens[1:], before[1:])
    theirs = original.state_dict()
    for key, value in loaded.state_dict().items():
        # Sam2Model starts with two different positional encodings. Checkpoints have one twice.
        changed = (".attn.", ".attention.", ".mlp.", "mask_tokens", "r.shared_embedding")
        assert torch.equal(value, theirs[key]) or any(part in key for part in changed), key
    again = build_model(name, size, 1, tmp_path / "out")
    assert torch.equal(our_masks(again, pixels(size)), our_masks(model, pixels(size)))


def test_weights_in_several_files_are_read(folder, tmp_path):
    reference("vit_b", 64).save_pretrained(tmp_path, max_shard_size="1MB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    ours, theirs = (build_model("vit_b", 64, 1, path) for path in (tmp_path, folder("vit_b")))
    assert torch.equal(our_masks(ours, pixels(64)), our_masks(theirs, pixels(64)))


def test_the_model_of_videos_loads_without_its_memory(folder, tmp_path):
    """facebook/sam2.1-hiera-* are stored as models of videos."""
    tensors = load_file(folder("sam2.1_t") / "model.safetensors")
    memory = {
        "memory_encoder.projection.weight": torch.ones(2),
        "no_object_pointer": torch.ones(1, 256),
        "occlusion_spatial_embedding_parameter": torch.ones(1, 64),
    }
    save_file({**tensors, **memory}, tmp_path / "model.safetensors", {"format": "pt"})
    _, config = classes("Sam2VideoModel")
    (tmp_path / "config.json").write_text(config().to_json_string())
    model = build_model("sam2.1_t", 64, 1, tmp_path)
    assert not set(memory) & set(model.left_out)
    with pytest.raises(UserError, match=r"is SAM 2.1 \(sam2.1_t\), and --model says sam2_t"):
        build_model("sam2_t", 64, 1, tmp_path)


@pytest.mark.parametrize(
    "name, architecture", [("sam2.1_t", "Sam2VideoModel"), ("sam3", "Sam3VideoModel")]
)
def test_every_tensor_of_the_model_of_videos_has_a_place(name, architecture):
    """It is in our model, or a part that our decoder leaves out, or the memory's, or SAM 3's
    detector's."""
    kind, config = classes(architecture)
    with real_size(name), torch.device("meta"):
        theirs = kind(config()).state_dict()
        ours = SamForSegmentation(name, side(name)).state_dict()
    found = find_family(name).huggingface.to_ours(theirs)
    assert set(ours) <= set(found)
    heads = ("iou_prediction_head", "output_hypernetworks_mlps", "pred_obj_score_head")
    left = [key for key in found if key not in ours]
    assert all(key.split(".")[1] in heads for key in left), left


# ---------------------------------------------------------------- SAM 2's official names

# Names in sam2.1_hiera_tiny.pt of facebookresearch/sam2, and in our model.
OFFICIAL_NAMES = {
    "image_encoder.trunk.pos_embed_window": "image_encoder.trunk.pos_embed_window",
    "image_encoder.trunk.patch_embed.proj.weight": "image_encoder.trunk.patch_embed.proj.weight",
    "image_encoder.trunk.blocks.1.proj.weight": "image_encoder.trunk.blocks.1.proj.weight",
    "image_encoder.trunk.blocks.0.mlp.layers.1.bias": "image_encoder.trunk.blocks.0.mlp.fc2.bias",
    "image_encoder.neck.convs.3.conv.bias": "image_encoder.neck.convs.3.bias",
    "no_mem_embed": "image_encoder.no_mem_embed",
    "sam_prompt_encoder.point_embeddings.3.weight": "prompt_encoder.point_embeddings.3.weight",
    "sam_prompt_encoder.mask_downscaling.6.bias": "prompt_encoder.mask_downscaling.6.bias",
    "sam_mask_decoder.transformer.layers.1.mlp.layers.0.weight": (
        "mask_decoder.transformer.layers.1.mlp.lin1.weight"
    ),
    "sam_mask_decoder.obj_score_token.weight": "mask_decoder.obj_score_token.weight",
    "sam_mask_decoder.conv_s1.weight": "mask_decoder.conv_s1.weight",
    "sam_mask_decoder.output_hypernetworks_mlps.2.layers.0.weight": (
        "mask_decoder.output_hypernetworks_mlps.2.layers.0.weight"
    ),
    "sam_mask_decoder.pred_obj_score_head.layers.2.bias": (
        "mask_decoder.pred_obj_score_head.layers.2.bias"
    ),
    "memory_attention.layers.3.linear1.weight": "memory_attention.layers.3.linear1.weight",
}


def official_sam2(path, newer=True) -> dict[str, torch.Tensor]:
    """An official checkpoint of SAM 2 with a part of its memory, as it is published."""
    torch.manual_seed(1)
    model = SamForSegmentation("sam2.1_t", 64, 3)
    randomize_all(model)
    naming = find_family("sam2.1_t").official
    state = {naming.theirs(k): v for k, v in model.state_dict().items() if "class_head" not in k}
    state["sam_mask_decoder.mask_tokens.weight"] = torch.randn(4, 256)
    for i in (1, 2, 3):
        for key in [key for key in state if "output_hypernetworks_mlps.0." in key]:
            state[key.replace("mlps.0.", f"mlps.{i}.")] = torch.randn_like(state[key])
    for layer, shape in enumerate(((256, 256), (256, 256), (4, 256))):
        state[f"sam_mask_decoder.iou_prediction_head.layers.{layer}.weight"] = torch.randn(shape)
        state[f"sam_mask_decoder.iou_prediction_head.layers.{layer}.bias"] = torch.randn(shape[0])
        shape = (1, 256) if layer == 2 else shape
        state[f"sam_mask_decoder.pred_obj_score_head.layers.{layer}.weight"] = torch.randn(shape)
        state[f"sam_mask_decoder.pred_obj_score_head.layers.{layer}.bias"] = torch.randn(shape[0])
    state["maskmem_tpos_enc"] = torch.randn(7, 1, 1, 64)
    state["obj_ptr_proj.layers.0.weight"] = torch.randn(256, 256)
    if newer:
        state["no_obj_embed_spatial"] = torch.randn(1, 64)
    torch.save({"model": state}, path)
    return state


@pytest.mark.parametrize("name", SMALL)
def test_no_two_names_become_one(name):
    family = find_family(name)
    ours = SamForSegmentation(name, side(name), 3).state_dict().keys()
    namings = (family.huggingface, *([family.official] if name != "sam3" else []))
    for naming in namings:  # Meta's names of SAM 3 are read only
        theirs = [naming.theirs(key) for key in ours]
        assert len(set(theirs)) == len(theirs)
        assert [naming.ours(key) for key in theirs] == list(ours)
    if name == "sam2.1_t":
        for theirs, own in OFFICIAL_NAMES.items():
            assert family.official.ours(theirs) == own and family.official.theirs(own) == theirs


def test_an_official_checkpoint_of_sam2_comes_back_with_its_memory(tmp_path):
    state = official_sam2(tmp_path / "sam2.1_hiera_tiny.pt")
    model = build_model("sam2.1_t", 128, 1, tmp_path / "sam2.1_hiera_tiny.pt")
    export(model, description(model), "safetensors", tmp_path / "out.safetensors")
    back = load_file(tmp_path / "out.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())
    class_map, _ = load_class_map(tmp_path / "out.safetensors")
    assert torch.equal(class_map(pixels(128)), model.eval()(pixels(128)).class_map())
    export(model, description(model), "huggingface", tmp_path / "hf")
    kind, _ = classes("Sam2Model")
    _, info = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info


# ---------------------------------------------------------------- SAM 3's official names

META = (  # transformers' names and Meta's, as regular expressions and their replacements
    (
        r"vision_encoder\.backbone\.embeddings\.patch_embeddings\.projection",
        "TRUNK.patch_embed.proj",
    ),
    (r"vision_encoder\.backbone\.embeddings\.position_embeddings", "TRUNK.pos_embed"),
    (r"vision_encoder\.backbone\.layer_norm", "TRUNK.ln_pre"),
    (r"vision_encoder\.backbone\.layers\.", "TRUNK.blocks."),
    (r"(TRUNK.*)layer_norm", r"\1norm"),
    (r"(TRUNK.*)attention\.o_proj", r"\1attn.proj"),
    (r"vision_encoder\.neck\.fpn_layers\.", "CONVS."),
    (r"(CONVS\.0)\.scale_layers\.0", r"\1.dconv_2x2_0"),
    (r"(CONVS\.0)\.scale_layers\.2", r"\1.dconv_2x2_1"),
    (r"(CONVS\.1)\.scale_layers\.0", r"\1.dconv_2x2"),
    (r"(CONVS\..)\.proj1", r"\1.conv_1x1"),
    (r"(CONVS\..)\.proj2", r"\1.conv_3x3"),
    ("TRUNK", "detector.backbone.vision_backbone.trunk"),
    ("CONVS", "detector.backbone.vision_backbone.sam2_convs"),
)


def official_sam3(folder, path) -> None:
    """What ``folder`` holds under Meta's names, with a part of all that naslora leaves out."""
    huggingface = find_family("sam3").huggingface
    start, stored = r"^(tracker_model\.)?(detector_model\.)?", load_file(folder).items()
    theirs = {re.sub(start, "", key): value for key, value in stored}
    theirs = {re.sub("^tracker_neck", "vision_encoder.neck", k): v for k, v in theirs.items()}
    own, state = huggingface.to_ours(theirs), {}
    for key, value in own.items():  # SAM 2's official names of the decoder, behind "tracker."
        if not key.startswith("image_encoder."):
            state["tracker." + find_family("sam2.1_t").official.theirs(key)] = value
    state["tracker.no_mem_embed"] = theirs["no_memory_embedding"]
    for key, value in theirs.items():
        if key.startswith("vision_encoder."):
            for pattern, replacement in META:
                key = re.sub(pattern, replacement, key)
            state[key] = value
    for key in [key for key in state if ".attention.q_proj." in key]:
        parts = [state.pop(key.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        state[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    trunk = "detector.backbone.vision_backbone.trunk."
    positions = state[f"{trunk}pos_embed"]
    state[f"{trunk}pos_embed"] = torch.cat([positions[:, :1] + 1, positions], 1)
    state[f"{trunk}blocks.0.attn.freqs_cis"] = torch.ones(16, 8, dtype=torch.complex64)
    others = ("detector.backbone.vision_backbone.convs.0.conv_1x1", "tracker.no_mem_pos_enc")
    others += ("detector.backbone.vision_backbone.sam2_convs.3.conv_1x1", "tracker.obj_ptr_proj")
    others += ("detector.backbone.language_backbone.resizer", "detector.transformer.decoder.norm")
    torch.save({"model": {**state, **{f"{key}.weight": torch.ones(2) for key in others}}}, path)


def test_sam3_loads_from_meta_s_file_and_from_the_model_of_videos(folder, tmp_path):
    """transformers 5.24 puts tracker_model. in front of all names of a Sam3TrackerModel."""
    stored = folder("sam3") / "model.safetensors"
    official_sam3(stored, tmp_path / "sam3.pt")
    video = {
        re.sub("^tracker_model.(detector_model|tracker_neck)", r"\1", key): value
        for key, value in load_file(stored).items()
    }
    detector = {"vision_encoder.neck.fpn_layers.0.proj1.weight": torch.ones(2)}
    detector |= {"text_encoder.text_projection.weight": torch.ones(2)}
    video |= {f"detector_model.{key}": value for key, value in detector.items()}
    video |= {"tracker_model.memory_encoder.projection.weight": torch.ones(2)}
    save_file({**video, "tracker_neck.fpn_layers.3.proj1.bias": torch.ones(2)}, tmp_path / "video")
    (tmp_path / "video").rename(tmp_path / "video.safetensors")
    expected = build_model("sam3", 56, 1, folder("sam3"))
    for path in (tmp_path / "sam3.pt", tmp_path / "video.safetensors"):
        model = build_model("sam3", 56, 1, path)
        assert torch.equal(our_masks(model, pixels(56)), our_masks(expected, pixels(56)))
        assert model.left_out.keys() == expected.left_out.keys()


# ---------------------------------------------------------------- checkpoints of another model


@pytest.mark.parametrize(
    ("name", "made_for", "file", "message"),
    [
        ("sam2.1_t", "sam2.1_l", "model.safetensors", r"is SAM 2.1 \(sam2.1_l\), and .*sam2.1_t"),
        ("vit_b", "vit_l", "", r"is SAM \(vit_l\), and --model says vit_b; choose"),
        ("vit_b", "sam_hq_b", "", r"is SAM-HQ \(sam_hq_b\), and --model says vit_b"),
        ("vit_b", "sam_hq_b", "model.safetensors", r"is SAM-HQ \(sam_hq_b\), and .*says vit_b"),
        ("mobile_sam", "sam2.1_t", "", r"is SAM 2 .*--model says mobile_sam"),
        ("sam2.1_t", "sam2_t", "", r"is SAM 2 \(sam2_t\), and --model says sam2.1_t"),
        ("sam2.1_t", "sam3", "", r"is SAM 3 \(sam3\), and --model says sam2.1_t"),
        ("sam3", "sam2.1_t", "", r"is SAM 2 \(sam2_t\), and --model says sam3"),
    ],
)
def test_checkpoints_of_other_models_are_named(name, made_for, file, message, folder, tmp_path):
    path = tmp_path / "sam2.pt"
    if made_for == "sam2_t":
        official_sam2(path, newer=False)
    else:
        path = folder(made_for) / file
    with pytest.raises(UserError, match=message):
        build_model(name, side(name), 1, path)


def test_a_folder_without_weights_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        build_model("vit_b", 64, 1, tmp_path)


@pytest.mark.parametrize(
    ("name", "file_format", "message"),
    [
        (
            "mobile_sam",
            "huggingface",
            "transformers has no MobileSAM with a mask .* to safetensors",
        ),
        ("sam2.1_t", "huggingface", "not made from a SAM checkpoint"),
        ("sam2.1_t from a folder", "safetensors", r"SAM 2.1's original code also needs"),
        ("sam3 from a folder", "safetensors", r"SAM 3's original code also .*to huggingface"),
        ("vit_b from a folder", "full", "is not empty; choose another --output"),
    ],
)
def test_what_cannot_be_exported(name, file_format, message, folder, tmp_path):
    name, _, source = name.partition(" from ")
    model = build_model(name, side(name), 1, folder(name) if source else None)
    if file_format == "full":
        (tmp_path / "file").touch()
    before = list(tmp_path.iterdir())
    output = tmp_path if file_format == "full" else tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=message):
        export(model, description(model), file_format.replace("full", "huggingface"), output)
    assert list(tmp_path.iterdir()) == before


def test_every_model_builds():
    for family in FAMILIES:
        for name in family.models:
            with torch.device("meta"):
                assert find_family(name).build_encoder(name, 64) is not None
    for name, size, message in (
        *(("sam2.1_t", size, f"multiple of 32 for SAM 2.1, got {size}") for size in (16, 80, 1008)),
        ("sam3", 1024, "multiple of 14 for SAM 3, got 1024"),
    ):
        with pytest.raises(UserError, match=message):
            SamForSegmentation(name, size)


# ---------------------------------------------------------------- what a run does with them


def trained_like(name, classes=1) -> SamForSegmentation:
    """A model with an adapter and a decoder that differ from their start."""
    model = build_model(name, side(name), classes).eval()
    apply("nas-pc-lora", model)
    randomize(model)
    return model


RUNS = ("sam_hq_b", "sam_hq_tiny", "sam2.1_t", "sam3", "dinov3_s", "dinov2_s", "pe_spatial_t")


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("name", quickly(RUNS, "sam_hq_b", "sam2.1_t", "sam3", "dinov3_s"))
def test_gradients_and_checkpointing(name, classes):
    """With recomputed blocks the gradients have the same bits."""
    found = []
    for recomputed in (False, True):
        model = trained_like(name, classes)
        if recomputed:
            checkpoint_blocks(model.image_encoder)
        output = model(pixels(side(name)))
        loss = output.masks.square().mean()
        if output.classes is not None:
            assert output.classes.shape == (2, 10, classes + 1)
            loss = loss + output.classes.square().mean()
        loss.backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        unused = {n for n, p in trained.items() if p.grad is None}
        assert not unused
        found.append([p.grad for p in trained.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(layer.alpha.grad.abs().sum() > 0 for _, layer in adapter_layers(model))


@pytest.mark.parametrize("mode", ["exact", "center", "calibrated"])
@pytest.mark.parametrize("name", ["sam_hq_b", "sam2.1_t", "sam3", "dinov3_s"])
@pytest.mark.filterwarnings("ignore")  # fewer than four tokens for each input of a layer
def test_merging(name, mode):
    model, size = trained_like(name), side(name)
    before = our_masks(model, pixels(size))
    # Enough tokens for the widest layer.
    images = [pixels(size, 16, seed=s) for s in range(3)]
    report = merge(model, mode, images if mode == "calibrated" else None)
    if mode == "exact":
        # Rounding of float32 through an encoder.
        assert_close(our_masks(model, pixels(size)), before, rtol=1e-3, atol=1e-4)
    else:
        assert 0 < report.max_update_error < 1.5


@pytest.mark.campaign
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("file_format", ["onnx", "torch-export"])
def test_exported_graphs_predict_the_same(name, file_format, tmp_path):
    pytest.importorskip("onnxruntime")
    model, images = trained_like(name), pixels(side(name))
    merge(model, "exact")
    path = tmp_path / ("model.onnx" if file_format == "onnx" else "model.pt2")
    export(model, description(model), file_format, path)
    class_map, held = load_class_map(path, trust=True)
    assert held.model == name
    assert (
        labels_of(class_map(images)) == labels_of(model(images).class_map())
    ).float().mean() > 0.999


@pytest.mark.parametrize("name", ["sam2.1_t", "sam3", "dinov3_s"])
@pytest.mark.parametrize("method", quickly(METHODS, "vpt", "lora", "conv-lora", "bitfit"))
def test_methods_work_or_say_what_they_need(name, method):
    model = build_model(name, side(name))
    try:
        apply(method, model)
    except UserError as error:
        assert "needs" in str(error) and type(model.image_encoder).__name__ in str(error)
        assert method in ("vpt", "sam-adapter", "mona")
        return
    model(pixels(side(name))).masks.mean().backward()


def test_statistics_of_hiera_s_blocks():
    """Uniform attention: the mean distance of a query to all keys of its window, by hand."""
    model = build_model("sam2.1_t", 128).eval()
    blocks = transformer_blocks(model.image_encoder)
    for block in blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
    found = block_statistics(model.image_encoder, [pixels(128)], 128)
    assert [block.window for block in found] == [8, 8, 4, 4, None, 14, 14]

    def uniform(window, step=1):
        side = np.arange(window // step) * step + (step - 1) / 2
        queries, keys = (list(itertools.product(at, at)) for at in (side, range(window)))
        return cdist(queries, keys).mean()

    # 32 x 32 tokens of 4 pixels; the second block pools its queries; then 16 x 16 of 8 pixels.
    assert found[0].attention_distance == pytest.approx(4 * uniform(8), rel=1e-5)
    assert found[1].attention_distance == pytest.approx(4 * uniform(8, 2), rel=1e-5)
    assert found[2].attention_distance == pytest.approx(8 * uniform(4), rel=1e-5)
