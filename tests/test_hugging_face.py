"""SamModel and Sam2Model of transformers: files, and several adapters."""

import pytest
import torch

pytest.importorskip("transformers")

from adapted_models import randomize
from hugging_face import BUILDERS, batch_loss, batch_of, build_sam, logits, trained

from naslora import (
    NASLoRAConfig,
    adapter_parameters,
    add_adapter,
    base_state_dict,
    inject,
    merge,
    save_adapter,
    set_adapter,
)
from naslora.integrations.hub import from_pretrained

every_model = pytest.mark.parametrize("name", BUILDERS)


@every_model
def test_files_round_trip(name, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path / "all")
    assert torch.equal(logits(from_pretrained(type(model), tmp_path / "all")), logits(model))
    # Transformers alone finds every tensor of the base.
    plain, report = type(model).from_pretrained(tmp_path / "all", output_loading_info=True)
    assert not report["missing_keys"]
    expected = base_state_dict(model)
    assert not [n for n, v in plain.state_dict().items() if not torch.equal(v, expected[n])]
    save_adapter(model, tmp_path / "adapter")
    fresh = BUILDERS[name]()
    assert not torch.equal(logits(fresh), logits(model))
    assert torch.equal(logits(from_pretrained(fresh, tmp_path / "adapter")), logits(model))


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
    inject(together, configs["default"], train="prompt_encoder", seed=1)
    add_adapter(together, "second", configs["second"], seed=2)
    optimizers = {}
    for adapter, config in configs.items():
        set_adapter(together, adapter)
        optimizers[adapter] = torch.optim.Adam(adapter_parameters(together), lr=1e-2)
        apart[adapter] = BUILDERS[name]()
        inject(apart[adapter], config, seed=1 if adapter == "default" else 2)
    for _ in range(3):
        for adapter in configs:
            set_adapter(together, adapter)
            step(together, batches[adapter], optimizers[adapter])
    assert all(parameter.requires_grad for parameter in together.prompt_encoder.parameters())
    for adapter, alone in apart.items():
        optimizer = torch.optim.Adam(adapter_parameters(alone), lr=1e-2)
        for _ in range(3):
            step(alone, batches[adapter], optimizer)
        set_adapter(together, adapter)
        assert torch.equal(logits(together), logits(alone))


def step(model, batch, optimizer) -> None:
    model.train()
    optimizer.zero_grad()
    batch_loss(model, batch).backward()
    optimizer.step()
