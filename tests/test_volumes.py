"""Volumes: slices, headers there and back, and runs."""

import json
import sys

import nibabel
import numpy as np
import pytest
import tifffile
from conftest import SHORT, error_of, refusal, succeed

from naslora import shapes
from naslora.data.contents import read_contents
from naslora.data.dataset import SegmentationDataset
from naslora.data.datasets import draw_folds, load_all, load_splits, write_splits
from naslora.data.images import open_picture
from naslora.data.masks import read_mask
from naslora.data.picture import Intensity
from naslora.data.volumes import Slicing, read_slice, spacing_of, write_volume

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
    if path.suffix == ".tif":  # compressed, or in one piece, of which slices are read
        compression = "zlib" if "0" in path.name else None
        tifffile.imwrite(path, values.T, photometric="minisblack", compression=compression)
        return path
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


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".tif"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("neighbours", [0, 1])
def test_slices(tmp_path, suffix, axis, neighbours):
    root, how = write(tmp_path / "data", suffix, 1), Slicing(axis, neighbours, suffix == ".tif")
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


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("bands", [0, 2])
def test_a_stack_there_and_back(tmp_path, axis, bands):
    values = np.stack([values_of(k)[0] for k in range(bands or 1)], 3)
    values = values if bands else values[..., 0]
    slices = [part.swapaxes(0, 1) for part in np.moveaxis(values, axis, 0)]
    write_volume(tmp_path / "b.tif", tmp_path / "a.tif", slices, axis)
    with tifffile.TiffFile(tmp_path / "b.tif") as tiff:
        assert len(tiff.pages) == SHAPE[2] and tiff.pages[0].software == "naslora predict"
        assert np.array_equal(tiff.asarray().swapaxes(0, 2), values)


@pytest.mark.parametrize(
    "unit, factor, name",
    [("mm", 1, "mm"), ("micron", 1e-3, "mm"), ("meter", 1e3, "mm"), ("unknown", 1, "header units")],
)
@pytest.mark.parametrize("affine", AFFINES)
def test_spacing(tmp_path, unit, factor, name, affine):
    """A volume of 16 x 12 x 6 voxels of 0.7 x 0.9 x 3, and slices of 24 rows and 8 columns."""
    save(tmp_path / "a.nii", values_of(0)[0], affine)
    image = nibabel.load(tmp_path / "a.nii")
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "b.nii")
    x, y, z = 0.7 * 16, 0.9 * 12, 3 * 6
    spacings = [(0.7, z / 24, y / 8), (0.9, z / 24, x / 8), (3, y / 24, x / 8)]
    for axis, expected in enumerate(spacings):
        found, its = spacing_of(tmp_path / "b.nii", axis, (24, 8))
        assert found == pytest.approx(factor * np.array(expected), rel=1e-6) and its == name
    stack = save(tmp_path / "c.tif", values_of(0)[0])
    assert spacing_of(stack, 2, (12, 16)) == ((1, 1, 1), "voxels")


def test_folds_keep_volumes_together(tmp_path):
    root = write(tmp_path / "data")
    folds = draw_folds(load_all("csv", root, "--folds"), 3)
    assert [len({sample.image for sample in fold}) for fold in folds] == [2, 2, 2]
    assert sum(map(len, folds)) == 36
    write_splits(tmp_path / "lists", dict(zip(("train", "val", "test"), folds, strict=True)))
    again = load_splits("csv", tmp_path / "lists").values()
    found, expected = ([[own.slice for own in part] for part in all_] for all_ in (again, folds))
    assert found == expected


# --- bad input


def problem(root, *row, how=None):
    (root / "train.csv").write_text("image,label\n" + ",".join(row))
    return error_of(load_all, "csv", root, "--folds", how=how or Slicing())


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
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((4, 8, 8, 3), np.uint8), photometric="rgb")
    save(tmp_path / "a.tif", image)
    for row, message in {
        ("rgb.tif", "a.tif"): "rgb.tif has 4 axes",
        ("a.tif", "a.nii.gz"): "a.nii.gz is none",
    }.items():
        assert message in problem(tmp_path, *row, how=Slicing(stacks=True))
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


