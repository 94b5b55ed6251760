"""The command line: its help, and that bad input costs one clear line and changes nothing."""

import dataclasses
import json
import pickle
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import naslora as naslora_package
from naslora.methods import METHODS
from naslora.results import LAST
from naslora.sam import encoders as sam
from naslora.sam.segmentation import SamForSegmentation
from naslora.training.run_config import DataConfig, ModelConfig, RunConfig
from naslora.training.train_config import TrainConfig
from naslora_kernels import available_backends

pytestmark = pytest.mark.usefixtures("tiny_vit")

TRAIN = shlex.split("--model vit_t --image-size 32 --epochs 2 --search-start 1 --workers 0")
COMMANDS = ("demo", "train", "evaluate", "predict", "merge", "info")


@pytest.fixture(scope="module")
def clean_run(naslora, clean_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    result = naslora("train", "--data", clean_data, *TRAIN, "--output", output)
    assert result.status == 0, result.err
    return output


@pytest.fixture
def run(clean_run, tmp_path):
    """A copy of a finished run to spoil."""
    return shutil.copytree(clean_run, tmp_path / "run")


@pytest.fixture
def refused(naslora, tmp_path):
    """Runs a command that must fail in one line and leave the disk alone; returns the line."""

    def check(*arguments):
        before = listing(tmp_path)
        result = naslora(*arguments)
        assert result.status == 2, result.err
        lines = [line for line in result.err.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("naslora: error: "), result.err
        assert result.out == ""
        assert listing(tmp_path) == before
        return lines[0]

    return check


@pytest.fixture
def refuses_training(refused, data, tmp_path):
    def check(*options):
        return refused("train", "--data", data, *TRAIN, "--output", tmp_path / "out", *options)

    return check


def listing(folder):
    # The time of a folder changes with the lock in it.
    stats = {path: path.stat() for path in folder.rglob("*")}
    return {p: (p.is_file() and s.st_mtime_ns, s.st_size) for p, s in stats.items()}


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


# --- Checkpoints ---


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint file of the tiny ``vit_t`` in the form that its suffix says."""

    def make(name):
        state = SamForSegmentation("vit_t", 32).state_dict()
        save = save_file if name.endswith(".safetensors") else torch.save
        save(state, tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", ["sam.pth", "sam.safetensors"])
def test_missing_checkpoint(refuses_training, tmp_path, name):
    line = refuses_training("--checkpoint", tmp_path / name)
    assert str(tmp_path / name) in line and "does not exist" in line


@pytest.mark.parametrize("name", ["sam.pth", "sam.safetensors"])
def test_truncated_checkpoint(refuses_training, checkpoint, name):
    path = checkpoint(name)
    truncate(path)
    line = refuses_training("--checkpoint", path)
    assert str(path) in line and ("truncated" in line or "damaged" in line)


@pytest.mark.parametrize("name", ["sam.pth", "sam.safetensors"])
def test_checkpoint_of_another_size(refuses_training, checkpoint, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setitem(sam.VITS, "vit_t", sam.ViT(48, 2, 2, (1,)))
        path = checkpoint(name)
    line = refuses_training("--checkpoint", path)
    assert str(path) in line and "does not fit model vit_t" in line and "--model" in line


def test_checkpoint_of_something_else(refuses_training, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    assert "no SAM checkpoint" in refuses_training("--checkpoint", tmp_path / "other.pth")


class Payload:
    def __reduce__(self):
        return open, (str(self.target), "w")


def test_checkpoints_run_no_code(refuses_training, tmp_path):
    payload = Payload()
    payload.target = tmp_path / "executed"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(payload, protocol=2))
    torch.save({"image_encoder.pos_embed": payload}, tmp_path / "zip.pth")
    for name in ("evil.pth", "zip.pth"):
        assert name in refuses_training("--checkpoint", tmp_path / name)
    assert not payload.target.exists()


def test_good_checkpoints_train(naslora, data, checkpoint, tmp_path):
    path = checkpoint("sam.safetensors")
    options = [*TRAIN, "--method", "lora", "--checkpoint", path, "--output", tmp_path / "run"]
    assert naslora("train", "--data", data, *options).status == 0
    assert naslora("evaluate", tmp_path / "run").status == 0
    path.unlink()
    assert "does not exist" in naslora("evaluate", tmp_path / "run").err


# --- Data ---


def test_csv_with_missing_files(refuses_training, data):
    with (data / "val.csv").open("a") as file:
        file.write("images/nowhere.png,masks/val0.png\n")
    line = refuses_training()
    assert "images/nowhere.png" in line and "val.csv row 4" in line


def test_csv_with_other_columns(refuses_training, data):
    text = (data / "train.csv").read_text().replace("image,label", "picture,mask")
    (data / "train.csv").write_text(text)
    line = refuses_training()
    assert "train.csv" in line and "mask, picture" in line and "image,label" in line


def test_csv_missing(refuses_training, data):
    (data / "test.csv").unlink()
    assert "test.csv missing" in refuses_training()


def test_image_and_mask_of_different_sizes(refuses_training, data):
    Image.new("L", (32, 31)).save(data / "masks/train2.png")
    line = refuses_training()
    assert "train.csv row 4" in line and "32x32" in line and "32x31" in line


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_unreadable_file(refuses_training, data, kind):
    truncate(data / kind / "test1.png")
    line = refuses_training()
    assert "test.csv row 3" in line and f"{kind}/test1.png" in line


def test_labels_beyond_the_classes(refuses_training, data):
    Image.fromarray(np.full((32, 32), 5, np.uint8)).save(data / "masks/train0.png")
    line = refuses_training("--num-classes", "3")
    assert "train.csv row 2" in line and "labels 5, beyond the 3 classes" in line


def test_no_data(refused, tmp_path):
    line = refused("train", *TRAIN, "--output", tmp_path / "out")
    assert "no data: give --data DIR" in line


def test_data_folder_missing(refused, tmp_path):
    line = refused("train", "--data", tmp_path / "no", *TRAIN, "--output", tmp_path / "out")
    assert f"{tmp_path / 'no'} does not exist" in line


# --- Settings ---


@pytest.mark.parametrize(
    "options, message",
    [
        ("--target nothing", "no layer matches target 'nothing'"),
        ("--target mlp$", "not nn.Linear"),
        ("--target [", "no regular expression"),
        ("--blocks 7", "blocks must lie in 0..1"),
        ("--model vit_x", "model must be one of vit_t"),
        ("--image-size 40", "multiple of 16, got 40"),
        ("--num-classes 3 --metrics s_alpha", "'s_alpha' is defined for binary masks only"),
        ("--num-classes 3 --class-names one", "class_names must name the 2 foreground classes"),
        ("--palette #000000 nocolour", "--palette"),
        ("--arch-data split", "has no split 'arch'"),
    ],
)
def test_settings_out_of_range(refuses_training, options, message):
    assert message in refuses_training(*options.split())


def test_backend_that_the_environment_misnames(refuses_training, monkeypatch):
    monkeypatch.setenv("NASLORA_BACKEND", "fast")
    assert "backend 'fast' cannot be used here: it does not exist" in refuses_training()


def test_fp16_on_a_cpu(refuses_training):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "fp16 needs a GPU" in refuses_training("--mixed-precision", "fp16")


@pytest.mark.parametrize("options", ["--rank three", "--no-such-option 1", "--cell-init other"])
def test_what_cannot_be_parsed(naslora, data, tmp_path, options):
    arguments = ("--data", data, *TRAIN, "--output", tmp_path / "out", *options.split())
    result = naslora("train", *arguments)
    assert result.status == 2 and options.split()[0] in result.err
    assert "Traceback" not in result.err and not (tmp_path / "out").exists()


# --- Folders of runs ---


def test_run_folder_exists(refused, run, data):
    line = refused("train", "--data", data, *TRAIN, "--output", run)
    assert f"{run} exists and is not empty" in line and "--resume" in line


def test_merge_into_a_run(refused, run):
    assert f"{run} exists and is not empty" in refused("merge", run, "--output", run)


def test_output_is_a_file(refused, run, data):
    line = refused("train", "--data", data, *TRAIN, "--output", data / "train.csv")
    assert "train.csv is a file" in line
    for command in (
        ("train", "--data", data, *TRAIN, "--output", data / "train.csv" / "run"),
        ("merge", run, "--output", data / "train.csv" / "merged"),
        ("predict", run, data / "images", "--output", data / "train.csv"),
    ):
        assert "cannot be written" in refused(*command)


def test_nothing_to_resume(refused, data):
    line = refused("train", "--data", data, *TRAIN, "--output", data, "--resume")
    assert "holds files, but no run" in line


def test_resume_from_a_damaged_checkpoint(refused, run, clean_data):
    truncate(run / LAST)
    line = refused("train", "--data", clean_data, *TRAIN, "--output", run, "--resume")
    assert f"cannot resume from {run / LAST}" in line


def test_adapter_of_other_shapes(refused, run):
    stored = json.loads((run / "adapter" / "adapter_config.json").read_text())
    stored["config"]["rank"] = 6
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(stored))
    assert "adapter_config.json does not match its checksum" in refused("evaluate", run)
    del stored["sha256"], stored["version"]
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(stored))
    line = refused("evaluate", run)
    assert "does not fit this model" in line and "dw_sep5 has shape (2, 5, 5) in the file" in line


def test_damaged_run(refused, run):
    truncate(run / "adapter" / "adapter_model.safetensors")
    assert "adapter_model.safetensors is damaged" in refused("evaluate", run)
    (run / "config.json").write_text("{")
    assert "config.json cannot be read as JSON" in refused("evaluate", run)
    (run / "config.json").write_text("[]")
    assert "is no configuration of this version" in refused("evaluate", run)


def test_not_a_run(refused, data, tmp_path):
    assert f"{data} is no run" in refused("evaluate", data)
    assert "is no run" in refused("merge", tmp_path / "no", "--output", tmp_path / "merged")


def test_unknown_split(refused, run):
    assert "split must be one of train, val, test, got 'dev'" in refused(
        "evaluate", run, "--split", "dev"
    )


def test_a_merged_model_is_not_merged_again(naslora, refused, run, tmp_path):
    assert naslora("merge", run, "--output", tmp_path / "merged").status == 0
    line = refused("merge", tmp_path / "merged", "--output", tmp_path / "again")
    assert "nothing to merge" in line


def test_predict_checks_every_image_first(refused, run, data, tmp_path):
    truncate(data / "images/val1.png")
    line = refused("predict", run, data / "images", "--output", tmp_path / "out")
    assert "val1.png cannot be read" in line


def test_predict_without_images(refused, run, data, tmp_path):
    (tmp_path / "empty").mkdir()
    output = ("--output", tmp_path / "out")
    assert "no images in" in refused("predict", run, tmp_path / "empty", *output)
    assert "no.png does not exist" in refused("predict", run, tmp_path / "no.png", *output)
    twice = (data / "images/val1.png",) * 2
    assert "two images are called 'val1'" in refused("predict", run, *twice, *output)


def test_a_loss_that_is_not_finite(naslora, data, tmp_path):
    output = tmp_path / "out"
    rate = ("--learning-rate", "1e30", "--output", output)
    result = naslora("train", "--data", data, *TRAIN, *rate)
    assert result.status == 2 and "Traceback" not in result.err
    (line,) = (line for line in result.err.splitlines() if line.startswith("naslora: error: "))
    assert re.search(r"the loss is (nan|inf) in epoch 1/2 on ", line)
    assert "lower --learning-rate" in line
    assert not (output / LAST).exists() and not (output / "adapter").exists()


# --- Help and info ---


def test_info_is_json(naslora):
    result = naslora("info")
    assert result.status == 0 and result.err == ""
    described = json.loads(result.out)
    assert described["backends"] == available_backends()
    assert described["backends"]["reference"] is None and "version" in described["build"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(naslora, command):
    result = naslora(command, "--help")
    assert result.status == 0 and f"usage: naslora {command}" in result.out


def test_help_shows_what_most_people_need_first(naslora):
    shown = re.findall(r"^│? *(--[a-z][a-z-]*)", naslora("train", "--help").out, re.MULTILINE)
    assert {"--output", "--data", "--model", "--checkpoint", "--num-classes", "--epochs"} < {*shown}
    assert len(shown) <= 15 and "--help-all" in naslora("train", "--help").out


@pytest.mark.parametrize(
    "arguments, meant",
    [("train --lr 1", "--learning-rate"), ("train --epoch 1", "--epochs"), ("trian", "train")],
)
def test_what_was_meant(refused, tmp_path, arguments, meant):
    line = refused(*arguments.split(), "--output", tmp_path / "out")
    assert f"did you mean {meant}?" in line


def test_the_version(naslora):
    assert naslora("--version").out == f"naslora {naslora_package.__version__}\n"


def test_help_names_the_commands(naslora):
    assert all(command in naslora("--help").out for command in COMMANDS)


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_an_option_of_train(naslora, method):
    text = naslora("train", "--method", method, "--help-all").out
    kinds = (RunConfig, DataConfig, ModelConfig, TrainConfig, METHODS[method].config)
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    for name in (names - {"data", "name", "adapter", "training"}) | {"model", "data"}:
        assert re.search(rf"--{name.replace('_', '-')}\b", text), name
