"""Faults of the data: empty masks, copies between splits, changes between starts, bad images."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import TRAIN, call, refusal, succeed
from miniatures import noise
from PIL import Image

from naslora.files import read_json
from reliability.conftest import PROGRAM

pytestmark = pytest.mark.usefixtures("tiny_sam")


def empty(mask):
    Image.new("L", Image.open(mask).size).save(mask)


# ---- What the splits hold ------------------------------------------------------------------------


def test_empty_masks_and_copies_of_training_images_have_warnings(data, tmp_path):
    for split in ("val", "test"):
        for mask in (data / "masks").glob(f"{split}*"):
            empty(mask)
    copied, original = (sorted((data / "images").glob(f"{s}*"))[0] for s in ("test", "train"))
    shutil.copy(original, copied)
    result = succeed("train", "--data", data, *TRAIN, "--output", tmp_path / "run")
    lines = [
        f"naslora: warning: all 2 masks of the split '{split}' are empty, so it has no Dice; check "
        "the masks and --num-classes\n"
        for split in ("val", "test")
    ]
    lines.append(
        "naslora: warning: 1 of 2 images of the split 'test' are copies of training images, first "
        f"{copied} of {original}; its scores are too good; remove them from one of the splits\n"
    )
    assert [result.err.count(line) for line in lines] == [1, 1, 1]
    assert "0.0000" not in result.out and "val Dice -" in result.err
    metrics = read_json(tmp_path / "run" / "metrics.json")
    for scores in (metrics["test"], metrics["val"], metrics["test_merged"]["exact"]):
        assert scores["dice"] is None and scores["iou"] is None
    assert metrics["test"]["metrics"]["dice"] is None
    assert metrics["test"]["accuracy"] is not None
    again = succeed("evaluate", tmp_path / "run").err
    assert "all 2 masks of the split 'test' are empty" in again


def changes(data, images, masks, rows):
    """Changes files, or the rows of a list, in one way after another; yields the name of each."""
    pixels = np.array(Image.open(images[1]))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(images[1])
    yield f"{images[1]} has another content"
    empty(masks[0])
    yield f"the mask of {images[0]} has another content"
    del rows[-1]
    yield f"{images[-1]} is missing"
    shutil.copy(images[0], data / "images/more.png")
    rows.append(f"images/more.png,masks/{masks[0].name}")
    yield f"{data / 'images/more.png'} is new"
    rows[1:] = rows[:0:-1]
    yield f"{images[-1]} and others are in another order"


def test_data_that_changed_between_starts_is_named(data, tmp_path):
    command = ("train", "--data", data, *TRAIN, "--epochs", 1, "--output", tmp_path / "run")
    succeed(*command)
    before = (tmp_path / "run/data.json").read_bytes()
    images, masks = (sorted((data / kind).glob("train*")) for kind in ("images", "masks"))
    whole = shutil.copytree(data, tmp_path / "whole")
    first = (data / "train.csv").read_text().splitlines()
    rows = first.copy()
    for what in changes(data, images, masks, rows):
        (data / "train.csv").write_text("\n".join(rows) + "\n")
        assert refusal(*command, "--resume").splitlines()[-1] == (
            f"naslora: error: the data has changed since the run was started: {what}; restore it, "
            "or start a new run with another --output"
        )
        assert (tmp_path / "run/data.json").read_bytes() == before
        shutil.copytree(whole, data, dirs_exist_ok=True)
        rows[:] = first


# ---- predict -------------------------------------------------------------------------------------


def test_predict_in_its_input_folder(run, tmp_path):
    """Its own masks are no inputs; one drawn by hand is, and is not overwritten."""
    folder = tmp_path / "in"
    noise(folder, 3, (16, 20))
    for options in ((), ("--overwrite",)):
        result = succeed("predict", run, folder, "--output", folder, *options)
        assert "wrote 3 masks and overlays" in result.out
    refused = refusal("predict", run, folder, "--output", folder)
    assert "6 of the files to write exist, first " in refused
    assert len(list(folder.iterdir())) == 10  # with manifest.csv
    folder = tmp_path / "drawn"
    drawn = folder / "00_mask.png"
    shutil.copy(*noise(folder, 1, (16, 20)), drawn)
    before = drawn.read_bytes()
    refused = refusal("predict", run, folder, "--output", folder)
    assert len(refused.splitlines()) == 1
    assert f"{drawn} is an input, and the prediction for {folder / '00.png'}" in refused
    assert drawn.read_bytes() == before and len(list(folder.iterdir())) == 2


def test_truncated_images(run, tmp_path):
    """They end predict before it writes, unless --skip-errors leaves them out."""
    folder = tmp_path / "in"
    noise(folder, 20, (16, 20))
    for name, length in (("07.png", 200), ("11.png", 0)):
        (folder / name).write_bytes((folder / name).read_bytes()[:length])
    command = ("predict", run, folder, "--output", tmp_path / "out")
    line = refusal(*command).splitlines()[-1]
    assert f"image {folder / '07.png'} cannot be read" in line and not (tmp_path / "out").exists()
    result = call(*command, "--skip-errors")
    assert result.status == 1 and "wrote 18 masks and overlays" in result.out
    skipped = [line for line in result.err.splitlines() if line.startswith("naslora: skipped: ")]
    assert "07.png" in skipped[0] and "11.png" in skipped[1] and len(skipped) == 2
    assert len(list((tmp_path / "out").glob("??_*"))) == 36
    for name in ("07.png", "11.png"):
        (folder / name).unlink()
    assert "skipped" not in succeed(*command, "--skip-errors", "--overwrite").err


# ---- Memory --------------------------------------------------------------------------------------


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("name", "side", "options", "most"),
    [("large.jpg", 9000, (), 1.5e9), ("large.tif", 20_000, ("--tiles", 1024), 1.7e9)],
)
def test_images_of_81_and_400_megapixels(run, tmp_path, monkeypatch, name, side, options, most):
    """The larger one has 1.2 GB decoded, of which a row of tiles is in memory. PyTorch takes 0.5
    GB."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    small = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(small).resize((side, side), Image.Resampling.NEAREST).save(tmp_path / name)
    # ru_maxrss would include this process, which the other one was forked from.
    code = "print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
    arguments = map(str, ("predict", run, tmp_path / name, "--output", tmp_path / "out", *options))
    command = [sys.executable, "-c", PROGRAM + code, *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    peak = 1024 * int(result.stdout.split()[-1])
    print(f"peak memory of predict: {peak / 1e9:.2f} GB")
    assert Image.open(tmp_path / "out" / "large_mask.png").size == (side, side)
    assert peak < most