def test_numbers_of_objects_in_volumes(tmp_path):
    numbers = np.zeros((32, 32, 3), np.int16)
    numbers[2:10, 2:10, 1], numbers[12:30, 12:30, 1] = 700, 300
    for name in ("a", "m"):
        save(tmp_path / f"{name}.nii.gz", numbers)
    (tmp_path / "train.csv").write_text("image,label\na.nii.gz,m.nii.gz\n")
    samples = load_all("csv", tmp_path, "--folds")
    intensity = Intensity("window", 0, 700)
    dataset = SegmentationDataset(
        samples, 32, 1, intensity=intensity, objects="numbers", most_objects=8
    )
    assert [dataset[k]["mask"].unique().tolist() for k in range(3)] == [[0], [0, 1, 2], [0]]
    assert {len(own.unique()) for own in dataset[1]["mask"][numbers[..., 1].T > 0].split(64)} == {1}
    assert [dataset.check(sample)[0] for sample in samples] == [False, True, False]


@pytest.mark.parametrize("suffix, unit", [(".nii.gz", "mm"), (".tif", "voxels")])
def test_a_run_on_volumes(tiny_sam, tmp_path, suffix, unit):
    data, run, out = write(tmp_path / "data", suffix), tmp_path / "run", tmp_path / "out"
    cache, beside = ("--cache", tmp_path / "cache"), ("--neighbours", 2)
    stacks = ("--stacks",) if suffix == ".tif" else ()
    arguments = ("--data", data, *SHORT, *WINDOW, *beside, *cache, *stacks, "--output", run)
    metrics = ("--metrics", "dice", "hd95", "size_difference")
    succeed("train", *arguments, "--resolution", "original", *metrics)
    stored = json.loads((run / "metrics.json").read_text())
    assert stored["images"] == {"train": 12, "val": 12, "test": 12}
    assert f"test0{suffix} slice 3" in (run / "test_images.csv").read_text()
    volumes = [data / f"test{k}{suffix}" for k in range(2)]
    more = ("--probabilities", "uint8", "--output", out)
    succeed("predict", run, *volumes, *more)

    def read(path):
        return tifffile.imread(path).T if stacks else np.asarray(nibabel.load(path).dataobj)

    spacing = (1, 1, 1) if stacks else (0.7, 0.9, 3)
    found = {"dice": [], "hd95": [], "size_difference": []}
    for k in range(2):
        truth = values_of(20 + k)[1]
        mask = read(out / f"test{k}_mask{suffix}")
        shares = read(out / f"test{k}_probabilities{suffix}")
        assert mask.shape == shares.shape == SHAPE and (out / f"test{k}_overlay.jpg").exists()
        assert ((shares > 127) == mask).all()
        found["dice"].append(2 * (mask * truth).sum() / (mask.sum() + truth.sum()))
        found["hd95"].append(shapes.hd95(mask > 0, truth > 0, spacing))
        found["size_difference"].append(abs(int(mask.sum()) - int(truth.sum())) * np.prod(spacing))
    means = {name: pytest.approx(np.mean(values), rel=1e-6) for name, values in found.items()}
    assert stored["test"]["volumes"] == {"number": 2, "unit": unit, "metrics": means}
    assert f"HD95, {unit}<" in (run / "report.html").read_text()
    if stacks:  # a file says what a run says of volumes; once, because tracing takes seconds
        merged, file = tmp_path / "merged", tmp_path / "model.pt2"
        succeed("merge", run, "--output", merged)
        succeed("export", merged, "--format", "torch-export", "--output", file)
        succeed("predict", file, volumes[0], "--trust", "--output", tmp_path / "own")
        own, before = (read(folder / "test0_mask.tif") for folder in (tmp_path / "own", out))
        assert (own == before).mean() > 0.99  # where rounding decides
        return
    assert nibabel.load(out / "test0_mask.nii.gz").affine == pytest.approx(AFFINES["oblique"])
    save(data / "four.nii", np.zeros((4, 4, 4, 2)))
    refused = refusal("predict", run, data / "four.nii", volumes[0], *more, "--overwrite")
    assert "four.nii has 4 axes" in refused
