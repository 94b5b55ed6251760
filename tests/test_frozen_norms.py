"""Frozen batch norms stay in evaluation mode, whatever the host calls."""

import copy
import pickle

import pytest
import torch
from adapted_models import tokens
from timm.layers import BatchNormAct2d
from torch import nn

from naslora import NASLoRAConfig, inject, load_adapter, merge, save_adapter
from naslora.adapter.layer.modules import keep_frozen
from naslora.methods import apply
from naslora.sam.segmentation import build_model


class Host(nn.Module):
    """A host that is no model of naslora: a convolutional stem, an adapted layer, a decoder."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8, **options))
        self.qkv = nn.Linear(8, 8)
        self.decoder = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4, **options))

    def forward(self, images):
        x = self.stem(images).permute(0, 2, 3, 1)
        return self.decoder(self.qkv(x).permute(0, 3, 1, 2))


CONFIG = NASLoRAConfig(target="qkv")


def images(seed=8):
    return tokens(2, 3, 8, 8, seed=seed)


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in statistics(model).items() if not value.equal(before[name])}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d])
@pytest.mark.parametrize("affine", [True, False])
def test_a_frozen_norm_does_not_follow_the_training_images(norm, affine):
    model = Host(norm, affine=affine)
    inject(model, CONFIG, train="decoder")
    before = statistics(model)
    assert not model.stem[1].training and model.decoder[1].training
    model.train()
    model.stem.train()
    model.stem[1].train()
    assert not model.stem[1].training and model.stem[0].training
    if norm is nn.SyncBatchNorm:
        return  # it only trains on GPUs
    model(images())
    assert moved(model, before) == {"decoder.1.running_mean", "decoder.1.running_var"}


def test_an_adapter_trained_after_train_is_saved_and_loaded_whole(tmp_path):
    """The silent loss: statistics that drift are in no adapter's file."""
    model, fresh = Host(), Host()
    inject(model, CONFIG)
    model.train()
    for seed in range(3):
        model(images(seed))
    save_adapter(model, tmp_path)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.eval()(images()), model.eval()(images()))
    before = statistics(model)
    merge(model)
    model.train()(images())
    assert not moved(model, before)


def test_a_norm_that_trains_later_follows_the_next_train():
    model = Host()
    inject(model, CONFIG)
    model.decoder.requires_grad_(True)
    model.train()
    assert model.decoder[1].training
    model.eval()
    assert not model.decoder[1].training
    model.decoder.requires_grad_(False)
    model.train()
    assert not model.decoder[1].training


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_frozen(copied):
    model = Host(BatchNormAct2d)
    inject(model, CONFIG)
    twin = copied(model)
    twin.train()
    assert not twin.stem[1].training and isinstance(twin.stem[1], BatchNormAct2d)
    assert torch.equal(twin.eval()(images()), model.eval()(images()))
    keep_frozen(twin)  # does not stack
    assert type(twin.stem[1]) is type(model.stem[1])


def test_the_norms_of_the_cell_pause_while_alpha_alone_trains():
    """As in the search: its steps of alpha freeze the weights, then call ``train()``."""
    model = Host()
    inject(model, NASLoRAConfig(target="qkv", preset="paper"))
    before = statistics(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("alpha"))
    model.train()(images())
    assert not moved(model, before)
    for parameter in trained:
        parameter.requires_grad_(True)
    model.train()(images())
    assert moved(model, before) and all("qkv.cell" in name for name in moved(model, before))


@pytest.mark.parametrize("method", ["decoder-only", "bitfit", "nas-pc-lora", "full"])
def test_only_full_fine_tuning_trains_the_norms_of_mobile_sam(method):
    model = build_model("mobile_sam", 64)
    encoder = model.image_encoder
    apply(method, model)
    before = statistics(encoder)
    encoder.train()  # not through the model
    encoder(tokens(1, 3, 64, 64))
    assert before and len(moved(encoder, before)) == (len(before) if method == "full" else 0)
