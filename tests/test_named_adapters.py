"""Several adapters on one model; BitFit on models of other libraries."""

import copy
import pickle

import pytest
import torch
from adapted_models import adapted_encoder, build_encoder, images, randomize
from torch import nn

from naslora import (
    NASLoRAConfig,
    UserError,
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
from naslora.adapter.modules import adapter_layers
from naslora.methods import apply, trainable_parameters

SECOND = NASLoRAConfig(rank=4, target=r"attn\.(qkv|proj)$")


def two_adapters() -> nn.Module:
    """An encoder with the adapters "default" and "second", which is active."""
    model = adapted_encoder()
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
    plain, first, second = build_encoder(), adapted_encoder(), alone()
    assert torch.equal(model(images()), second(images()))
    set_adapter(model, "default")
    assert torch.equal(model(images()), first(images()))
    assert list(model.state_dict()) == list(first.state_dict())
    with disable_adapter(model):
        assert torch.equal(model(images()), plain(images()))
        assert list(model.state_dict()) == list(plain.state_dict())
        assert active_adapter(model) is None
    assert torch.equal(model(images()), first(images()))
    assert active_adapter(model) == "default"


def test_adding_changes_nothing_yet():
    model = adapted_encoder()
    before, expected = [id(m) for m in model.modules()], model(images())
    names = add_adapter(model, "second", SECOND, seed=1)
    assert names == [f"blocks.{i}.attn.{name}" for i in (0, 1) for name in ("qkv", "proj")]
    assert [id(m) for m in model.modules()] == before and active_adapter(model) == "default"
    assert torch.equal(model(images()), expected)


def test_adapters_share_the_frozen_layers():
    model = two_adapters()
    second = model.blocks[0].attn.qkv
    set_adapter(model, "default")
    assert model.blocks[0].attn.qkv.base is second.base
    assert not second.base.weight.requires_grad


def test_adapters_train_in_turn():
    model = two_adapters().train()
    optimizers = {}
    for name in ("default", "second"):
        set_adapter(model, name)
        optimizers[name] = torch.optim.SGD(adapter_parameters(model), lr=0.1)
    for step in range(4):
        name = ("default", "second")[step % 2]
        set_adapter(model, name)
        others = [
            p.clone() for p in optimizers[("second", "default")[step % 2]].param_groups[0]["params"]
        ]
        model(images(step)).square().mean().backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        after = optimizers[("second", "default")[step % 2]].param_groups[0]["params"]
        assert all(torch.equal(p, q) for p, q in zip(others, after, strict=True))
        assert all(layer.training for layer in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_adapters_of_their_own(copied):
    model = two_adapters()
    twin = copied(model)
    set_adapter(twin, "default")
    assert active_adapter(model) == "second"
    assert torch.equal(twin(images()), adapted_encoder()(images()))
    with torch.no_grad():
        for parameter in adapter_parameters(twin):
            parameter.zero_()
    set_adapter(model, "default")
    assert torch.equal(model(images()), adapted_encoder()(images()))


def test_an_inactive_adapter_follows_the_model():
    model = two_adapters().double()
    model.train()
    set_adapter(model, "default")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(module.training for module in model.modules())


def test_saving_takes_the_active_adapter(tmp_path):
    model = two_adapters()
    save_adapter(model, tmp_path / "second")
    set_adapter(model, "default")
    save_adapter(model, tmp_path / "default")
    for name, expected in (("second", alone()), ("default", adapted_encoder())):
        fresh = build_encoder()
        load_adapter(fresh, tmp_path / name)
        assert torch.equal(fresh(images()), expected(images()))


def test_a_deep_copy_that_was_unmerged_still_switches():
    model = two_adapters()
    x = images()
    second = model(x)
    merge(model, "center")
    twin = copy.deepcopy(model)
    unmerge(twin)
    set_adapter(twin, "default")
    set_adapter(twin, "second")
    assert torch.equal(twin(x), second)
    bases = {id(layer.base) for _, layer in adapter_layers(twin)}
    set_adapter(twin, "default")
    assert {id(layer.base) for _, layer in adapter_layers(twin)} < bases


def test_saving_while_disabled_is_refused(tmp_path):
    """The layers are away then, so the file would hold the rest of what trains, and no adapter."""
    model = two_adapters()
    model.neck.requires_grad_(True)
    with disable_adapter(model), pytest.raises(UserError, match="outside of disable_adapter"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_merged_adapter_must_be_unmerged_first():
    model = two_adapters()
    merge(model)
    for call in (
        lambda: set_adapter(model, "default"),
        lambda: add_adapter(model, "third"),
        lambda: disable_adapter(model).__enter__(),
    ):
        with pytest.raises(UserError, match="merged; call unmerge"):
            call()
    unmerge(model)
    set_adapter(model, "default")
    assert torch.equal(model(images()), adapted_encoder()(images()))


def test_disabling_survives_errors_and_nests():
    model = two_adapters()
    with pytest.raises(RuntimeError), disable_adapter(model), disable_adapter(model):
        raise RuntimeError
    assert active_adapter(model) == "second"
    with disable_adapter(model):
        set_adapter(model, "default")
        with pytest.raises(UserError, match="already"):
            inject(model)
        with pytest.raises(UserError, match="outside of disable_adapter"):
            add_adapter(model, "third")
    assert active_adapter(model) == "default"


def test_a_compiled_model_switches():
    model = two_adapters()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(images()), model(images()))
    set_adapter(compiled, "default")
    torch.testing.assert_close(compiled(images()), adapted_encoder()(images()))


def test_refusals():
    plain, model = build_encoder(), two_adapters()
    assert active_adapter(plain) is None
    applied = build_encoder()
    apply("nas-pc-lora", applied)
    for call, message in (
        (lambda: set_adapter(plain, "default"), "no NAS-LoRA layers; call inject"),
        (lambda: add_adapter(plain, "second"), "no NAS-LoRA layers; call inject"),
        (lambda: set_adapter(model, "third"), "adapters, default, second, got 'third'"),
        (lambda: add_adapter(model, "second"), "an adapter 'second' already"),
        (lambda: add_adapter(model, ""), "name must be"),
        (lambda: add_adapter(model, "third", {}), "config must be a NASLoRAConfig"),
        (lambda: add_adapter(None, "third"), "model must be a torch.nn.Module"),
        (lambda: add_adapter(applied, "second"), "needs a model of inject"),
    ):
        before = [id(m) for m in model.modules()]
        with pytest.raises(UserError, match=message):
            call()
        assert [id(m) for m in model.modules()] == before


def test_a_failed_addition_leaves_the_model_as_it_was():
    model = two_adapters()
    expected = model(images())
    with pytest.raises(UserError, match="no layer matches"):
        add_adapter(model, "third", NASLoRAConfig(target="nothing"))
    assert torch.equal(model(images()), expected) and active_adapter(model) == "second"


# ---- Encoders of Hugging Face --------------------------------------------------------------------


def hugging_face_sam() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.SamModel(
        transformers.SamConfig(
            vision_config={
                "hidden_size": 16,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 64,
                "mlp_dim": 16,
                "window_size": 3,
                "global_attn_indexes": [1],
            },
            prompt_encoder_config={"hidden_size": 16, "image_size": 64},
            mask_decoder_config={
                "hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2,
                "iou_head_hidden_dim": 16,
            },
        )
    )  # fmt: skip


def test_bitfit_trains_the_vision_encoder_alone():
    """The silent loss: the biases of the prompt encoder and the mask decoder trained, too."""
    model = hugging_face_sam()
    others = {
        name: p.requires_grad
        for name, p in model.named_parameters()
        if not name.startswith("vision_encoder.")
    }
    apply("bitfit", model)
    parameters = dict(model.named_parameters())
    assert {name: parameters[name].requires_grad for name in others} == others
    encoder = [n for n in parameters if n.startswith("vision_encoder.")]
    assert {n for n in encoder if parameters[n].requires_grad} == {
        n for n in encoder if n.endswith(".bias")
    }
    assert len(trainable_parameters(model)) == sum(n.endswith(".bias") for n in encoder)


def test_bitfit_on_a_vision_encoder_is_saved_and_loaded(tmp_path):
    model, fresh = hugging_face_sam(), hugging_face_sam()
    apply("bitfit", model)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(1.0)
    model.mask_decoder.requires_grad_(False)
    save_adapter(model, tmp_path)
    load_adapter(fresh, tmp_path)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fresh.get_image_embeddings(x)[0], model.get_image_embeddings(x)[0])


def test_two_adapters_on_a_model_of_hugging_face():
    model = hugging_face_sam().eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def embed():
        return model.vision_encoder(x).last_hidden_state

    plain = embed()
    inject(model, train="mask_decoder")
    randomize(model)
    first = embed()
    add_adapter(model, "second", SECOND, seed=1)
    assert torch.equal(embed(), first)
    set_adapter(model, "second")
    torch.testing.assert_close(embed(), plain)  # a fresh adapter adds zero
    set_adapter(model, "default")
    assert torch.equal(embed(), first)
    assert all(parameter.requires_grad for parameter in model.mask_decoder.parameters())
