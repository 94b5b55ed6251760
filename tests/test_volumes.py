"""Volumes: slices, headers there and back, and runs."""

import json
import sys

import nibabel
import numpy as np
import pytest
from conftest import SHORT, error_of

from naslora.data.contents import read_contents
from naslora.data.dataset import SegmentationDataset
from naslora.data.datasets import load_all, load_splits
from naslora.data.images import open_picture
from naslora.data.masks import read_mask
from naslora.data.picture import Intensity
from naslora.data.splits import draw_folds, write_splits
from naslora.data.volumes import Slicing, read_slice, write_volume
from naslora.training.resolve import resolve
from naslora.training.run_config import RunConfig

SHAPE = 16, 12, 6
WINDOW = ("--intensity", "window", "-100", "300")
TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
AFFINES = {
    "RAS": np.diag([0.7, 0.9, 3, 1]),
    "LPS": np.diag([-0.7, -0.9, 3, 1]),
    "oblique": np.block(
        [[TURN * [0.7, 0.9, 3], np.array([[-11.3], [7.1], [42]])], [np.eye(4)[3:]]]
    ),
}


def save(path, values, affine="oblique", scale=None):
    image = nibabel.Nifti1Image(values, AFFINES[affine])
    image.header.set_xyzt_units("mm")
    if affine == "oblique":  # a header whose two transformations differ
        image.set_qform(AFFINES["RAS"], 1)
    if scale:
        image.header.set_slope_inter(*scale)
    nibabel.save(image, path)
    return path


