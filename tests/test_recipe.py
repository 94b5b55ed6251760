"""The shipped recipes: each is read and trains on a miniature of its data set."""

import dataclasses
import json
from pathlib import Path

import miniatures
import pytest

from naslora.errors import UserError
from naslora.methods import METHODS
from naslora.training.accelerator import make_accelerator
from naslora.training.recipe import load_recipe, shipped_recipes
from naslora.training.run_data import find_splits, make_dataset
from naslora.training.run_model import build_adapted_model
from naslora.training.trainer import Trainer

SMALL = {"model": "vit_t", "image_size": 32}


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    for name, write in miniatures.TREES.items():
        write(root / name)
    return root


def test_there_is_one_for_each_row():
    names = set(shipped_recipes())
    # Table 1: seven data sets, twelve methods, SAM from scratch among them; Tables 2 and 3: eight.
    assert len(names) == 7 * 12 + 2 * 8
    assert {name.split("/")[0] for name in names} == set(miniatures.TREES)
    assert {name.split("/")[1] for name in names} <= set(METHODS)


def test_the_settings_are_those_written_down():
    config = load_recipe("isic2017/nas-pc-lora")
    assert (config.dataset, config.method, config.model) == ("isic2017", "nas-pc-lora", "vit_h")
    training = config.training
    assert (training.optimizer, training.learning_rate) == ("adamw", 1e-4)
    assert (training.weight_decay, training.epochs) == (1e-4, 30)
    assert (training.search_start, training.schedule) == (10, "linear")
    assert (training.batch_size, training.accumulation, training.clip_norm) == (4, 4, 1.0)
    assert (training.alpha_learning_rate, training.mixed_precision) == (3e-4, "fp16")
    assert (config.image_size, config.resolution) == (1024, "original")
    assert (config.adapter.rank, config.adapter.scaling) == (3, 32 / 3)
    # Another rate or number of epochs on four data sets, the rest as above
    rates = {"leaf": (3e-4, 30), "roads": (3e-4, 20), "camouflage": (1e-4, 20), "sbu": (1e-4, 10)}
    for dataset, expected in rates.items():
        training = load_recipe(f"{dataset}/nas-lora").training
        assert (training.learning_rate, training.epochs) == expected
        assert training.search_start < training.epochs and training.optimizer == "adamw"


@pytest.mark.parametrize("name", shipped_recipes())
def test_each_trains_two_steps(name, trees, tiny_vit, tmp_path, fresh_accelerate, monkeypatch):
    config = load_recipe(name)
    assert name == f"{config.dataset}/{config.method}" and config.recipe == name
    training = dataclasses.replace(
        config.training, epochs=1, search_start=0, workers=0, mixed_precision="no", accumulation=1
    )
    config = dataclasses.replace(
        config, **SMALL, root=trees / config.dataset, resolution="network", training=training
    )
    splits = find_splits(config)
    size = -(-len(splits["train"]) // 2)  # two steps an epoch
    config = dataclasses.replace(config, training=dataclasses.replace(training, batch_size=size))
    data = {split: make_dataset(config, samples) for split, samples in splits.items()}
    model = build_adapted_model(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    accelerator = make_accelerator(config.training)
    names = config.foreground_names
    monkeypatch.setattr(Trainer, "_save", lambda self, is_best: None)
    trained = Trainer(model, data, config.training, 0, tmp_path, names, accelerator)
    trained.run()
    after = model.state_dict()
    changed = {key for key, value in before.items() if not value.equal(after[key])}
    assert any(key.startswith("mask_decoder.") for key in changed)
    assert any(key.startswith("image_encoder.") for key in changed) == (
        config.method != "decoder-only"
    )
    assert (trained.history[0].arch_loss is not None) == config.searches


@pytest.mark.parametrize("name", ["sbu/nas-pc-lora", "camouflage/lora"])
def test_the_command_with_flags_that_override(naslora, trees, tiny_vit, tmp_path, name):
    dataset = name.split("/")[0]
    arguments = ("--recipe", name, "--root", trees / dataset, "--output", tmp_path / "run")
    small = ("--model", "vit_t", "--image-size", 32, "--epochs", 1, "--mixed-precision", "no")
    result = naslora("train", *arguments, *small, "--workers", 0)
    assert result.status == 0, result.err
    assert "is not the paper's" in result.err and "train images instead of" in result.err
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["recipe"], config["dataset"], config["model"]) == (name, dataset, "vit_t")
    assert (config["training"]["epochs"], config["training"]["optimizer"]) == (1, "adamw")
    test = json.loads((tmp_path / "run/metrics.json").read_text())["test"]
    assert list(test["metrics"]) == list(load_recipe(name).metrics)
    assert test["resolution"] == "of each mask"
    if dataset == "camouflage":
        counts = {group: own["images"] for group, own in test["groups"].items()}
        assert counts == {"CAMO": 1, "CHAMELEON": 2, "COD10K": 1}
        assert list(test["groups"]["CAMO"]["metrics"]) == list(test["metrics"])
    assert "scored at the resolution of each mask" in result.out
    report = (tmp_path / "run/report.html").read_text()
    assert "scored at the resolution of each mask" in report
    again = naslora("evaluate", tmp_path / "run")
    assert json.loads(again.out)["metrics"] == pytest.approx(test["metrics"], abs=1e-6)
    network = naslora("evaluate", tmp_path / "run", "--resolution", "network")
    assert json.loads(network.out)["resolution"] == "32 x 32"


def test_sams_weights_are_asked_for(naslora, trees, tmp_path):
    arguments = ("--recipe", "sbu/lora", "--root", trees / "sbu", "--mixed-precision", "no")
    result = naslora("train", *arguments, "--output", tmp_path / "run")
    assert result.status == 2 and "give --checkpoint FILE, the vit_h checkpoint" in result.err
    assert not (tmp_path / "run").exists()


# --- recipes of one's own


def test_a_file_of_ones_own_builds_on_another(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "model: vit_b\ntraining:\n  epochs: 3\n  learning_rate: 1e-3\n"
    )
    text = "base: base.yaml\nroot: /data\ntraining:\n  epochs: 5\nadapter:\n  blocks: [0, 2]\n"
    (tmp_path / "own.yaml").write_text(text)
    config = load_recipe(str(tmp_path / "own.yaml"))
    assert (config.model, config.root, config.adapter.blocks) == ("vit_b", Path("/data"), (0, 2))
    assert (config.training.epochs, config.training.learning_rate) == (5, 1e-3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("- a\n", "expected lines such as method"),
        ("speed: 3\n", "speed"),
        ("training:\n  pace: 3\n", "pace"),
        ("training:\n  epochs: many\n", "is no recipe"),
        ("method: [\n", "cannot be read"),
        ("training:\n  epochs: 0\n", "epochs must be at least 1"),
    ],
)
def test_what_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_recipes_list_what_there_is(naslora, tmp_path):
    result = naslora("train", "--recipe", "isic/nas", "--output", tmp_path / "run")
    assert result.status == 2 and result.err.count("\n") == 1
    assert "there is no recipe 'isic/nas'" in result.err and "isic2017" in result.err
