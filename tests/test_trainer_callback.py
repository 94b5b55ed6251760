"""Hugging Face's SamModel and Sam2Model under the Trainer, with the search as a callback."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments

from naslora import NASLoRAConfig, NASLoRALinear, UserError, arch_parameters, inject
from naslora.integrations import AlphaCallback
from tests.hugging_face import batch_loss, batch_of, build_sam, build_sam2, mask_loss, samples

BUILDERS = {"SamModel": build_sam, "Sam2Model": build_sam2}
HELD_OUT = [batch_of(2, seed=1), batch_of(2, seed=2)]


def injected(build=build_sam, **options):
    model = build()
    inject(model, NASLoRAConfig(**options), train=("mask_decoder",))
    return model


def trainer_of(model, directory, callbacks, epochs=2, count=4, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=epochs,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no", **options},
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=samples(count),
        compute_loss_func=mask_loss,
        callbacks=callbacks,
    )


def alphas(model) -> torch.Tensor:
    return torch.stack([alpha.detach().clone() for alpha in arch_parameters(model)])


@pytest.mark.parametrize("name", BUILDERS)
def test_a_trainer_trains_the_weights_and_the_callback_alpha(name, tmp_path):
    model = injected(BUILDERS[name])
    before, start = batch_loss(model, batch_of(8)).item(), alphas(model)
    callback = AlphaCallback(HELD_OUT, batch_loss, lr=1e-2, start=1)
    trainer = trainer_of(model, tmp_path, [callback], epochs=3, count=8)
    trainer.train()
    assert batch_loss(model, batch_of(8)).item() < before
    assert sorted(callback.losses) == [1, 2]
    # Two epochs of two steps: Adam moves a logit by about lr a step.
    moved = (alphas(model) - start).abs()
    assert 1e-3 < moved.max() < 0.05
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not held & {id(alpha) for alpha in arch_parameters(model)}
    assert held >= {id(p) for p in model.mask_decoder.parameters()}


def test_channels_are_drawn_anew_each_epoch_where_the_configuration_says_so(tmp_path):
    model = injected(rank=12, channel_ratio=0.5, channel_selection="resample")
    layers = [module for module in model.modules() if isinstance(module, NASLoRALinear)]
    seen = []

    class Watch(AlphaCallback):
        def on_epoch_end(self, *arguments, **options):
            super().on_epoch_end(*arguments, **options)
            seen.append(layers[0].channels.tolist())

    start, callback = alphas(model), Watch(HELD_OUT, batch_loss, start=3)
    trainer_of(model, tmp_path, [callback], epochs=3).train()
    assert len({tuple(channels) for channels in seen}) == 3
    # Alpha rests before its first epoch.
    assert torch.equal(alphas(model), start) and callback.losses == {}


def test_training_resumed_from_a_checkpoint_equals_one_run(tmp_path):
    def run(directory, epochs, checkpoint=None):
        model = injected()
        callback = AlphaCallback(HELD_OUT, batch_loss)
        trainer = trainer_of(
            model,
            directory,
            [callback],
            epochs,
            save_strategy="epoch",
            lr_scheduler_type="constant",
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return alphas(model)

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "parts", 2)
    # 4 samples in batches of 2: two epochs are 4 steps.
    resumed = run(tmp_path / "parts", 3, str(tmp_path / "parts" / "checkpoint-4"))
    torch.testing.assert_close(resumed, whole)  # float32 rounding


def test_a_callback_added_after_the_optimizer_alone_moves_alpha(tmp_path):
    model = injected()
    start = alphas(model)
    trainer = trainer_of(model, tmp_path, [], epochs=1)
    trainer.create_optimizer()
    trainer.add_callback(AlphaCallback(HELD_OUT, batch_loss, start=1))
    trainer.train()
    assert torch.equal(alphas(model), start)


def test_a_model_without_alpha_is_refused(tmp_path):
    with pytest.raises(UserError, match="no alpha to search"):
        trainer_of(build_sam(), tmp_path, [AlphaCallback(HELD_OUT, batch_loss)])


def test_a_model_without_loss_is_named(tmp_path):
    trainer = trainer_of(
        injected(), tmp_path, [AlphaCallback([{"pixel_values": torch.ones(1, 3, 64, 64)}])]
    )
    with pytest.raises(UserError, match="SamModel returns no loss; give AlphaCallback loss_fn"):
        trainer.train()


def test_batches_that_end_after_one_pass_are_refused():
    with pytest.raises(UserError, match=r"held_out must be readable once an epoch, .* generator"):
        AlphaCallback((batch for batch in HELD_OUT), batch_loss)


def test_no_batches_are_refused(tmp_path):
    with pytest.raises(UserError, match="held_out yielded no batches"):
        trainer_of(injected(), tmp_path, [AlphaCallback([], batch_loss)]).train()