def values_of(seed, dtype=np.int16):
    """A volume with a bright box on noise, and its mask."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(SHAPE, np.uint8)
    x, y = rng.integers(0, 8), rng.integers(0, 6)
    mask[x : x + 8, y : y + 6, 1:5] = 1
    return (mask * 200 + rng.integers(-60, 60, SHAPE)).astype(dtype), mask


def write(root, suffix=".nii.gz", per_split=2):
    """A data set of CSV files."""
    root.mkdir()
    for number, split in enumerate(("train", "val", "test")):
        lines = ["image,label"]
        for k in range(per_split):
            image, mask = values_of(10 * number + k)
            save(root / f"{split}{k}{suffix}", image)
            save(root / f"{split}{k}_label{suffix}", mask)
            lines.append(f"{split}{k}{suffix},{split}{k}_label{suffix}")
        (root / f"{split}.csv").write_text("\n".join(lines))
    return root


# --- files


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("neighbours", [0, 1])
def test_slices(tmp_path, suffix, axis, neighbours):
    root, how = write(tmp_path / "data", suffix, 1), Slicing(axis, neighbours)
    samples = load_splits("csv", root, how=how)["train"]
    image, mask = values_of(0)
    assert len(samples) == SHAPE[axis]
    for number, sample in enumerate(samples):
        near = [np.clip(number + k, 0, SHAPE[axis] - 1) for k in range(-neighbours, neighbours + 1)]
        expected = np.moveaxis(np.moveaxis(image, axis, 0)[near], 0, -1).swapaxes(0, 1)
        assert np.array_equal(read_slice(sample.image, sample.slice, "here"), expected)
        picture = open_picture(sample, Intensity("window", 0, 255), channels=1 + 2 * neighbours)
        assert np.array_equal(picture.rows(), np.clip(expected, 0, 255))
        assert np.array_equal(read_mask(sample, 1), np.moveaxis(mask, axis, 0)[number].T)


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_there_and_back(tmp_path, affine, axis):
    image, mask = values_of(0)
    source = save(tmp_path / "a.nii", image, affine, scale=(2, -3))
    slices = [part.T for part in np.moveaxis(mask, axis, 0)]
    write_volume(tmp_path / "b.nii.gz", source, slices, axis)
    old, new = nibabel.load(source), nibabel.load(tmp_path / "b.nii.gz")
    assert np.array_equal(np.asarray(new.dataobj), mask) and new.get_data_dtype() == np.uint8
    assert old.affine.tobytes() == new.affine.tobytes()
    fields = {name for name in old.header if name[:2] in ("qf", "sf", "qu", "qo", "sr", "pi", "xy")}
    assert len(fields) == 13
    for name in fields | {"dim"}:
        assert old.header[name].tobytes() == new.header[name].tobytes(), name
    assert nibabel.aff2axcodes(old.affine) == nibabel.aff2axcodes(new.affine)


def test_folds_keep_volumes_together(tmp_path):
    root = write(tmp_path / "data")
    folds = draw_folds(load_all("csv", root, "--folds"), 3)
    assert [len({sample.image for sample in fold}) for fold in folds] == [2, 2, 2]
    assert sum(map(len, folds)) == 36
    write_splits(tmp_path / "lists", dict(zip(("train", "val", "test"), folds, strict=True)))
    again = load_splits("csv", tmp_path / "lists")
    assert [[own.slice for own in part] for part in again.values()] == [
        [own.slice for own in fold] for fold in folds
    ]


# --- bad input


def problem(root, *row):
    (root / "train.csv").write_text("image,label\n" + ",".join(row))
    return error_of(load_all, "csv", root, "--folds")


def test_bad_volumes(tmp_path, monkeypatch):
    image, mask = values_of(0)
    for name, values, affine in (
        ("a", image, "RAS"),
        ("short", mask[..., 1:], "RAS"),
        ("moved", mask, "LPS"),
        ("four", np.stack([image] * 2, 3), "RAS"),
    ):
        save(tmp_path / f"{name}.nii.gz", values, affine)
    (tmp_path / "broken.nii").write_bytes(b"nothing")
    (tmp_path / "a.png").write_bytes(b"")
    for files, message in {
        ("a", "none"): "names 1 missing file",
        ("a", "short"): "have 16x12x6 and 16x12x5 voxels",
        ("a", "moved"): "have other affines",
        ("four", "a"): "four.nii.gz has 4 axes",
    }.items():
        row = [f"{name}.nii.gz" for name in files]
        assert message in problem(tmp_path, *row), files
    assert "a.png is none" in problem(tmp_path, "a.nii.gz", "a.png")
    assert "broken.nii cannot be read" in problem(tmp_path, "broken.nii", "a.nii.gz")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    line = "needs nibabel; run pip install 'naslora[volumes]'"
    assert line in problem(tmp_path, "a.nii.gz", "a.nii.gz")


def test_a_volume_of_folders_without_a_mask(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "a.nii.gz", values_of(0)[1])
    assert len(load_all("folders", tmp_path, "--folds")) == SHAPE[2]
    save(tmp_path / "images/b.nii", values_of(0)[1])
    assert "1 of 2 files without mask: b.nii" in error_of(load_all, "folders", tmp_path, "--folds")


def test_bad_voxels(tmp_path):
    image, mask = values_of(0, np.float32)
    image[..., 3] = np.nan
    save(tmp_path / "a.nii.gz", image)
    save(tmp_path / "m.nii.gz", mask)
    save(tmp_path / "half.nii.gz", mask * np.float32(0.5))
    (tmp_path / "train.csv").write_text("image,label\na.nii.gz,m.nii.gz\n")
    samples = load_all("csv", tmp_path, "--folds")
    dataset = SegmentationDataset(samples, 16, 1, intensity=Intensity("window", 0, 255))
    assert "a.nii.gz slice 3 has only NaN in channel 1" in error_of(list, read_contents(dataset))
    half = samples[2]._replace(mask=tmp_path / "half.nii.gz")
    assert "half.nii.gz slice 2 has values that are no whole" in error_of(read_mask, half, 1)


# --- runs


def test_prompts_take_no_neighbours():
    options = {"task": "promptable", "data": {"neighbours": 1}}
    assert "neighbours 1 needs --task semantic" in error_of(resolve, RunConfig.from_dict(options))


def test_a_run_on_volumes(naslora, tiny_sam, tmp_path):
    data, run, out = write(tmp_path / "data"), tmp_path / "run", tmp_path / "out"
    cache, beside = ("--cache", tmp_path / "cache"), ("--neighbours", 2)
    arguments = ("--data", data, *SHORT, *WINDOW, *beside, *cache, "--output", run)
    result = naslora("train", *arguments, "--resolution", "original")
    assert result.status == 0, result.err
    stored = json.loads((run / "metrics.json").read_text())
    assert stored["images"] == {"train": 12, "val": 12, "test": 12}
    assert stored["test"]["volumes"] == 2
    assert "test0.nii.gz slice 3" in (run / "test_images.csv").read_text()
    volumes = [data / f"test{k}.nii.gz" for k in range(2)]
    more = ("--probabilities", "uint8", "--output", out)
    result = naslora("predict", run, *volumes, *more)
    assert result.status == 0, result.err

    def read(path):
        return np.asarray(nibabel.load(path).dataobj)

    dice = []
    for k in range(2):
        truth = values_of(20 + k)[1]
        mask = read(out / f"test{k}_mask.nii.gz")
        shares = read(out / f"test{k}_probabilities.nii.gz")
        assert mask.shape == shares.shape == SHAPE and (out / f"test{k}_overlay.png").exists()
        assert ((shares > 127) == mask).all()
        dice.append(2 * (mask * truth).sum() / (mask.sum() + truth.sum()))
    assert stored["test"]["volume_dice"] == pytest.approx(np.mean(dice), abs=1e-6)
    assert nibabel.load(out / "test0_mask.nii.gz").affine == pytest.approx(AFFINES["oblique"])
    save(data / "four.nii", np.zeros((4, 4, 4, 2)))
    refused = naslora("predict", run, data / "four.nii", volumes[0], *more, "--overwrite")
    assert refused.status == 2 and "four.nii has 4 axes" in refused.err, refused.err
