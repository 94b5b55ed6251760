"""What adapters and merged models hold on disk, and what Transformers reads of adapted models."""

import copy
import json
import os
import pickle
import stat

import pytest
import torch
from adapted_models import SIZE, adapted_encoder, build_encoder, images, randomize
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from naslora import (
    NASLoRAConfig,
    UserError,
    base_state_dict,
    inject,
    load_adapter,
    load_base_state_dict,
    load_merged,
    merge,
    methods,
    save_adapter,
    save_merged,
    unmerge,
)
from naslora.adapter.base_state import ADAPTER_FOLDER
from naslora.adapter.merged_files import MERGED_CONFIG, MERGED_WEIGHTS
from naslora.adapter.modules import adapter_layers
from naslora.adapter.storage import CONFIG_NAME, WEIGHTS_NAME, trained_state
from naslora.files import read_json, write_text

torch.set_num_threads(1)


def trained_encoder() -> nn.Module:
    """An adapted encoder of which the neck is trained as well."""
    model = adapted_encoder()
    model.neck.requires_grad_(True)
    with torch.no_grad():
        model.neck[0].weight.add_(0.1)
    return model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# ---------------------------------------------------------------- what a file holds


def saved(folder) -> set[str]:
    return set(load_file(folder / WEIGHTS_NAME))


def test_include_decides_what_is_saved(tmp_path):
    model = trained_encoder()
    adapter = {n for n in model.state_dict() if ".qkv." in n and ".qkv.base." not in n}
    neck = {n for n in model.state_dict() if n.startswith("neck.")}
    assert adapter and neck
    save_adapter(model, tmp_path / "trainable")
    save_adapter(model, tmp_path / "adapter", include="adapter")
    save_adapter(model, tmp_path / "patterns", include=[r"^pos_embed$", r"norm1\.weight"])
    assert saved(tmp_path / "trainable") == adapter | neck
    assert saved(tmp_path / "adapter") == adapter
    norms = {f"blocks.{i}.norm1.weight" for i in range(2)}
    assert saved(tmp_path / "patterns") == adapter | norms | {"pos_embed"}
    other = build_encoder()
    with torch.no_grad():
        other.pos_embed.add_(1.0)
    load_adapter(other, tmp_path / "patterns")
    assert torch.equal(other.pos_embed, model.pos_embed)


@pytest.mark.parametrize(
    "include, message",
    [
        ("all", "include must be 'trainable', 'adapter' or a list of regular expr.*, got 'all'"),
        (None, "include must be .*, got None"),
        (
            ["neck", "mask_decoder"],
            "include: no tensor's name matches 'mask_decoder'.*blocks, neck",
        ),
        (["("], "include is no list of regular expressions"),
        ([3], "include is no list of regular expressions"),
    ],
)
def test_a_wrong_include_is_refused(include, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        save_adapter(adapted_encoder(), tmp_path, include=include)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_statistics_of_trained_norms_are_saved(tmp_path):
    model = nn.Module()
    model.encoder = adapted_encoder()
    model.decoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.frozen = nn.BatchNorm2d(4).requires_grad_(False)
    model.decoder.train()(images())
    save_adapter(model, tmp_path)
    names = {name for name in saved(tmp_path) if not name.startswith("encoder.")}
    assert names == {f"decoder.{name}" for name in model.decoder.state_dict()}
    other = nn.Module()
    other.encoder = build_encoder()
    other.decoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    other.frozen = nn.BatchNorm2d(4)
    load_adapter(other, tmp_path)
    with torch.no_grad():
        expected = model.decoder.eval()(images())
        assert torch.equal(other.decoder.eval()(images()), expected)


def test_files_carry_what_peft_files_carry(tmp_path):
    model = adapted_encoder()
    model.name_or_path = "facebook/sam-vit-base"
    save_adapter(model, tmp_path)
    stored = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert stored["peft_type"] == "NASLORA"
    assert stored["base_model_name_or_path"] == "facebook/sam-vit-base"
    plain = build_encoder().requires_grad_(False)
    plain.neck.requires_grad_(True)
    save_adapter(plain, tmp_path)
    stored = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert stored["peft_type"] is None and stored["base_model_name_or_path"] is None


def test_files_of_0_1_0_load(tmp_path):
    """They lack the entries of PEFT."""
    model = trained_encoder()
    save_adapter(model, tmp_path)
    stored = json.loads((tmp_path / CONFIG_NAME).read_text())
    old = {name: stored[name] for name in ("method", "config", "layers")}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(old))
    other = build_encoder()
    load_adapter(other, tmp_path)
    assert_same(other, state_of(model))


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_get_the_mode_of_other_files(mask, tmp_path):
    before = os.umask(mask)
    try:
        model = adapted_encoder()
        (tmp_path / f".{WEIGHTS_NAME}.naslora.partial").touch(0o600)  # left by a killed process
        save_adapter(model, tmp_path)
        merge(model)
        save_merged(model, tmp_path)
        write_text(tmp_path / "text", "")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 5 and set(modes.values()) == {0o666 & ~mask}


