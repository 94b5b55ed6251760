"""What adapters and merged models hold on disk, and what Transformers reads of adapted models."""

import contextlib
import copy
import errno
import json
import os
import pickle
import re
import stat
from pathlib import Path
from unittest import mock

import pytest
import torch
from adapted_models import (
    adapted_encoder,
    build_encoder,
    differing,
    images,
    named,
    outputs,
    randomize,
    snapshot,
    state_of,
    stir,
    trained_encoder,
)
from conftest import error_of
from hugging_face import BUILDERS, logits, trained
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from naslora import (
    NASLoRAConfig,
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
from naslora.adapter.io.base_state import ADAPTER_FOLDER
from naslora.adapter.io.merged_files import MERGED_CONFIG, MERGED_WEIGHTS
from naslora.adapter.io.storage import CONFIG_NAME, WEIGHTS_NAME
from naslora.adapter.layer.modules import adapter_layers
from naslora.files import replaced_folder, write_text
from naslora.integrations.hub import from_pretrained


def assert_same(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert not differing(model.state_dict(), before)


# ---------------------------------------------------------------- files and folders


def test_a_folder_that_is_mounted_gets_the_files(tmp_path, monkeypatch):
    for number in (errno.EBUSY, errno.EACCES):
        monkeypatch.setattr(Path, "rmdir", mock.Mock(side_effect=OSError(number, "no")))
        with contextlib.suppress(PermissionError), replaced_folder(tmp_path) as temporary:
            (temporary / str(number)).touch()
    assert [path.name for path in tmp_path.iterdir()] == [str(errno.EBUSY)]


# ---------------------------------------------------------------- what a file holds


def saved(folder) -> set[str]:
    return set(load_file(folder / WEIGHTS_NAME))


def test_include_decides_what_is_saved(tmp_path):
    model = trained_encoder()
    linears = (".attn.qkv.", ".attn.proj.", ".mlp.lin1.", ".mlp.lin2.")
    adapter = {n for n in model.state_dict() if any(s in n for s in linears) and ".base." not in n}
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
        ("all", "include: expected list, got 'all'"),
        (["neck", "mask_decoder"], "no tensor's name matches 'mask_decoder'.*blocks, neck"),
        (["("], "include is no regular expression"),
        ([3], "include: expected str, got"),
    ],
)
def test_a_wrong_include_is_refused(include, message, tmp_path):
    assert re.search(message, error_of(save_adapter, adapted_encoder(), tmp_path, include=include))
    assert not list(tmp_path.iterdir())


def test_statistics_of_trained_norms_are_saved(tmp_path):
    def host(encoder: nn.Module) -> nn.Module:
        decoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        frozen = nn.BatchNorm2d(4).requires_grad_(False)
        return named(encoder=encoder, decoder=decoder, frozen=frozen)

    model = host(adapted_encoder())
    model.decoder.train()(images())
    save_adapter(model, tmp_path)
    names = {name for name in saved(tmp_path) if not name.startswith("encoder.")}
    assert names == {f"decoder.{name}" for name in model.decoder.state_dict()}
    other = host(build_encoder())
    load_adapter(other, tmp_path)
    assert torch.equal(outputs(other.decoder.eval()), outputs(model.decoder.eval()))


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
        line = error_of(load_adapter, model, tmp_path)
        assert "other frozen weights " in line and "pass check_base=False" in line
        assert_same(model, before)
    load_adapter(model, tmp_path, check_base=fits)


# ---------------------------------------------------------------- merged models


