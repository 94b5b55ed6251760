"""Adapters and merges of models inside wrappers, and of models that FSDP2 shards."""

import os

import adapted_models
import pytest
import torch
from adapted_models import (
    adapted_encoder,
    build_encoder,
    differing,
    images,
    outputs,
    randomize,
    shard,
    snapshot,
)
from conftest import error_of, in_two_processes
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from naslora import (
    NASLoRAConfig,
    base_state_dict,
    inject,
    load_adapter,
    load_base_state_dict,
    load_merged,
    merge,
    save_adapter,
    save_merged,
    unmerge,
)
from naslora.adapter.io.storage import CONFIG_NAME, WEIGHTS_NAME
from naslora.adapter.io.wrappers import unwrap


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_parts(model: nn.Module) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = compiled(block)
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    """The state dict has no trace of this wrapper, but the names of modules do."""
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.blocks[1].attn.qkv = checkpoint_wrapper(model.blocks[1].attn.qkv)
    return model


WRAPPERS = {
    "DDP": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compile": compiled,
    "compiled blocks": compiled_parts,
    "checkpointed": checkpointed,
}


def trained_encoder(**options) -> nn.Module:
    model = adapted_models.trained_encoder(**options)
    # DDP breaks when a model loses its last buffer, as this one would when it is merged.
    model.register_buffer("pixel_mean", torch.zeros(3), persistent=False)
    return model


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_adapters_of_wrapped_models_are_those_of_bare_ones(wrap, tmp_path, single_process_group):
    plain = trained_encoder()
    save_adapter(plain, tmp_path / "plain")
    wrapped = wrap(trained_encoder())
    save_adapter(wrapped, tmp_path / "wrapped")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        files = [(tmp_path / folder / name).read_bytes() for folder in ("plain", "wrapped")]
        assert files[0] == files[1]
    expected = outputs(plain)
    bare_again = build_encoder()
    load_adapter(bare_again, tmp_path / "wrapped")
    assert torch.equal(outputs(bare_again), expected)
    other = trained_encoder(seed=7)
    randomize(other, 9)
    other = wrap(other)
    assert not torch.equal(outputs(unwrap(other)), expected)
    load_adapter(other, tmp_path / "plain")
    assert torch.equal(outputs(unwrap(other)), expected)
    unadapted = build_encoder()
    if wrap is nn.parallel.DistributedDataParallel:  # it refuses models without gradients
        unadapted.neck.requires_grad_(True)
    unadapted = wrap(unadapted) if wrap is not checkpointed else unadapted
    load_adapter(unadapted, tmp_path / "plain")
    assert torch.equal(outputs(unwrap(unadapted)), expected)


def test_a_part_called_module_keeps_its_name(tmp_path):
    """Only wrappers are stripped, not models that call a part of them `module`."""
    host = nn.Module()
    host.module = build_encoder()
    inject(host, NASLoRAConfig())
    assert unwrap(host) is host
    save_adapter(host, tmp_path)
    assert all(name.startswith("module.blocks.") for name in load_file(tmp_path / WEIGHTS_NAME))
    load_adapter(host, tmp_path)


# Two wrappers for each mode.
MODES = 2 * ["exact", "center", "calibrated"]


@pytest.mark.parametrize("wrap, mode", zip(WRAPPERS.values(), MODES, strict=True), ids=WRAPPERS)
def test_wrapped_models_merge(wrap, mode, tmp_path, single_process_group):
    batches = [images(seed) for seed in range(4)]
    plain = trained_encoder().eval()
    before = outputs(plain)
    expected = merge(plain, mode, batches)
    model = wrap(trained_encoder()).eval()
    modules = snapshot(model)["modules"]
    outputs(unwrap(model))  # compiles
    report = merge(model, mode, batches)
    assert [e.update_error for e in report.layers] == [e.update_error for e in expected.layers]
    assert torch.equal(outputs(model), outputs(plain))
    save_merged(model, tmp_path)
    loaded = build_encoder()
    load_merged(loaded, tmp_path)
    assert torch.equal(outputs(loaded), outputs(plain))
    unmerge(model)
    assert snapshot(model)["modules"] == modules
    assert torch.equal(outputs(model), before)


def test_fsdp1_is_refused(single_process_group):
    class FullyShardedDataParallel(nn.Sequential):
        """Stands for torch's, which needs a GPU."""

    model = FullyShardedDataParallel(adapted_encoder())
    assert "use fully_shard (FSDP2)" in error_of(save_adapter, model, "never")


# ---------------------------------------------------------------- FSDP2


def check_fsdp2(folder, parts: bool) -> None:
    """Saves and loads, on every process."""
    plain = trained_encoder().eval()
    model = shard(trained_encoder().eval(), parts)
    expected = outputs(plain)
    assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    save_adapter(model, folder / "adapter")
    assert torch.equal(outputs(model), expected)  # the root stays gathered after this
    save_adapter(model, folder / "gathered")
    for name in ("adapter", "gathered"):
        loaded = build_encoder()
        load_adapter(loaded, folder / name)
        assert torch.equal(outputs(loaded), expected)
    other = shard(randomized := trained_encoder(seed=3).eval(), parts)
    with torch.no_grad():
        randomized.neck[0].weight.mul_(2.0)
    assert not torch.equal(outputs(other), expected)
    load_adapter(other, folder / "adapter")
    assert torch.equal(outputs(other), expected)
    original = build_encoder().state_dict()
    state, bare = base_state_dict(model), base_state_dict(plain)
    assert state.keys() == original.keys()
    assert all(value.shape == bare[name].shape for name, value in state.items())
    load_base_state_dict(other, original)
    assert not differing(base_state_dict(other), original)
    assert "sharded" in error_of(merge, model)


@pytest.mark.parametrize("parts", [True, False], ids=["blocks", "root"])
def test_fsdp2_on_one_process(parts, tmp_path, single_process_group):
    check_fsdp2(tmp_path, parts)


def test_fsdp2_on_two_processes(tmp_path):
    in_two_processes(lambda rank: check_fsdp2(tmp_path, True), tmp_path)
    assert sorted(os.listdir(tmp_path / "adapter")) == [CONFIG_NAME, WEIGHTS_NAME]
