"""The two-stage search: what each step moves, that no layout of a batch matters, when it stops."""

import dataclasses
import functools
import math

import pytest
import torch
from adapted_models import differing, state_of
from conftest import error_of, write_data
from run_configs import run_config

from naslora.adapter.io.storage import trained_state
from naslora.adapter.layer.config import LowRankConfig
from naslora.adapter.layer.modules import adapter_layers, arch_parameters, cell_parameters
from naslora.data.dataset import SegmentationDataset
from naslora.files import read_safetensors
from naslora.results import ADAPTER, LAST, SplitScores, kept_epoch
from naslora.training.accelerator import make_accelerator
from naslora.training.resolve import LEARNING_BOUNDS
from naslora.training.run_config import TrainConfig
from naslora.training.run_data import EpochImages, find_splits
from naslora.training.run_model import build_adapted_model
from naslora.training.step import Compiled
from naslora.training.trainer import MAX_ALPHA_RATE, Trainer

pytestmark = pytest.mark.usefixtures("tiny_sam", "fresh_accelerate")

RATE, ALPHA_RATE = 1e-3, 3e-4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Of 11 training images 2 go to the architecture: batches of 4, 4, 1 and of 2."""
    return write_data(tmp_path_factory.mktemp("data") / "binary", train=11, val=3, test=2)


@pytest.fixture
def make_trainer(data, tmp_path):
    """A search of two epochs, the second of which is stage 2, with the changes that are given."""
    count = 0

    def make(method="nas-pc-lora", adapter=None, num_classes=1, **changes):
        nonlocal count
        count += 1
        settings = {"epochs": 2, "search_start": 1, "workers": 0, "learning_rate": RATE}
        settings |= {"alpha_learning_rate": ALPHA_RATE, **changes}
        about = {"method": method, "adapter": adapter or {}, "training": settings}
        about |= {"name": "vit_t", "image_size": 32, "num_classes": num_classes}
        config = run_config(root=data, **about)
        splits = find_splits(config)
        for name, samples in splits.items():
            flip = name in ("train", "arch")
            splits[name] = SegmentationDataset(samples, 32, num_classes, flip=flip)
        model = build_adapted_model(config)
        accelerator = make_accelerator(config.training)
        return Trainer(model, splits, config, tmp_path / str(count), accelerator)

    return make


def alphas(trainer):
    return [alpha.detach().clone() for alpha in arch_parameters(trainer.model)]


def all_equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def kept_by(trainer):
    """The tensors of the kept epoch."""
    return read_safetensors(trainer.directory / ADAPTER / "adapter_model.safetensors")


def watch(trainer, name, seen):
    """Calls ``seen`` with the group before each of its optimizer's steps."""
    group = getattr(trainer, name)
    step = group.optimizer.step

    def watched():
        seen(group)
        step()

    group.optimizer.step = watched


# --- What moves ---


def test_a_step_touches_its_own_group_alone(make_trainer):
    """Stage 1 leaves alpha and stage 2 moves it."""
    trainer = make_trainer()
    groups = {"weights": trainer.weights, "architecture": trainer.architecture}
    frozen, start, steps = state_of(trainer.model), alphas(trainer), []

    def check(name):
        other = groups["architecture" if name == "weights" else "weights"]

        def seen(group):
            assert all(p.grad is not None for p in group.parameters)
            assert not any(p.requires_grad or p.grad is not None for p in other.parameters)
            steps.append((name, [p.detach().clone() for p in other.parameters]))

        return seen

    for name in groups:
        watch(trainer, name, check(name))
    trainer.run()
    assert [name for name, _ in steps] == ["weights"] * 6 + ["architecture"]
    # Weights are as the last weight step left them, and alpha is as it was while weights moved.
    assert all_equal(steps[-1][1], [p.detach() for p in trainer.weights.parameters])
    assert all(all_equal(steps[0][1], alpha) for name, alpha in steps if name == "weights")
    assert differing(frozen, trainer.model.state_dict()) <= trained_state(trainer.model).keys()
    assert not any(torch.equal(a, b) for a, b in zip(alphas(trainer), start, strict=True))
    assert [record.stage for record in trainer.history] == [1, 2]
    assert [record.arch_loss is None for record in trainer.history] == [True, False]
    epochs = trainer.operation_history().epochs
    assert [entry.epoch for entry in epochs] == [0, 1, 2]
    assert epochs[0].softmax == epochs[1].softmax != epochs[2].softmax


