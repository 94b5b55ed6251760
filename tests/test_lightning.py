"""The search inside Lightning."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("lightning")

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint

from naslora import NASLoRAConfig, UserError, arch_parameters, inject, weight_parameters
from naslora.adapter.layer.modules import adapter_layers
from naslora.integrations.lightning import AlphaCallback
from tests.adapted_models import build_encoder, images, tokens

BATCHES = [(images(seed), tokens(2, 16, 4, 4, seed=seed)) for seed in (1, 2, 3)]
HELD_OUT = [(images(seed), tokens(2, 16, 4, 4, seed=seed)) for seed in (4, 5)]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Module(L.LightningModule):
    """Fits a random target."""

    def __init__(self, adapted: bool = True, **options) -> None:
        super().__init__()
        self.encoder = build_encoder()
        if adapted:
            inject(self.encoder, NASLoRAConfig(**options))
        self.validated: list[torch.Tensor] = []

    def loss(self, batch) -> torch.Tensor:
        image, target = batch
        return nn.functional.mse_loss(self.encoder(image), target)

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        if index == 0:
            self.validated.append(alphas(self))

    def configure_optimizers(self):
        return torch.optim.Adam(weight_parameters(self), lr=1e-2)


def alphas(model) -> torch.Tensor:
    return torch.stack([alpha.detach().clone() for alpha in arch_parameters(model)])


def fit(module, directory, callback, epochs=2, checkpoint=None, **options):
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=directory,
        callbacks=[callback, ModelCheckpoint(directory, save_last=True)],
        **options,
    )
    loader = DataLoader(BATCHES, batch_size=None)
    trainer.fit(module, loader, loader, ckpt_path=checkpoint)
    return trainer


def loss_fn(module, batch):
    return module.loss(batch)


def test_the_module_trains_the_weights_and_the_callback_alpha(tmp_path):
    module = Module()
    start = alphas(module)
    before = sum(float(module.loss(batch)) for batch in BATCHES)
    callback = AlphaCallback(HELD_OUT, loss_fn, lr=1e-2, start=1)
    fit(module, tmp_path, callback, epochs=3)
    assert sum(float(module.loss(batch)) for batch in BATCHES) < before
    assert sorted(callback.losses) == [1, 2]
    first, second, third = module.validated
    assert torch.equal(first, start)
    # Validation comes after the epoch's two alpha steps. Adam moves a logit by about lr a step.
    for earlier, later in ((first, second), (second, third)):
        assert 1e-3 < (later - earlier).abs().max() < 0.05


def test_precision_of_the_trainer_holds_for_the_alpha_steps(tmp_path):
    seen = set()

    def watching(module, batch):
        seen.add(torch.is_autocast_enabled("cpu"))
        return module.loss(batch)

    fit(Module(), tmp_path, AlphaCallback(HELD_OUT, watching), precision="bf16-mixed", epochs=1)
    assert seen == {True}


def test_training_resumed_from_a_checkpoint_equals_one_run(tmp_path):
    whole = Module()
    fit(whole, tmp_path / "whole", AlphaCallback(HELD_OUT, loss_fn), epochs=3)
    fit(Module(), tmp_path / "parts", AlphaCallback(HELD_OUT, loss_fn), epochs=2)
    resumed, last = Module(), tmp_path / "parts" / "last.ckpt"
    fit(resumed, tmp_path / "parts", AlphaCallback(HELD_OUT, loss_fn), epochs=3, checkpoint=last)
    torch.testing.assert_close(alphas(resumed), alphas(whole))  # float32 rounding


def test_channels_are_drawn_anew_each_epoch_where_the_configuration_says_so(tmp_path):
    module, seen = Module(rank=12, channel_ratio=0.5, channel_selection="resample"), set()

    def watching(module, batch):
        seen.add(tuple(next(adapter_layers(module))[1].channels.tolist()))
        return module.loss(batch)

    fit(module, tmp_path, AlphaCallback(HELD_OUT, watching), epochs=3)
    assert len(seen) == 3


def test_a_module_without_alpha_is_refused(tmp_path):
    with warnings.catch_warnings(), pytest.raises(UserError, match="no alpha to search"):
        fit(Module(adapted=False), tmp_path, AlphaCallback(HELD_OUT, loss_fn))
