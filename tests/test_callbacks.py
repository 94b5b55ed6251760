"""The search as a callback of Lightning and of the Trainer of transformers."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from naslora import NASLoRAConfig, UserError, arch_parameters, inject, weight_parameters
from naslora.adapter.layer.modules import adapter_layers
from tests.adapted_models import build_encoder, images, tokens
from tests.hugging_face import BUILDERS, batch_loss, batch_of, mask_loss, samples

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Lightning:
    """A module that fits a random target, in three batches an epoch."""

    batches = tuple((images(seed), tokens(2, 16, 4, 4, seed=seed)) for seed in (1, 2, 3))
    held_out = tuple((images(seed), tokens(2, 16, 4, 4, seed=seed)) for seed in (4, 5))
    checkpoint = "last.ckpt"

    def __init__(self) -> None:
        pytest.importorskip("lightning")

    def model(self, adapted: bool = True, **options: Any) -> nn.Module:
        import lightning.pytorch as L

        class Module(L.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = build_encoder()
                if adapted:
                    inject(self.encoder, NASLoRAConfig(**options))

            def training_step(self, batch, index):
                return Lightning.loss(self, batch)

            def configure_optimizers(self):
                return torch.optim.Adam(weight_parameters(self), lr=1e-2)

        return Module()

    @staticmethod
    def loss(module, batch):
        return nn.functional.mse_loss(module.encoder(batch[0]), batch[1])

    def fitted(self, model) -> float:
        return sum(float(self.loss(model, batch)) for batch in self.batches)

    def callback(self, held_out=held_out, loss=None, **options):
        from naslora.integrations.lightning import AlphaCallback

        return AlphaCallback(held_out, loss or self.loss, **options)

    def train(self, model, folder, callbacks, epochs, checkpoint=None, **options):
        import lightning.pytorch as L
        from lightning.pytorch.callbacks import ModelCheckpoint

        options |= {"max_epochs": epochs, "default_root_dir": folder, "accelerator": "cpu"}
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        callbacks = [*callbacks, ModelCheckpoint(folder, save_last=True)]
        trainer = L.Trainer(callbacks=callbacks, **quiet, **options)
        trainer.fit(model, DataLoader(self.batches, batch_size=None), ckpt_path=checkpoint)


class Transformers:
    """A model of transformers on four samples, in two batches an epoch."""

    held_out = (batch_of(2, seed=1), batch_of(2, seed=2))
    checkpoint = "checkpoint-4"  # two epochs of two steps
    loss = staticmethod(batch_loss)

    def __init__(self, name: str = "SamModel") -> None:
        self.build = BUILDERS[name]

    def model(self, adapted: bool = True, **options: Any) -> nn.Module:
        model = self.build()
        if adapted:
            inject(model, NASLoRAConfig(**options), train=("mask_decoder",))
        return model

    def fitted(self, model) -> float:
        return batch_loss(model, batch_of(8)).item()

    def callback(self, held_out=held_out, loss=batch_loss, **options):
        from naslora.integrations import AlphaCallback

        return AlphaCallback(held_out, loss, **options)

    def trainer(self, model, folder, callbacks, epochs):
        from transformers import Trainer, TrainingArguments

        options = {"output_dir": str(folder), "num_train_epochs": epochs, "save_strategy": "epoch"}
        options |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "use_cpu": True}
        options |= {"per_device_train_batch_size": 2, "remove_unused_columns": False}
        options |= {"label_names": ["labels"], "report_to": [], "disable_tqdm": True}
        parts = {"train_dataset": samples(4), "compute_loss_func": mask_loss}
        return Trainer(model, TrainingArguments(**options), callbacks=callbacks, **parts)

    def train(self, model, folder, callbacks, epochs, checkpoint=None):
        trainer = self.trainer(model, folder, callbacks, epochs)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert not held & {id(alpha) for alpha in arch_parameters(model)}
        assert held >= {id(p) for p in model.mask_decoder.parameters()}


HOSTS = {
    "Lightning": Lightning,
    "SamModel": Transformers,
    "Sam2Model": lambda: Transformers("Sam2Model"),
}
every_host = pytest.mark.parametrize("make", HOSTS.values(), ids=HOSTS)
each_library = pytest.mark.parametrize("make", [Lightning, Transformers])


def alphas(model) -> torch.Tensor:
    return torch.stack([alpha.detach().clone() for alpha in arch_parameters(model)])


@every_host
def test_the_loop_trains_the_weights_and_the_callback_alpha(make, tmp_path):
    host = make()
    model = host.model()
    before, start = host.fitted(model), alphas(model)
    callback = host.callback(lr=1e-2, start=1)
    host.train(model, tmp_path, [callback], 3)
    assert host.fitted(model) < before
    assert sorted(callback.losses) == [1, 2]
    # Two epochs of two steps: Adam moves a logit by about lr a step.
    assert 1e-3 < (alphas(model) - start).abs().max() < 0.05


@each_library
def test_channels_are_drawn_anew_each_epoch_where_the_configuration_says_so(make, tmp_path):
    host, seen = make(), set()
    model = host.model(rank=12, channel_ratio=0.5, channel_selection="resample")
    layer = next(adapter_layers(model))[1]
    layer.register_forward_pre_hook(lambda layer, _: seen.add(tuple(layer.channels.tolist())))
    start, callback = alphas(model), host.callback(start=3)
    host.train(model, tmp_path, [callback], 3)
    assert len(seen) == 3
    # Alpha rests before its first epoch.
    assert torch.equal(alphas(model), start) and callback.losses == {}


@each_library
def test_training_resumed_from_a_checkpoint_equals_one_run(make, tmp_path):
    host = make()
    found = []
    for folder, epochs, checkpoint in (
        ("whole", 3, None),
        ("parts", 2, None),
        ("parts", 3, tmp_path / "parts" / host.checkpoint),
    ):
        model = host.model()
        host.train(model, tmp_path / folder, [host.callback()], epochs, checkpoint)
        found.append(alphas(model))
    torch.testing.assert_close(found[2], found[0])  # float32 rounding


@each_library
def test_what_cannot_search_is_refused(make, tmp_path):
    host = make()
    for model, callback, line in (
        (host.model(adapted=False), host.callback(), "no alpha to search"),
        (host.model(), host.callback([]), "held_out yielded no batches"),
    ):
        with warnings.catch_warnings(), pytest.raises(UserError, match=line):
            host.train(model, tmp_path, [callback], 1)
    with pytest.raises(UserError, match=r"held_out must be readable once an epoch, .* generator"):
        host.callback(batch for batch in host.held_out)


def test_precision_of_lightning_holds_for_the_alpha_steps(tmp_path):
    host, seen = Lightning(), set()

    def watching(module, batch):
        seen.add(torch.is_autocast_enabled("cpu"))
        return host.loss(module, batch)

    callback = host.callback(loss=watching)
    host.train(host.model(), tmp_path, [callback], 1, precision="bf16-mixed")
    assert seen == {True}


def test_a_callback_added_after_the_optimizer_alone_moves_alpha(tmp_path):
    host = Transformers()
    model = host.model()
    start = alphas(model)
    trainer = host.trainer(model, tmp_path, [], 1)
    trainer.create_optimizer()
    trainer.add_callback(host.callback(start=1))
    trainer.train()
    assert torch.equal(alphas(model), start)


def test_a_model_without_loss_is_named(tmp_path):
    host = Transformers()
    callback = host.callback([{"pixel_values": torch.ones(1, 3, 64, 64)}], None)
    with pytest.raises(UserError, match="SamModel returns no loss; give AlphaCallback loss_fn"):
        host.train(host.model(), tmp_path, [callback], 1)