@pytest.mark.parametrize("mode", ["exact", "center"])
def test_saving_the_adapter_of_a_merged_model_is_refused(mode, tmp_path):
    """It would replace a good adapter by the trained decoder alone."""
    model = trained_encoder()
    save_adapter(model, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    merge(model, mode)
    parent = nn.Sequential(model)
    again = pickle.loads(pickle.dumps(model))
    for merged in (model, parent, copy.deepcopy(model), again):
        line = error_of(save_adapter, merged, tmp_path)
        assert re.search("the model is merged.* unmerge first.* save_merged", line)
        assert "the model is merged: call unmerge" in error_of(load_adapter, merged, tmp_path)
        assert re.search(
            "the model is merged.*call unmerge first", error_of(base_state_dict, merged)
        )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    unmerge(model)
    save_adapter(model, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


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
    assert torch.equal(outputs(other), outputs(model))
    assert re.search("it was read from a file.*load_adapter", error_of(unmerge, other))
    assert "nothing to merge: the model was merged before" in error_of(merge, other)
    assert "the model is merged" in error_of(save_adapter, other, tmp_path)
    assert "needs the original model" in error_of(load_merged, other, tmp_path)
    save_merged(other, tmp_path / "again")
    for name in (MERGED_CONFIG, MERGED_WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_shared_tensors_are_stored_once(tmp_path):
    def build() -> nn.Module:
        model = named(first=nn.Linear(2, 2), second=nn.Linear(2, 2), encoder=build_encoder())
        model.second.weight = model.first.weight
        return model

    model = build()
    inject(model, NASLoRAConfig())
    merge(model)
    save_merged(model, tmp_path)
    other = build()
    load_merged(other, tmp_path)
    assert_same(other, state_of(model))
    assert other.first.weight is other.second.weight


@pytest.mark.parametrize(
    "tensors, description, message",
    [
        ({"pos_embed": None}, None, "pos_embed is missing in the file"),
        ({"pos_embed": torch.zeros(1)}, None, r"pos_embed has shape \(1,\) in the file, \(1, 4, "),
        ({"pos_embed": torch.ones(1, 4, 4, 32)}, None, "holds other weights than merged.json say"),
        ({}, "", f"{MERGED_CONFIG} does not exist"),
        ({}, "[]", "describes no merged model"),
        ({}, '{"layers": ["body.0"]}', "it has no nn.Linear body.0"),
    ],
)
def test_damaged_merged_models_leave_the_model_alone(tensors, description, message, tmp_path):
    model = adapted_encoder()
    merge(model)
    save_merged(model, tmp_path)
    if tensors:
        changed = {**load_file(tmp_path / MERGED_WEIGHTS), **tensors}
        kept = {name: value for name, value in changed.items() if value is not None}
        save_file(kept, tmp_path / MERGED_WEIGHTS)
    elif description:
        (tmp_path / MERGED_CONFIG).write_text(description)
    else:
        (tmp_path / MERGED_CONFIG).unlink()
    other = build_encoder()
    before = snapshot(other)
    assert re.search(message, error_of(load_merged, other, tmp_path))
    assert snapshot(other) == before
    # A refused load leaves no mark of a merge.
    save_adapter(adapted_encoder(), tmp_path / "adapter")
    load_adapter(other, tmp_path / "adapter")


def test_models_that_cannot_be_saved_or_loaded(tmp_path):
    for make in (adapted_encoder, build_encoder):
        line = error_of(save_merged, make(), tmp_path)
        assert "the model is not merged: call merge first" in line
    assert "needs the original model" in error_of(load_merged, adapted_encoder(), tmp_path)
    model = build_encoder()
    methods.apply("bitfit", model)
    line = error_of(base_state_dict, model)
    assert "adapted with method bitfit; only models with NAS-LoRA" in line


# ---------------------------------------------------------------- the base's state dict


def test_the_base_state_dict_is_the_original_one():
    model = build_encoder()
    before = state_of(model)
    inject(model, NASLoRAConfig())
    randomize(model)
    state = base_state_dict(model)
    assert not differing(state, before)
    build_encoder().load_state_dict(state, strict=True)
    qkv = model.blocks[0].attn.qkv
    assert state["blocks.0.attn.qkv.weight"].data_ptr() == qkv.weight.data_ptr()


def test_original_checkpoints_load_after_inject():
    original = build_encoder()
    stir(original.parameters(), 0.1)
    state = original.state_dict()
    expected = adapted_encoder()
    renamed = {name.replace("qkv.", "qkv.base."): value for name, value in state.items()}
    expected_keys = expected.load_state_dict(renamed, strict=False)
    by_function, by_torch = adapted_encoder(), adapted_encoder()
    assert load_base_state_dict(by_function, state) == ([], [])
    torch_keys = by_torch.load_state_dict(state, strict=False)
    assert torch_keys == expected_keys and not torch_keys.unexpected_keys
    assert all("base" not in name for name in torch_keys.missing_keys)
    for model in (by_function, by_torch):
        assert_same(model, state_of(expected))
    # A part of a checkpoint, if not strict.
    part = {"pos_embed": by_torch.pos_embed + 1, "x": by_torch.pos_embed}
    keys = load_base_state_dict(by_torch, part, False)
    assert keys.unexpected_keys == ["x"]
    assert set(keys.missing_keys) == set(original.state_dict()) - {"pos_embed"}
    assert_close(by_torch.pos_embed, part["pos_embed"])


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
    assert re.search(message, error_of(load_base_state_dict, model, state))
    assert_same(model, before)


# ---------------------------------------------------------------- Transformers


def reload(model: nn.Module, folder) -> nn.Module:
    """What from_pretrained reads, with the adapter from the folder beside it."""
    read, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    load_adapter(read, folder / ADAPTER_FOLDER)
    return read.eval()


every_model = pytest.mark.parametrize("name", BUILDERS)


@every_model
def test_save_pretrained_is_a_round_trip(name, tmp_path):
    model = trained(name)
    before = state_of(model)
    model.save_pretrained(tmp_path)
    assert_same(model, before)
    read = reload(model, tmp_path)
    assert_same(read, before)
    assert torch.equal(logits(from_pretrained(type(model), tmp_path)), logits(model))
    stored = json.loads((tmp_path / ADAPTER_FOLDER / CONFIG_NAME).read_text())
    assert stored["layers"] == [name for name, _ in adapter_layers(model)]
    # The adapter alone, on the original model.
    alone = BUILDERS[name]()
    load_adapter(alone, tmp_path / ADAPTER_FOLDER)
    assert torch.equal(logits(alone), logits(model))
    # What was read saves as the trained model did, and so does a model with the adapter alone.
    for part, other in (("again", read), ("alone", alone)):
        other.save_pretrained(tmp_path / part)
        assert_same(reload(other, tmp_path / part), before)
    # The Trainer resumes from model.safetensors by load_state_dict.
    other = BUILDERS[name]()
    inject(other, seed=4)
    keys = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    shared = {"prompt_encoder.shared_embedding.positional_embedding"}  # stored once by Transformers
    assert set(keys.missing_keys) <= shared and not keys.unexpected_keys
    assert torch.equal(logits(other), logits(model))


def test_save_pretrained_writes_the_given_state(tmp_path):
    """Accelerate gathers it, and the first process alone saves it."""
    model = trained("SamModel")
    state = {name: value + 1 for name, value in model.state_dict().items()}
    expected = dict(state)
    model.save_pretrained(tmp_path, state_dict=state)
    read = reload(model, tmp_path)
    assert all(torch.equal(read.state_dict()[name], value) for name, value in expected.items())
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").iterdir())


@every_model
def test_save_pretrained_after_a_merge(name, tmp_path):
    model = trained(name)
    merge(model, "exact")
    line = error_of(model.save_pretrained, tmp_path)
    assert "mode 'exact': call naslora.save_merged" in line
    unmerge(model)
    model.save_pretrained(tmp_path / "adapted")
    merge(model, "center")
    model.save_pretrained(tmp_path / "center")
    read, info = type(model).from_pretrained(tmp_path / "center", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(read.eval()), logits(model))
    unmerge(model)
    model.save_pretrained(tmp_path / "unmerged")
    assert torch.equal(logits(reload(model, tmp_path / "unmerged")), logits(model))


def test_save_pretrained_names_the_right_call(tmp_path):
    model = trained("SamModel")
    line = error_of(model.save_pretrained, tmp_path, push_to_hub=True)
    assert "call model.push_to_hub(repo_id)" in line

    class Host(nn.Module):
        """A model of another library, such as one with huggingface_hub's mixin."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = build_encoder()

        def save_pretrained(self, save_directory) -> None:
            save_file(self.state_dict(), save_directory / "model.safetensors")

    host = Host()
    inject(host, NASLoRAConfig())
    line = error_of(host.save_pretrained, tmp_path)
    assert "Host.save_pretrained " in line and " call naslora.save_adapter" in line
    assert not list(tmp_path.iterdir())