def scaled(model: nn.Module, factor: float = 1.5) -> nn.Module:
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.mul_(factor)
    return model


@pytest.mark.parametrize(
    "base, fits",
    [
        (build_encoder, True),
        (lambda: build_encoder().bfloat16(), True),
        (lambda: nn.parallel.DataParallel(build_encoder()), True),
        (lambda: adapted_encoder(seed=7), True),
        (lambda: build_encoder().half(), False),
        (lambda: scaled(build_encoder()), False),
        (lambda: scaled(build_encoder(), 1.01), False),
    ],
    ids=["equal", "bf16", "wrapped", "adapted", "fp16", "other", "nearly"],
)
@pytest.mark.parametrize("include", ["trainable", "adapter", ["pos_embed"]], ids=str)
def test_an_adapter_fits_its_own_base_alone(base, fits, include, tmp_path):
    save_adapter(trained_encoder(), tmp_path, include=include)
    model = base()
    before = state_of(model)
    if not fits:
        with pytest.raises(UserError, match=r"other frozen weights .*pass check_base=False"):
            load_adapter(model, tmp_path)
        assert_same(model, before)
    load_adapter(model, tmp_path, check_base=fits)


# ---------------------------------------------------------------- merged models


@pytest.mark.parametrize("mode", ["exact", "center"])
def test_saving_the_adapter_of_a_merged_model_is_refused(mode, tmp_path):
    """It would replace a good adapter by the trained decoder alone."""
    model = trained_encoder()
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    merge(model, mode)
    parent = nn.Sequential(model)
    again = pickle.loads(pickle.dumps(model))
    for merged in (model, parent, copy.deepcopy(model), again):
        with pytest.raises(UserError, match=r"the model is merged.* unmerge first.* save_merged"):
            save_adapter(merged, tmp_path)
        with pytest.raises(UserError, match="the model is merged: call unmerge"):
            load_adapter(merged, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    unmerge(model)
    save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "description",
    [
        {"method": None, "layers": ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]},
        {"method": None, "layers": []},
        {"method": "nas-lora", "layers": []},
    ],
    ids=str,
)
def test_a_file_without_the_adapter_it_promises_is_refused(description, tmp_path):
    """Version 0.1.0 saved merged models so."""
    model = trained_encoder()
    save_adapter(model, tmp_path)
    stored = read_json(tmp_path / CONFIG_NAME)
    del stored["other_tensors"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**stored, **description}))
    neck = {n: v for n, v in load_file(tmp_path / WEIGHTS_NAME).items() if n.startswith("neck.")}
    save_file(neck, tmp_path / WEIGHTS_NAME)
    for other in (build_encoder(), adapted_encoder()):
        before = state_of(other)
        with pytest.raises(UserError, match=r"holds no tensor of an adapter.*was merged before"):
            load_adapter(other, tmp_path)
        assert_same(other, before)


