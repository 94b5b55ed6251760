"""A run from its first file to its last: what it holds, that it reloads, that a kill is no loss."""

import dataclasses
import io
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from adapted_models import differing
from conftest import csv_rows, scores_of, succeed, write_data
from miniatures import save
from PIL import Image
from rich.console import Console

from naslora import UserError, merge, prediction
from naslora.data import demo_data
from naslora.files import read_json, read_safetensors
from naslora.results import ADAPTER
from naslora.sam import vits as sam
from naslora.sam.segmentation import SamForSegmentation
from naslora.training import progress
from naslora.training import run as run_module
from naslora.training.run_config import ModelConfig, RunConfig
from naslora_kernels import OPERATIONS

pytestmark = pytest.mark.usefixtures("tiny_sam")

EPOCHS = 3
# At a rate this high the little that is trained here predicts more than background.
TRAIN = shlex.split(
    f"--model vit_t --image-size 32 --num-classes 3 --class-names rim core --epochs {EPOCHS} "
    "--search-start 1 --learning-rate 3e-3 --workers 0"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "rings", classes=3, train=12, val=4, test=5)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run; tests only read it."""
    output = tmp_path_factory.mktemp("runs") / "run"
    result = succeed("train", "--data", data, *TRAIN, "--output", output)
    assert f"epoch {EPOCHS}" in result.out and "report.html" in result.out
    return output


def adapter(run):
    return read_safetensors(run / ADAPTER / "adapter_model.safetensors")


# --- What a run shows ---


def test_without_a_terminal_lines_tell_how_long_a_run_takes(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", -1.0)
    console = Console(file=io.StringIO())
    with progress.TrainProgress(console, 5) as shown:
        shown.start_pass("epoch 1/1")
        for _ in range(4):
            shown.finish_step(0.5, 4)
    text = console.file.getvalue()
    assert re.search(r"epoch 1/1  step 3/5  loss 0\.500  [\d.]+ images/s  about 0\.0 s left", text)
    assert "nan" not in text


# --- What a run's folder holds ---


def test_the_folder(run):
    expected = {"adapter", "last.pt", "config.json", "data.json", "metrics.json", "history.csv"}
    expected |= {"operations.json", "report.html", "tensorboard", "test_images.csv"}
    assert {path.name for path in run.iterdir()} == expected
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    names = sorted(path.name for path in (run / ADAPTER).iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    report = (run / "report.html").read_text()
    assert "core" in report and "http://" not in report.replace("http://www.w3.org", "")


def test_metrics(run):
    metrics = read_json(run / "metrics.json")
    for scores in (metrics["test"], *metrics["test_merged"].values()):
        assert 0 <= scores["dice"] <= 1 and 0 <= scores["iou"] <= scores["dice"]
        assert set(scores["per_class"]) == {"rim", "core"}
    assert metrics["test"]["dice"] > 0.05  # enough to tell a merged model from an empty one
    modes = {"exact", "center", "calibrated"}
    assert set(metrics["test_merged"]) == set(metrics["merge"]) == modes
    # The promise of the exact merge: the same Dice to three decimals.
    exact = metrics["test_merged"]["exact"]["dice"]
    assert exact == pytest.approx(metrics["test"]["dice"], abs=5e-4)
    assert max(layer["update_error"] for layer in metrics["merge"]["exact"]["layers"]) < 1e-4
    assert metrics["images"] == {"train": 12, "val": 4, "test": 5}
    assert metrics["seconds"] > 0 and metrics["weights"] == "none"
    (note,) = [note for note in metrics["notes"] if "random, frozen weights" in note]
    assert note in (run / "report.html").read_text()


def test_a_run_in_bfloat16_is_scored_and_merged_in_float32(data, tmp_path, monkeypatch):
    """It ends before alpha trains, which has a warning. A refused mode leaves the others."""

    def merging(model, mode, batches):
        if mode == "calibrated":
            raise UserError("too few images")
        return merge(model, mode, batches)

    monkeypatch.setattr("naslora.training.run.merge", merging)
    output = tmp_path / "run"
    options = ["--data", data, *TRAIN, "--epochs", 1, "--mixed-precision", "bf16"]
    warning = "naslora: warning: alpha is not trained: --search-start 1 is not among the 1 epochs"
    assert warning in succeed("train", *options, "--output", output).err
    metrics, scores = read_json(output / "metrics.json"), scores_of(output)
    assert scores.pop("images") == 5 and scores == metrics["test"]
    weights = adapter(output)
    assert {value.dtype for value in weights.values()} <= {torch.float32, torch.int64}
    assert all(value.any() for name, value in weights.items() if name.endswith("lora_B"))  # trained
    assert max(layer["update_error"] for layer in metrics["merge"]["exact"]["layers"]) < 1e-4
    assert metrics["merge"]["calibrated"]["refused"] == "too few images"
    assert "calibrated: too few images." in (output / "report.html").read_text()


def test_history_and_operations(run):
    rows = csv_rows(run / "history.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["stage"] for row in rows] == ["1", "2", "2"]
    assert [bool(row["arch_loss"]) for row in rows] == [False, True, True]
    metrics = read_json(run / "metrics.json")
    assert metrics["kept_epoch"] == EPOCHS
    assert metrics["val"]["dice"] == float(rows[-1]["val_dice"])
    operations = read_json(run / "operations.json")
    assert operations["operations"] == list(OPERATIONS) and len(operations["layers"]) == 8
    mixtures = np.array([entry["softmax"] for entry in operations["epochs"]])
    assert mixtures.shape == (EPOCHS + 1, 8, 8) and np.allclose(mixtures.sum(-1), 1)


# --- What can be done with it ---


def test_evaluate_repeats_the_test(run, tmp_path):
    scores, tested = scores_of(run), read_json(run / "metrics.json")["test"]
    assert scores.pop("images") == 5
    # The same weights, images and batches in the same process: the same numbers.
    assert scores == tested
    assert scores_of(run, "--split", "val")["images"] == 4
    scores = scores_of(run, "--metrics", "hd95", "ece")["metrics"]
    assert scores["hd95"] > 0 and 0 < scores["ece"] < 1
    flipped = scores_of(run, "--flips")
    assert flipped["loss"] == tested["loss"] and flipped["dice"] != tested["dice"]  # of the image
    other = write_data(tmp_path / "other", classes=3, train=2, val=1, test=3)
    assert scores_of(run, "--data", other)["images"] == 3


@pytest.mark.parametrize("mode", ["exact", "center"])
def test_merge_then_evaluate(run, tmp_path, mode):
    folder = tmp_path / mode
    assert f"mode {mode!r}" in succeed("merge", run, "--mode", mode, "--output", folder).out
    assert {path.name for path in folder.iterdir()} == {"merged.json", "model.safetensors"}
    scores = scores_of(folder)
    scores.pop("images")
    assert scores == read_json(run / "metrics.json")["test_merged"][mode]
    if mode == "center":  # it loads into an untouched model
        tensors = read_safetensors(folder / "model.safetensors")
        SamForSegmentation("vit_t", 32, 3).load_state_dict(tensors, strict=True)


def test_predict_files_and_folders(run, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    sizes = {"in/a.png": (40, 30), "in/b.jpg": (17, 50), "c.png": (64, 64)}
    for name, size in sizes.items():
        save(tmp_path / name, rng.integers(0, 255, (*size[::-1], 3)))
    command = "predict", run, tmp_path / "in", tmp_path / "c.png", "--output"
    assert "wrote 3 masks and overlays" in succeed(*command, tmp_path / "o").out
    for name, size in sizes.items():
        stem = name.split("/")[-1][0]
        mask = Image.open(tmp_path / "o" / f"{stem}_mask.png")
        assert mask.size == size and set(np.unique(mask)) <= {0, 1, 2}
        assert Image.open(tmp_path / "o" / f"{stem}_overlay.jpg").size == size
    assert len(list((tmp_path / "o").glob("?_*"))) == 6
    monkeypatch.setattr(prediction, "OVERLAY_SIDE", 20)
    succeed(*command, tmp_path / "small")
    for name, (width, height) in {"a": (20, 15), "b": (6, 17), "c": (16, 16)}.items():
        overlay = Image.open(tmp_path / "small" / f"{name}_overlay.jpg")
        assert overlay.size == (width, height)
    assert "wrote 3 masks to" in succeed(*command, tmp_path / "p", "--no-overlays").out
    for mask in (tmp_path / "p").glob("*.png"):
        assert mask.read_bytes() == (tmp_path / "o" / mask.name).read_bytes()


# --- Resuming: tests/reliability/test_kills.py has runs that were interrupted ---


def test_a_finished_run_finishes_again(run, data, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    succeed("train", "--data", data, *TRAIN, "--output", copy, "--resume")
    assert not differing(adapter(copy), adapter(run))
    metrics = [read_json(folder / "metrics.json") | {"seconds": None} for folder in (copy, run)]
    assert metrics[0] == metrics[1]


def test_the_demo(tmp_path, monkeypatch):
    """The demo's own settings on a few of its images, small and whole, and again with --resume."""
    pytest.importorskip("nilearn")

    def small(**values):
        values["data"] = dataclasses.replace(values["data"], crop=192)
        values["training"] = dataclasses.replace(values["training"], workers=0)
        return RunConfig(**{**values, "model": ModelConfig("vit_t", None, 48)})

    slices = [("train", 60, 63), ("val", 68, 69), ("test", 84, 86), ("arch", 122, 123)]
    monkeypatch.setattr(demo_data, "BLOCKS", slices)
    monkeypatch.setattr(run_module, "RunConfig", small)
    assert sam.VITS["vit_t"].depth == 2
    for resume in ([], ["--resume"]):
        succeed("demo", "--output", tmp_path / "demo", "--epochs", "1", *resume)
        metrics = read_json(tmp_path / "demo" / "metrics.json")
        assert set(metrics["test"]["per_class"]) == {"grey matter", "white matter"}
        assert metrics["images"] == {"train": 4, "val": 2, "test": 3, "arch": 2}