def test_simultaneous_moves_both_from_the_first_step(make_trainer):
    trainer = make_trainer(simultaneous=True, search_start=9, epochs=1)
    start, steps = alphas(trainer), []
    for name in ("weights", "architecture"):
        watch(trainer, name, lambda group: steps.append(len(group.parameters)))
    trainer.run()
    # All 11 images train: three batches, each with a step of both optimizers.
    assert steps == [len(trainer.weights.parameters), len(start)] * 3
    assert not any(torch.equal(a, b) for a, b in zip(alphas(trainer), start, strict=True))
    assert trainer.history[0].stage == 2 and trainer.history[0].arch_loss is None


def epoch_images(arch_data, train=10, arch=0, **changes):
    config = TrainConfig(arch_data=arch_data, search_start=1, **changes)
    return EpochImages(config, train, arch, searches=True, seed=3)


@pytest.mark.parametrize("arch_data", ["redraw", "rotate", "hold-out"])
def test_the_images_of_an_epoch(arch_data):
    images = epoch_images(arch_data)
    parts = [frozenset(images.of(epoch)[1]) for epoch in (1, 2, 3)]
    assert all(len(part) == 2 for part in parts)
    assert (len(set(parts)) == 1) == (arch_data == "hold-out")
    for epoch, part in zip((1, 2, 3), parts, strict=True):
        weights = list(images.of(epoch)[0])
        assert len(weights) == 10  # every choice takes as many steps
        assert set(weights) == set(range(10)) - (set() if arch_data == "redraw" else part)


def test_the_datas_own_split_takes_no_weight_steps_away():
    images = epoch_images(None, train=8, arch=3)
    assert list(images.of(5)[1]) == [0, 1, 2]
    assert len(images.of(0)[0]) == 11 and set(images.of(0)[0]) == set(range(8))


def test_a_single_image_cannot_be_held_out():
    assert "at least 2" in error_of(epoch_images("hold-out", train=1).of, 0)


def test_the_own_split_joins_the_training_images_unless_alpha_takes_it(data, tmp_path):
    own = write_data(tmp_path / "own", train=3, arch=2, val=1, test=1)
    config = run_config(root=own)
    for arch_data in (None, "split"):
        chosen = TrainConfig(arch_data=arch_data)
        splits = find_splits(dataclasses.replace(config, training=chosen))
        assert len(splits["train"]) == 3 and len(splits["arch"]) == 2
    for changes in (
        {"method": "lora", "adapter": LowRankConfig()},
        {"training": TrainConfig(simultaneous=True)},
        {"training": TrainConfig(arch_data="redraw")},
    ):
        splits = find_splits(dataclasses.replace(config, **changes))
        assert len(splits["train"]) == 5 and "arch" not in splits
    absent = run_config(root=data, training={"arch_data": "split"})
    assert "has no split 'arch'" in error_of(find_splits, absent)


def test_the_cell_has_a_rate_and_a_decay_of_its_own(make_trainer):
    trainer, rates = make_trainer(cell_rate=2.0, cell_weight_decay=0.5), []
    watch(trainer, "weights", lambda g: rates.append([p["lr"] for p in g.optimizer.param_groups]))
    others, cell = trainer.weights.optimizer.param_groups
    assert {id(p) for p in cell["params"]} == {id(p) for p in cell_parameters(trainer.model)}
    assert (others["weight_decay"], cell["weight_decay"]) == (1e-4, 0.5)
    trainer.run()
    assert all(second == pytest.approx(2 * first) for first, second in rates) and len(rates) == 6