@pytest.mark.parametrize(
    "preset, mode", [("linear", "exact"), ("linear", "center"), ("paper", "exact")]
)
def test_merged_models_of_any_host_reload(preset, mode, tmp_path):
    model = nn.Sequential(adapted_encoder(preset=preset), nn.Conv2d(16, 2, 1)).eval()
    merge(model, mode)
    save_merged(model, tmp_path)
    other = nn.Sequential(build_encoder(), nn.Conv2d(16, 2, 1)).eval()
    load_merged(other, tmp_path)
    assert_same(other, state_of(model))
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))
    with pytest.raises(UserError, match=r"it was read from a file.*load_adapter"):
        unmerge(other)
    with pytest.raises(UserError, match="nothing to merge: the model was merged before"):
        merge(other)
    with pytest.raises(UserError, match="the model is merged"):
        save_adapter(other, tmp_path)
    with pytest.raises(UserError, match="needs the original model"):
        load_merged(other, tmp_path)
    save_merged(other, tmp_path / "again")
    for name in (MERGED_CONFIG, MERGED_WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_shared_tensors_are_stored_once(tmp_path):
    def build() -> nn.Module:
        model = nn.Module()
        model.first, model.second = nn.Linear(2, 2), nn.Linear(2, 2)
        model.second.weight = model.first.weight
        model.encoder = build_encoder()
        return model

    model = build()
    inject(model, NASLoRAConfig())
    merge(model)
    save_merged(model, tmp_path)
    other = build()
    load_merged(other, tmp_path)
    assert_same(other, state_of(model))
    assert other.first.weight is other.second.weight


def drop_tensor(folder):
    tensors = load_file(folder / MERGED_WEIGHTS)
    del tensors["pos_embed"]
    save_file(tensors, folder / MERGED_WEIGHTS)


def add_tensor(folder):
    tensors = load_file(folder / MERGED_WEIGHTS)
    save_file({**tensors, "extra": torch.zeros(1)}, folder / MERGED_WEIGHTS)


def resize_tensor(folder):
    tensors = load_file(folder / MERGED_WEIGHTS)
    save_file({**tensors, "pos_embed": torch.zeros(1)}, folder / MERGED_WEIGHTS)


def shift_tensor(folder):
    tensors = load_file(folder / MERGED_WEIGHTS)
    save_file({**tensors, "pos_embed": tensors["pos_embed"] + 1}, folder / MERGED_WEIGHTS)


@pytest.mark.parametrize(
    "damage, message",
    [
        (drop_tensor, "pos_embed is missing in the file"),
        (add_tensor, "extra is not in the model"),
        (resize_tensor, r"pos_embed has shape \(1,\) in the file, \(1, 4, 4, 32\) in the model"),
        (lambda folder: (folder / MERGED_CONFIG).unlink(), f"{MERGED_CONFIG} does not exist"),
        (lambda folder: (folder / MERGED_CONFIG).write_text("{}"), "describes no merged model"),
        (lambda folder: (folder / MERGED_CONFIG).write_text("[]"), "describes no merged model"),
        (shift_tensor, "holds other weights than merged.json says: use the files of one merge"),
        (
            lambda folder: (folder / MERGED_CONFIG).write_text('{"layers": ["body.0"]}'),
            "it has no nn.Linear body.0",
        ),
    ],
)
def test_damaged_merged_models_leave_the_model_alone(damage, message, tmp_path):
    model = adapted_encoder()
    merge(model)
    save_merged(model, tmp_path)
    damage(tmp_path)
    other = build_encoder()
    modules, before = dict(other.named_modules()), state_of(other)
    with pytest.raises(UserError, match=message) as error:
        load_merged(other, tmp_path)
    assert "\n" not in str(error.value)
    assert dict(other.named_modules()) == modules
    assert_same(other, before)
    load_adapter_after(other, tmp_path)


def load_adapter_after(model: nn.Module, folder) -> None:
    """A refused ``load_merged`` leaves no mark of a merge."""
    save_adapter(adapted_encoder(), folder / "adapter")
    load_adapter(model, folder / "adapter")


def test_only_merged_models_are_saved_as_merged(tmp_path):
    for model in (adapted_encoder(), build_encoder()):
        with pytest.raises(UserError, match="the model is not merged: call merge first"):
            save_merged(model, tmp_path)
    with pytest.raises(UserError, match="needs the original model"):
        load_merged(adapted_encoder(), tmp_path)


@pytest.mark.parametrize("model", [None, {}])
def test_saving_no_model_is_refused(model, tmp_path):
    for function in (
        lambda: save_adapter(model, tmp_path),
        lambda: load_adapter(model, tmp_path),
        lambda: save_merged(model, tmp_path),
        lambda: load_merged(model, tmp_path),
        lambda: base_state_dict(model),
        lambda: load_base_state_dict(model, {}),
    ):
        with pytest.raises(UserError, match=r"^model must be a torch\.nn\.Module, got "):
            function()


# ---------------------------------------------------------------- the base's state dict


def test_the_base_state_dict_is_the_original_one():
    model = build_encoder()
    before = state_of(model)
    inject(model, NASLoRAConfig())
    randomize(model)
    state = base_state_dict(model)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    build_encoder().load_state_dict(state, strict=True)
    assert (
        state["blocks.0.attn.qkv.weight"].data_ptr() == model.blocks[0].attn.qkv.weight.data_ptr()
    )


def test_original_checkpoints_load_after_inject():
    original = build_encoder()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.1)
    state = original.state_dict()
    expected = adapted_encoder()
    expected_keys = expected.load_state_dict(
        {(k.replace("qkv.", "qkv.base.")): v for k, v in state.items()}, strict=False
    )
    by_function, by_torch = adapted_encoder(), adapted_encoder()
    keys = load_base_state_dict(by_function, state)
    assert keys == ([], [])
    torch_keys = by_torch.load_state_dict(state, strict=False)
    assert torch_keys == expected_keys and not torch_keys.unexpected_keys
    assert all("base" not in name for name in torch_keys.missing_keys)
    assert_same(by_function, state_of(expected))
    assert_same(by_torch, state_of(expected))
    strict = {**adapted_encoder().state_dict(), **state}
    for name in [name for name in strict if ".base." in name]:
        del strict[name]
    again = adapted_encoder()
    again.load_state_dict(strict)
    assert_same(again, state_of(expected))
    layer = again.blocks[0].attn.qkv
    layer.load_state_dict(original.blocks[0].attn.qkv.state_dict(), strict=False)
    assert torch.equal(layer.weight, original.blocks[0].attn.qkv.weight)


