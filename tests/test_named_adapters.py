"""Several adapters on one model; BitFit on models of other libraries."""

import copy
import pickle

import pytest
import torch
from adapted_models import adapted_encoder, build_encoder, images, randomize, stir
from conftest import error_of
from hugging_face import build_sam
from torch import nn

from naslora import (
    NASLoRAConfig,
    active_adapter,
    adapter_parameters,
    add_adapter,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)
from naslora.methods import apply, trainable_parameters

SECOND = NASLoRAConfig(rank=4, target=r"attn\.(qkv|proj)$")


def two_adapters() -> nn.Module:
    """An encoder with the adapters "default" and "second", which is active."""
    model = adapted_encoder(target="qkv")
    add_adapter(model, "second", SECOND, seed=1)
    set_adapter(model, "second")
    randomize(model, seed=7)
    return model


def alone() -> nn.Module:
    """The second adapter on a model of its own."""
    model = build_encoder()
    inject(model, SECOND, seed=1)
    randomize(model, seed=7)
    return model


def test_each_adapter_computes_as_if_it_were_alone():
    model = two_adapters()
    plain, first, second = build_encoder(), adapted_encoder(target="qkv"), alone()
    assert torch.equal(model(images()), second(images()))
    frozen = model.blocks[0].attn.qkv.base
    set_adapter(model, "default")
    assert model.blocks[0].attn.qkv.base is frozen and not frozen.weight.requires_grad
    assert torch.equal(model(images()), first(images()))
    assert list(model.state_dict()) == list(first.state_dict())
    with disable_adapter(model):
        assert torch.equal(model(images()), plain(images()))
        assert list(model.state_dict()) == list(plain.state_dict())
        assert active_adapter(model) is None
    assert torch.equal(model(images()), first(images()))
    assert active_adapter(model) == "default"
    # An inactive adapter follows the model.
    model.double().train()
    set_adapter(model, "second")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_adapters_of_their_own(copied):
    model = two_adapters()
    twin = copied(model)
    set_adapter(twin, "default")
    assert active_adapter(model) == "second"
    assert torch.equal(twin(images()), adapted_encoder(target="qkv")(images()))
    with torch.no_grad():
        for parameter in adapter_parameters(twin):
            parameter.zero_()
    set_adapter(model, "default")
    assert torch.equal(model(images()), adapted_encoder(target="qkv")(images()))


def test_saving_takes_the_active_adapter(tmp_path):
    model = two_adapters()
    save_adapter(model, tmp_path / "second")
    set_adapter(model, "default")
    save_adapter(model, tmp_path / "default")
    for name, expected in (("second", alone()), ("default", adapted_encoder(target="qkv"))):
        fresh = build_encoder()
        load_adapter(fresh, tmp_path / name)
        assert torch.equal(fresh(images()), expected(images()))


def test_disabling_survives_errors_and_nests():
    model = two_adapters()
    with pytest.raises(RuntimeError), disable_adapter(model), disable_adapter(model):
        raise RuntimeError
    assert active_adapter(model) == "second"
    with disable_adapter(model):
        set_adapter(model, "default")
        assert "already" in error_of(inject, model)
        add_adapter(model, "third")
    assert active_adapter(model) == "default"


def test_refusals(tmp_path):
    plain, model = build_encoder(), two_adapters()
    assert active_adapter(plain) is None
    applied, merged, expected = build_encoder(), two_adapters(), model(images())
    apply("nas-pc-lora", applied)
    merge(merged)
    nothing = NASLoRAConfig(target="nothing")
    for call, message in (
        (lambda: set_adapter(plain, "default"), "no NAS-LoRA layers; call inject"),
        (lambda: add_adapter(plain, "second"), "no NAS-LoRA layers; call inject"),
        (lambda: set_adapter(model, "third"), "adapters, default, second, got 'third'"),
        (lambda: add_adapter(model, "second"), "an adapter 'second' already"),
        (lambda: add_adapter(model, ""), "name must be"),
        (lambda: add_adapter(model, "third", {}), "config: expected a NASLoRAConfig"),
        (lambda: add_adapter(model, "third", nothing), "no layer matches"),
        (lambda: add_adapter(applied, "second"), "needs a model of inject"),
        (lambda: set_adapter(merged, "default"), "merged; call unmerge"),
        (lambda: add_adapter(merged, "third"), "merged; call unmerge"),
        (lambda: disable_adapter(merged).__enter__(), "merged; call unmerge"),
    ):
        before = [id(m) for m in model.modules()]
        assert message in error_of(call)
        assert [id(m) for m in model.modules()] == before
    assert torch.equal(model(images()), expected) and active_adapter(model) == "second"
    unmerge(merged)
    set_adapter(merged, "default")
    assert torch.equal(merged(images()), adapted_encoder(target="qkv")(images()))
    # The layers are away then, so a file would hold the rest of what trains, and no adapter.
    model.neck.requires_grad_(True)
    with disable_adapter(model):
        assert "outside of disable_adapter" in error_of(save_adapter, model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bitfit_trains_the_vision_encoder_alone(tmp_path):
    """The silent loss: the biases of the prompt encoder and the mask decoder trained, too."""
    model, fresh = build_sam(), build_sam()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    apply("bitfit", model)
    for name, parameter in model.named_parameters():
        encoder = name.startswith("vision_encoder.")
        assert parameter.requires_grad == (name.endswith(".bias") if encoder else before[name])
    biases = [n for n in before if n.startswith("vision_encoder.") and n.endswith(".bias")]
    assert len(trainable_parameters(model)) == len(biases)
    stir(trainable_parameters(model), 1.0)
    model.mask_decoder.requires_grad_(False)
    save_adapter(model, tmp_path)
    load_adapter(fresh, tmp_path)
    found, expected = (one.get_image_embeddings(images())[0] for one in (fresh, model))
    assert torch.equal(found, expected)
