"""Recipes: each that ships trains with its methods on a miniature of its data set."""

import json
from pathlib import Path

import miniatures
import pytest
import yaml
from conftest import csv_rows, scores_of, succeed
from hypothesis import strategies as st
from reliability.conftest import fuzz
from run_configs import run_config
from torch.testing import assert_close

from naslora.errors import UserError
from naslora.files import read_json
from naslora.methods import METHODS
from naslora.training.recipe import load_recipe, shipped_recipes
from naslora.training.resolve import resolve
from naslora.training.run_config import RunConfig

# A method for each of the data sets; every method once.
PAIRS = list(zip([*shipped_recipes(), "isic2017", "sbu", "leaf"], METHODS, strict=True))


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    for name, write in miniatures.TREES.items():
        write(root / name)
    return root


def test_there_is_one_for_each_data_set():
    assert set(shipped_recipes()) == set(miniatures.TREES)


@pytest.mark.parametrize("name, method", PAIRS)
def test_each_trains_by_the_command_with_flags_that_override(
    trees, tiny_sam, tmp_path, name, method
):
    root, run, rank = trees / name, tmp_path / "run", "rank" in METHODS[method].config().to_dict()
    small = ("--model", "vit_t", "--image-size", 32, "--epochs", 1, "--mixed-precision", "no")
    small += ("--accumulation", 1, "--search-start", 0, "--workers", 0) + ("--rank", 2) * rank
    command = ("train", "--recipe", name, "--method", method, "--root", root, *small)
    result = succeed(*command, "--output", run)
    assert "is not the paper's" in result.err and "train images instead of" in result.err
    config = read_json(run / "config.json")
    assert (config["recipe"], config["data"]["dataset"]) == (name, name)
    assert (config["model"]["name"], config["method"]) == ("vit_t", method)
    assert not rank or config["adapter"]["rank"] == 2
    assert (config["training"]["epochs"], config["training"]["optimizer"]) == (1, "adamw")
    (epoch,) = csv_rows(run / "history.csv")
    assert bool(epoch["arch_loss"]) == method.startswith("nas-")
    test = read_json(run / "metrics.json")["test"]
    assert list(test["metrics"]) == config["data"]["metrics"]
    if name == "camouflage":
        counts = {group: own["images"] for group, own in test["groups"].items()}
        assert counts == {"CAMO": 1, "CHAMELEON": 2, "COD10K": 1}
        assert list(test["groups"]["CAMO"]["metrics"]) == list(test["metrics"])
    assert test["resolution"] == "of each mask"
    assert "scored at the resolution of each mask" in result.out
    assert "scored at the resolution of each mask" in (run / "report.html").read_text()
    assert_close(scores_of(run)["metrics"], test["metrics"], atol=1e-6, rtol=0)
    assert scores_of(run, "--resolution", "network")["resolution"] == "32 x 32"


def test_a_file_of_ones_own_builds_on_another(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "model: {name: vit_b}\ntraining: {epochs: 3, learning_rate: 1e-3}\n"
        "methods: {mona: {width: 8}, lora: {rank: 5}}\n"
    )
    text = "base: base.yaml\nmethod: mona\ndata: {root: /data}\ntraining: {epochs: 5}\n"
    (tmp_path / "own.yaml").write_text(text + "methods: {lora: {blocks: [0, 2]}}\n")
    own = str(tmp_path / "own.yaml")
    config = load_recipe(own)
    assert (config.model.name, config.data.root) == ("vit_b", Path("/data"))
    assert (config.training.epochs, config.training.learning_rate) == (5, 1e-3)
    assert (config.method, config.adapter.width) == ("mona", 8)
    lora = load_recipe(own, "lora").adapter
    assert (lora.rank, lora.blocks) == (5, (0, 2))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
DEFAULTS = run_config(root="/data", training={"mixed_precision": "no"}).to_dict()
NAMES = {name for v in DEFAULTS.values() if isinstance(v, dict) for name in v}
NAMES = sorted(NAMES.union(DEFAULTS, {"methods", "base", "lora", "width", "colour"}))
SETTINGS = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), VALUES, max_size=3)
RECIPES = st.dictionaries(st.sampled_from(NAMES), VALUES | SETTINGS, max_size=3)


@pytest.mark.parametrize("examples", [60, pytest.param(20_000, marks=pytest.mark.campaign)])
def test_any_recipe_is_read_or_refused_in_one_line(tmp_path, examples):
    path = tmp_path / "own.yaml"

    def check(recipe, name, value):
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        stored = json.loads(json.dumps(DEFAULTS))
        for part in (stored, *(part for part in stored.values() if isinstance(part, dict))):
            if name in part:
                part[name] = value
        for read in (lambda: load_recipe(str(path)), lambda: RunConfig.from_dict(stored)):
            try:
                config = read()
                assert RunConfig.from_dict(config.to_dict()) == config
                assert resolve(resolve(config)) == resolve(config)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000

    fuzz(examples, check, recipe=RECIPES, name=st.sampled_from(NAMES), value=VALUES)