def test_resample_draws_channels_anew_each_epoch(make_trainer):
    adapter = {"rank": 12, "channel_ratio": 0.5, "channel_selection": "resample"}
    trainer, epochs = make_trainer(adapter=adapter, epochs=3), [None] * 3

    def note(_):
        channels = [layer.channels.tolist() for _, layer in adapter_layers(trainer.model)]
        assert epochs[trainer.epoch] in (None, channels)  # the same throughout an epoch
        epochs[trainer.epoch] = channels

    watch(trainer, "weights", note)
    watch(trainer, "architecture", note)
    trainer.run()
    assert len({str(channels) for channels in epochs}) == 3
    assert all(len(set(c)) == 6 and max(c) < 12 for layers in epochs for c in layers)


# --- No layout of a batch matters ---

# Sums in another order differ by float32 rounding, about 1e-6 of a gradient. Adam divides by the
# gradient's own size, so that a weight moves by about the rate whatever its gradient: where the
# gradient is large against its rounding the difference stays far below the rate, and a weight with
# next to no gradient may still go another way. Hence: nearly all weights within a hundredth of
# one step at the full rate, and what the weights compute to float32 accuracy.
WEIGHT_TOLERANCE, SHARE = RATE / 100, 0.99
LOSS_TOLERANCE = 1e-4


def assert_same_training(ours, theirs, history, other_history):
    assert ours.keys() == theirs.keys()
    far = total = 0
    for name, value in ours.items():
        # The bias of the keys shifts all logits of an attention alike: its gradient is rounding.
        if name.endswith("k_proj.bias"):
            continue
        far += ((value - theirs[name]).abs() > WEIGHT_TOLERANCE).sum().item()
        total += value.numel()
    assert far <= (1 - SHARE) * total
    for name in (name for name in ours if name.endswith(".alpha")):
        torch.testing.assert_close(ours[name], theirs[name], atol=ALPHA_RATE / 100, rtol=0)
    for record, other in zip(history, other_history, strict=True):
        for name in ("train_loss", "arch_loss", "val_loss"):
            expected = getattr(other, name)
            expected = expected and pytest.approx(expected, rel=LOSS_TOLERANCE)
            assert getattr(record, name) == expected


@pytest.mark.parametrize(
    "num_classes, changes, bits",
    [
        (1, {"accumulation": 4}, False),
        (2, {"accumulation": 2}, False),
        (1, {"gradient_checkpointing": True}, True),  # the same operations on the same numbers
    ],
)
def test_what_does_not_change_the_training(make_trainer, num_classes, changes, bits):
    one, other = (make_trainer(num_classes=num_classes, **more) for more in ({}, changes))
    one.run()
    other.run()
    ours, theirs = trained_state(one.model), trained_state(other.model)
    assert_same_training(ours, theirs, one.history, other.history)
    assert not (bits and differing(ours, theirs))


# --- Schedules, clipping, precision ---


@pytest.mark.parametrize(
    "schedule, warmup, factor",
    [
        ("linear", 0.0, lambda done: 1 - done),
        ("cosine", 0.0, lambda done: (1 + math.cos(math.pi * done)) / 2),
        ("constant", 0.0, lambda done: 1.0),
        ("linear", 0.5, lambda done: 0.01 + 0.99 * done / 0.5 if done < 0.5 else 2 - 2 * done),
        ("constant", 0.2, lambda done: min(0.01 + 0.99 * done / 0.2, 1)),
    ],
)
def test_schedules(make_trainer, schedule, warmup, factor):
    trainer, rates, alpha_rates = make_trainer(schedule=schedule, warmup=warmup), [], []
    watch(trainer, "weights", lambda g: rates.append(g.optimizer.param_groups[0]["lr"]))
    watch(trainer, "architecture", lambda g: alpha_rates.append(g.optimizer.param_groups[0]["lr"]))
    trainer.run()
    assert rates == pytest.approx([RATE * factor(step / 6) for step in range(6)])
    falls = {"linear": 0.5, "cosine": 0.5, "constant": 1.0}
    assert alpha_rates == pytest.approx([ALPHA_RATE * falls[schedule]])  # alpha has no warm-up
    recorded = [record.learning_rate for record in trainer.history]
    assert recorded == pytest.approx([RATE * factor(0), RATE * factor(0.5)])


