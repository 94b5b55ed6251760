"""The command line: its help, checkpoints, and a loss that is not finite.

tests/reliability/bad_inputs.yaml has the input that costs one line.
"""

import dataclasses
import json
import re
from unittest import mock

import pytest
import torch
from conftest import TRAIN, call, refusal, succeed, write_checkpoint

import naslora as naslora_package
from naslora.exits import guarded
from naslora.methods import METHODS
from naslora.results import LAST
from naslora.training.run_config import (
    DataConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    TrainConfig,
)
from naslora_kernels import available_backends

pytestmark = pytest.mark.usefixtures("tiny_sam")

COMMANDS = ("demo", "train", "evaluate", "predict", "merge", "info")


@pytest.fixture
def trained(clean_data, tmp_path):
    """Trains with options: the result, and the line of its error."""

    def train(*options):
        output = ("--output", tmp_path / "run")
        result = call("train", "--data", clean_data, *TRAIN, *options, *output)
        lines = [line for line in result.err.splitlines() if line.startswith("naslora: error: ")]
        assert len(lines) == (result.status == 2) and "Traceback" not in result.err, result.err
        return result, *lines

    return train


def test_good_checkpoints_train(trained, tmp_path):
    path = write_checkpoint(tmp_path / "sam.safetensors")
    assert trained("--method", "lora", "--checkpoint", path)[0].status == 0
    succeed("evaluate", tmp_path / "run")
    path.unlink()
    assert "does not exist" in refusal("evaluate", tmp_path / "run")


def test_a_backend_that_the_environment_misnames(trained, monkeypatch):
    monkeypatch.setenv("NASLORA_BACKEND", "fast")
    assert "backend 'fast' cannot be used here: it does not exist" in trained()[1]


def test_a_loss_that_is_not_finite(trained, tmp_path):
    _, line = trained("--learning-rate", "1e30")
    assert re.search(r"the loss is (nan|inf) in epoch 1/2 on ", line)
    assert "lower --learning-rate" in line
    assert not (tmp_path / "run" / LAST).exists() and not (tmp_path / "run" / "adapter").exists()


# --- Help and info ---


def test_info_is_json():
    result = succeed("info")
    assert result.err == ""
    described = json.loads(result.out)
    assert described["backends"] == available_backends()
    assert described["backends"]["reference"] is None and "version" in described["build"]


def test_models_are_listed_with_their_checkpoints():
    lines = succeed("models").out.splitlines()
    named = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert named["vit_b"] == "hf:facebook/sam-vit-base" and named["sam3"].startswith("hf:")
    assert named["vit_t"] == "its weights are in the package"


def test_a_refusal_of_the_machine_is_one_line_and_a_defect_is_raised(capfd):
    for error in (torch.OutOfMemoryError(), RuntimeError("can't allocate memory: 8 bytes")):
        with pytest.raises(SystemExit):
            guarded(mock.Mock(side_effect=error), ())
        assert "error: there is not enough memory; lower --batch-size" in capfd.readouterr().err
    with pytest.raises(RuntimeError, match="a defect"):
        guarded(mock.Mock(side_effect=RuntimeError("a defect")), ())


def test_help_shows_what_most_people_need_first():
    text = call("train", "--help").out
    shown = re.findall(r"^│? *(--[a-z][a-z-]*)", text, re.MULTILINE)
    assert {"--output", "--data", "--model", "--checkpoint", "--num-classes", "--epochs"} < {*shown}
    assert len(shown) <= 15 and "--help-all" in text


def test_the_help_of_an_option_has_no_line_breaks_of_the_source(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    help_ = call("predict", "--help").out
    assert "auto takes the windows of --crop" in help_ and "write label images, in which" in help_


def test_the_version():
    assert call("--version").out == f"naslora {naslora_package.__version__}\n"


def test_help_names_the_commands():
    text = call("--help").out
    for command in COMMANDS:
        result = call(command, "--help")
        assert command in text and f"usage: naslora {command}" in result.out and result.status == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_an_option_of_train(method):
    text = call("train", "--method", method, "--help-all").out
    kinds = (RunConfig, DataConfig, ModelConfig, PromptConfig, TrainConfig, METHODS[method].config)
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    for name in (names - {"data", "name", "adapter", "training", "prompts"}) | {"model", "data"}:
        assert re.search(rf"--{name.replace('_', '-')}\b", text), name