def test_injected_state_dicts_load_as_before():
    model, other = adapted_encoder(), adapted_encoder(seed=4)
    other.load_state_dict(model.state_dict())
    assert_same(other, state_of(model))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("pos_embed"), "it lacks pos_embed; the model lacks nothing"),
        (lambda s: s.update(extra=torch.zeros(1)), "it lacks nothing; the model lacks extra"),
        (lambda s: s.update(pos_embed=torch.zeros(1)), r"pos_embed has shape \(1,\)"),
        (lambda s: s.update(pos_embed=3), "state must be a state dict"),
    ],
)
def test_other_checkpoints_are_refused(change, message):
    model = adapted_encoder()
    before = state_of(model)
    state = {name: value + 1 for name, value in build_encoder().state_dict().items()}
    change(state)
    with pytest.raises(UserError, match=message):
        load_base_state_dict(model, state)
    assert_same(model, before)


def test_a_part_of_a_checkpoint_loads_if_not_strict():
    model = adapted_encoder()
    keys = load_base_state_dict(
        model, {"pos_embed": model.pos_embed + 1, "x": model.pos_embed}, False
    )
    assert keys.unexpected_keys == ["x"]
    assert set(keys.missing_keys) == set(build_encoder().state_dict()) - {"pos_embed"}
    assert_close(model.pos_embed, build_encoder().pos_embed + 1)
    with pytest.raises(UserError, match="state must be a state dict"):
        load_base_state_dict(model, None)


def test_no_base_state_dict_of_merged_models_and_of_other_methods():
    model = adapted_encoder()
    merge(model, "center")
    with pytest.raises(UserError, match=r"the model is merged.*call unmerge first"):
        base_state_dict(model)
    other = build_encoder()
    methods.apply("bitfit", other)
    with pytest.raises(UserError, match="adapted with method bitfit; only models with NAS-LoRA"):
        base_state_dict(other)


def test_trained_state_is_named_as_in_the_model():
    model = trained_encoder()
    assert trained_state(model).keys() <= model.state_dict().keys()


# ---------------------------------------------------------------- Transformers


def build_hugging_face_sam() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from transformers.models.sam import configuration_sam as configurations

    vision = transformers.SamVisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        window_size=3,
        global_attn_indexes=[1],
        mlp_dim=64,
        num_pos_feats=8,
    )
    prompts = configurations.SamPromptEncoderConfig(
        hidden_size=16, image_size=SIZE, patch_size=16, mask_input_channels=4
    )
    decoder = configurations.SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16
    )
    torch.manual_seed(0)
    config = transformers.SamConfig(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder
    )
    return transformers.SamModel(config).eval()


def trained_hugging_face_sam() -> nn.Module:
    model = build_hugging_face_sam()
    inject(model, NASLoRAConfig())
    randomize(model)
    model.mask_decoder.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.mask_decoder.parameters():
            parameter.add_(0.02)
    return model