@pytest.mark.parametrize(
    "changes, epochs, rate",
    [
        # Of 11 images an epoch has three steps; the factors of n linear steps add up to (n + 1)/2.
        ({"learning_rate": None, "epochs": 400}, 400, 0.2 / 600.5),
        ({"learning_rate": None, "epochs": 400, "schedule": "constant"}, 400, 0.2 / 1200),
        ({"learning_rate": None, "epochs": 2}, 2, LEARNING_BOUNDS[1]),
        ({"learning_rate": None, "epochs": 4000}, 4000, LEARNING_BOUNDS[0]),
        # The warm-up of 600 steps adds up to 302.505, and the fall of 600 to 300.5.
        ({"learning_rate": None, "epochs": 400, "warmup": 0.5}, 400, 0.2 / 603.005),
        ({"learning_rate": None, "steps": 1199}, 400, 0.2 / 600.5),
        ({"steps": 1, "learning_rate": 1e-3}, 1, 1e-3),
    ],
)
def test_epochs_and_rate_follow_from_the_number_of_images(data, changes, epochs, rate):
    training = run_config(root=data, training={"warmup": 0.0} | changes).training
    assert training.learning_rate == pytest.approx(rate)
    assert (training.epochs, training.steps, training.search_start) == (epochs, None, epochs // 3)
    config = run_config(training=changes).training  # without data they stay open
    assert (config.learning_rate, config.steps) == (changes["learning_rate"], changes.get("steps"))


CONSTANT = {"alpha_schedule": "constant"}


@pytest.mark.parametrize(
    "travel, most, changes, rates",
    [
        # So short a run would be at the upper bound, which is 1 here.
        (0.5, 1.0, {}, [0.5]),  # the one step of epoch 1
        # Two steps in each of the epochs 1 and 2.
        (0.5, 1.0, {"epochs": 3, "batch_size": 1}, [0.5 / 10 * part for part in (4, 3, 2, 1)]),
        # One step a batch of the 11 images.
        (0.5, 1.0, {"epochs": 1, "simultaneous": True}, [0.5 / 6 * part for part in (3, 2, 1)]),
        (0.5, 1.0, {"alpha_learning_rate": 0.5, **CONSTANT}, [0.5]),
        (1e-6, MAX_ALPHA_RATE, CONSTANT, [3e-4]),
        (1e6, MAX_ALPHA_RATE, CONSTANT, [0.3]),
    ],
)
def test_the_rates_of_alpha_add_up_and_are_bounded(
    make_trainer, monkeypatch, travel, most, changes, rates
):
    monkeypatch.setattr("naslora.training.trainer.ALPHA_TRAVEL", travel)
    monkeypatch.setattr("naslora.training.trainer.MAX_ALPHA_RATE", most)
    trainer, seen = make_trainer(**{"alpha_learning_rate": None, **changes}), []
    watch(trainer, "architecture", lambda g: seen.append(g.optimizer.param_groups[0]["lr"]))
    trainer.run()
    assert seen == pytest.approx(rates)


def test_clipping_bounds_the_weights_gradient_alone(make_trainer):
    norms = {}
    for clip in (0.0, 1e-3):
        trainer = make_trainer(clip_norm=clip, search_start=0, epochs=1)
        norms[clip] = {"weights": [], "architecture": []}
        for name, found in norms[clip].items():

            def note(group, found=found):
                grads = [p.grad.flatten() for p in group.parameters]
                found.append(torch.cat(grads).norm().item())

            watch(trainer, name, note)
        trainer.run()
    assert min(norms[0.0]["weights"]) > 0.1
    # PyTorch adds 1e-6 to the norm that it divides by.
    assert norms[1e-3]["weights"] == pytest.approx([1e-3] * 3, rel=1e-3)
    assert 0 < norms[1e-3]["architecture"][0] != pytest.approx(1e-3)


def test_reported_losses_are_without_the_auxiliary_loss(make_trainer):
    """Adapters start without effect. So at rate 0 all methods have LoRA's loss."""
    rest = {"learning_rate": 0.0, "epochs": 1}
    lora, conv_lora = (make_trainer(method=method, **rest) for method in ("lora", "conv-lora"))
    lora.run(), conv_lora.run()
    assert conv_lora.history[0].train_loss == pytest.approx(lora.history[0].train_loss, rel=1e-6)
    gates = [p for name, p in conv_lora.model.named_parameters() if name.endswith(".noise")]
    moments = conv_lora.weights.optimizer.state
    assert all(moments[gate]["exp_avg"].abs().sum() > 0 for gate in gates)  # it balances still


def test_loss_scaling_changes_nothing(make_trainer):
    """What fp16 does on a GPU, in float32: gradients are scaled, clipped as unscaled, stepped."""
    plain, scaled = (make_trainer(clip_norm=0.1) for _ in range(2))
    # It also doubles the scale at every step; powers of two scale without rounding.
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
    plain.run()
    scaled.run()
    assert scaled.accelerator.scaler.get_scale() > 2.0**8
    states = (trained_state(trainer.model) for trainer in (plain, scaled))
    assert_same_training(*states, plain.history, scaled.history)


@pytest.mark.parametrize(
    "launched, gpu, fast, expected",
    [
        ("fp16", False, True, "fp16"),
        (None, False, True, "bf16"),
        (None, False, False, "no"),
        (None, True, True, "no"),
        ("", False, True, "bf16"),
    ],
)
def test_the_precision_of_a_run_that_is_not_given_one(monkeypatch, launched, gpu, fast, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    assert run_config().training.mixed_precision == expected


# --- Checkpoints, and when to stop ---


@pytest.mark.parametrize("keep, epoch", [("last", 3), ("best", 1)])
def test_the_kept_epoch(make_trainer, monkeypatch, keep, epoch):
    trainer, states = make_trainer(epochs=4, keep=keep), []
    dice = iter([0.3, 0.6, 0.6, None])

    def evaluate(split):
        states.append({name: v.clone() for name, v in trained_state(trainer.model).items()})
        return SplitScores(loss=1.0, dice=next(dice), iou=0.5, accuracy=0.5)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    trainer.run()
    assert not differing(kept_by(trainer), states[epoch])
    assert kept_epoch(trainer.history, keep).epoch == epoch + 1
    last = torch.load(trainer.directory / LAST)
    assert last["epoch"] == 4
    assert not differing(last["model"], states[3])


@pytest.mark.parametrize(
    "dice, search_start, epochs",
    [
        ([0.3, 0.6, 0.6, 0.5], 1, 4),  # equal Dice is no rise
        ([0.6, None, 0.5, 0.7, 0.1, 0.1], 3, 6),  # counted from the start of the search
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 1, 7),
    ],
)
def test_patience(make_trainer, monkeypatch, dice, search_start, epochs):
    settings = {"epochs": 7, "search_start": search_start, "keep": "best", "patience": 2}
    trainer = make_trainer(**settings)
    scores = (SplitScores(1.0, value, 0.5, 0.5, image_dice=[]) for value in dice)
    monkeypatch.setattr(trainer, "evaluate", lambda _: next(scores))
    trainer.run()
    assert trainer.epoch == len(trainer.history) == epochs == len(dice)
    parts = (trainer.model, trainer.data, trainer.run_config, trainer.directory)
    again = Trainer(*parts, trainer.accelerator)
    again.resume()
    again.run()  # a run that was stopped stays so
    assert again.epoch == epochs


def test_averaged_weights(make_trainer, monkeypatch):
    """Averages over 4.5 of 9 steps are validated and kept; the training is as without, and a
    resumed run's as an unbroken one's. The preset `paper` has batch norms."""
    settings = {"epochs": 3, "warmup": 0.25, "adapter": {"preset": "paper"}}
    plain, whole, broken, resumed = (
        make_trainer(**settings, **changes) for changes in ({}, *[{"ema": 0.5}] * 3)
    )
    steps, validated = [], []
    watch(whole, "weights", lambda g: steps.append([p.detach().clone() for p in g.parameters]))
    evaluate = whole.evaluate
    parameters = whole.weights.parameters

    def validate(split):
        validated.append([p.detach().clone() for p in parameters])
        return evaluate(split)

    monkeypatch.setattr(whole, "evaluate", validate)
    plain.run()
    whole.run()
    steps = [*steps[1:], [p.detach() for p in parameters]]  # after each step
    means = steps[0]
    for count, values in enumerate(steps[1:], 2):
        share = 1 / min(count, 4.5)
        means = [(1 - share) * m + share * v for m, v in zip(means, values, strict=True)]
    for ours, expected in zip(validated[-1], means, strict=True):
        torch.testing.assert_close(ours, expected)
    last, live = trained_state(whole.model), trained_state(plain.model)
    assert not differing(last, live)
    kept = kept_by(whole)
    names = {id(p): name for name, p in whole.model.named_parameters()}
    assert all_equal([kept[names[id(p)]] for p in parameters], validated[-1])
    others = kept.keys() - {names[id(p)] for p in parameters}
    assert {name.rpartition(".")[2] for name in others} >= {"alpha", "running_mean"}
    assert all_equal([kept[name] for name in others], [last[name] for name in others])

    def stop(split):
        if broken.epoch == 1:
            raise KeyboardInterrupt
        return Trainer.evaluate(broken, split)

    monkeypatch.setattr(broken, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    resumed.directory = broken.directory
    resumed.resume()
    assert resumed.epoch == 1
    resumed.run()
    assert not differing(kept, kept_by(resumed))
    assert_same_training(last, trained_state(resumed.model), whole.history, resumed.history)


def load_last(trainer):
    state = torch.load(trainer.directory / LAST, weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())
    return state["epoch"]


@pytest.mark.parametrize("num_classes, class_loss", [(1, "pixel"), (2, "pixel"), (2, "matching")])
def test_a_loss_that_is_not_finite_stops(make_trainer, num_classes, class_loss):
    trainer = make_trainer(num_classes=num_classes, class_loss=class_loss)

    def spoil(group):
        if trainer.epoch == 1:
            group.parameters[0].data.fill_(torch.nan)

    watch(trainer, "weights", spoil)
    message = error_of(trainer.run)
    # The first step of the epoch spoils the weights, so that its second batch of 4 shows it.
    assert "loss is nan in epoch 2/2 on train" in message and message.count(".png") == 4
    assert "lower --learning-rate" in message
    assert load_last(trainer) == 1


def test_weights_spoilt_by_the_last_step_are_not_kept(make_trainer):
    trainer, steps = make_trainer(method="lora", epochs=2), []

    def spoil(group):
        steps.append(1)
        if len(steps) == 6:  # epochs have three steps
            group.parameters[0].grad.fill_(torch.inf)

    watch(trainer, "weights", spoil)
    assert "epoch 2/2 on the validation images" in error_of(trainer.run)
    assert load_last(trainer) == 1


# --- Compiled ---


def test_compiled_steps_are_the_eager_ones(make_trainer, monkeypatch):
    """With the compiler that runs the traced operations as they are. The batches of 1 and of 2
    images stay eager, and later epochs compile nothing."""
    stats = torch._dynamo.utils.counters["stats"]
    compiler = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compiler(f, **options))
    eager, ours = make_trainer(epochs=3), make_trainer(epochs=3, compile=True)
    eager.run()
    stats.clear()
    ours.run()
    assert stats["unique_graphs"] == 2  # the model and the loss
    for one, other in zip(eager.history, ours.history, strict=True):
        assert (one.train_loss, one.arch_loss) == (other.train_loss, other.arch_loss)
    assert all_equal(trained_state(eager.model).values(), trained_state(ours.model).values())


def test_what_does_not_compile_runs_eagerly():
    doubled = Compiled(lambda x: torch._dynamo.graph_break() or 2 * x, captured=False)
    with pytest.warns(UserWarning, match="^training goes on without --compile: "):
        assert doubled(torch.ones(2)).tolist() == [2, 2]
    assert doubled(torch.ones(2)).tolist() == [2, 2]
