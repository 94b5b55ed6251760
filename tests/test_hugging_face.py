"""SamModel and Sam2Model of transformers: files, and several adapters."""

import pytest
import torch

pytest.importorskip("transformers")

from naslora import (
    NASLoRAConfig,
    add_adapter,
    base_state_dict,
    inject,
    merge,
    save_adapter,
    set_adapter,
    weight_parameters,
)
from naslora.integrations.hub import from_pretrained
from tests.adapted_models import randomize
from tests.hugging_face import batch_loss, batch_of, build_sam, build_sam2, logits

BUILDERS = {"SamModel": build_sam, "Sam2Model": build_sam2}
every_model = pytest.mark.parametrize("name", BUILDERS)


def trained(name: str):
    """An injected model whose adapter and decoder differ from the start."""
    model = BUILDERS[name]()
    inject(model, NASLoRAConfig(), train=("mask_decoder",))
    randomize(model)
    with torch.no_grad():
        for parameter in model.mask_decoder.parameters():
            parameter.add_(0.01)
    return model


@every_model
def test_save_pretrained_and_from_pretrained_round_trip(name, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path)
    again = from_pretrained(type(model), tmp_path)
    assert torch.equal(logits(again), logits(model))


@every_model
def test_transformers_alone_finds_every_tensor_of_the_base(name, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path)
    plain, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    expected = base_state_dict(model)
    assert {n for n, v in plain.state_dict().items() if not torch.equal(v, expected[n])} == set()


@every_model
def test_the_adapter_alone_round_trips(name, tmp_path):
    model = trained(name)
    save_adapter(model, tmp_path)
    fresh = BUILDERS[name]()
    assert not torch.equal(logits(fresh), logits(model))
    assert torch.equal(logits(from_pretrained(fresh, tmp_path)), logits(model))


def test_an_adapter_names_the_model_it_was_made_for(tmp_path):
    base = build_sam()
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    inject(model)
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    again = from_pretrained(type(base), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@every_model
def test_a_center_merge_saves_as_the_original_model(name, tmp_path):
    model = trained(name)
    merge(model, mode="center")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    plain, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(plain), expected)


@every_model
def test_two_adapters_switched_between_steps_train_apart(name):
    together, apart = BUILDERS[name](), {}
    configs = {"default": NASLoRAConfig(), "second": NASLoRAConfig(rank=4)}
    batches = {"default": batch_of(2, seed=1), "second": batch_of(2, seed=2)}
    inject(together, configs["default"], seed=1)
    add_adapter(together, "second", configs["second"], seed=2)
    optimizers = {}
    for adapter, config in configs.items():
        set_adapter(together, adapter)
        optimizers[adapter] = torch.optim.Adam(weight_parameters(together), lr=1e-2)
        apart[adapter] = BUILDERS[name]()
        inject(apart[adapter], config, seed=1 if adapter == "default" else 2)
    for _ in range(3):
        for adapter in configs:
            set_adapter(together, adapter)
            step(together, batches[adapter], optimizers[adapter])
    for adapter, alone in apart.items():
        optimizer = torch.optim.Adam(weight_parameters(alone), lr=1e-2)
        for _ in range(3):
            step(alone, batches[adapter], optimizer)
        set_adapter(together, adapter)
        assert torch.equal(logits(together), logits(alone))


def step(model, batch, optimizer) -> None:
    model.train()
    optimizer.zero_grad()
    batch_loss(model, batch).backward()
    optimizer.step()