def masks(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        points = torch.full((2, 1, 1, 2), 20.0)
        return model(pixel_values=images(), input_points=points).pred_masks


def reload(model: nn.Module, folder) -> nn.Module:
    """What from_pretrained reads, with the adapter from the folder beside it."""
    read, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    load_adapter(read, folder / ADAPTER_FOLDER)
    return read.eval()


def test_save_pretrained_is_a_round_trip(tmp_path):
    model = trained_hugging_face_sam()
    expected = masks(model)
    before = state_of(model)
    model.save_pretrained(tmp_path)
    assert_same(model, before)
    read = reload(model, tmp_path)
    assert_same(read, before)
    assert torch.equal(masks(read), expected)
    stored = json.loads((tmp_path / ADAPTER_FOLDER / CONFIG_NAME).read_text())
    assert stored["layers"] == [name for name, _ in adapter_layers(model)]
    # The adapter alone, on the original model.
    alone = build_hugging_face_sam()
    load_adapter(alone, tmp_path / ADAPTER_FOLDER)
    assert torch.equal(masks(alone), expected)
    # What was read saves as the trained model did.
    read.save_pretrained(tmp_path / "again")
    first, second = [load_file(f / "model.safetensors") for f in (tmp_path, tmp_path / "again")]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_a_trainer_resumes_from_loads(tmp_path):
    """The Trainer passes model.safetensors to load_state_dict."""
    model = trained_hugging_face_sam()
    model.save_pretrained(tmp_path)
    other = build_hugging_face_sam()
    inject(other, seed=4)
    keys = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    shared = {"prompt_encoder.shared_embedding.positional_embedding"}  # stored once by Transformers
    assert set(keys.missing_keys) <= shared and not keys.unexpected_keys
    assert torch.equal(masks(other), masks(model))


def test_copies_save_themselves(tmp_path):
    model = trained_hugging_face_sam()
    before = state_of(model)
    for i, twin in enumerate([copy.deepcopy(model), pickle.loads(pickle.dumps(model))]):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        twin.save_pretrained(tmp_path / str(i))
        assert_same(reload(twin, tmp_path / str(i)), before)
        load_base_state_dict(model, base_state_dict(twin))
        model.load_state_dict(before)


def test_save_pretrained_writes_the_given_state(tmp_path):
    """Accelerate gathers it, and the first process alone saves it."""
    model = trained_hugging_face_sam()
    state = {name: value + 1 for name, value in model.state_dict().items()}
    expected = dict(state)
    model.save_pretrained(tmp_path, state_dict=state)
    read = reload(model, tmp_path)
    assert all(torch.equal(read.state_dict()[name], value) for name, value in expected.items())
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").iterdir())


def test_save_pretrained_after_a_merge(tmp_path):
    model = trained_hugging_face_sam()
    merge(model, "exact")
    with pytest.raises(UserError, match=r"mode 'exact': call naslora\.save_merged") as error:
        model.save_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    unmerge(model)
    model.save_pretrained(tmp_path / "adapted")
    merge(model, "center")
    with pytest.raises(UserError, match=r"holds the adapter of an earlier save.*another folder"):
        model.save_pretrained(tmp_path / "adapted")
    model.save_pretrained(tmp_path / "center")
    read, info = type(model).from_pretrained(tmp_path / "center", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(masks(read.eval()), masks(model))
    unmerge(model)
    model.save_pretrained(tmp_path / "unmerged")
    assert torch.equal(masks(reload(model, tmp_path / "unmerged")), masks(model))


def test_save_pretrained_names_the_right_call(tmp_path):
    model = trained_hugging_face_sam()
    with pytest.raises(UserError, match=r"call model\.push_to_hub\(repo_id\)"):
        model.save_pretrained(tmp_path, push_to_hub=True)

    class Host(nn.Module):
        """A model of another library, such as one with huggingface_hub's mixin."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = build_encoder()

        def save_pretrained(self, save_directory) -> None:
            save_file(self.state_dict(), save_directory / "model.safetensors")

    host = Host()
    inject(host, NASLoRAConfig())
    with pytest.raises(UserError, match=r"Host\.save_pretrained .* call naslora.save_adapter"):
        host.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_loaded_or_applied_overrides_save_pretrained_too(tmp_path):
    model = trained_hugging_face_sam()
    save_adapter(model, tmp_path / "adapter")
    loaded = build_hugging_face_sam()
    load_adapter(loaded, tmp_path / "adapter")
    loaded.save_pretrained(tmp_path / "loaded")
    assert torch.equal(masks(reload(loaded, tmp_path / "loaded")), masks(model))
