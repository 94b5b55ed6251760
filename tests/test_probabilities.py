"""Probabilities, their threshold and their uncertainty, as predict writes them."""

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from conftest import SHORT, SIZE, refusal, succeed, write_data
from PIL import Image
from test_intensity import GEO, tags_of

from naslora.data.rasters import write_tiff
from naslora.prediction import find_samples
from naslora.predictor import _enlarged


@pytest.fixture(scope="module")
def runs(tiny_sam, tmp_path_factory):
    """The folders of data and of runs of two and of three classes, with an image of another size
    that has a georeference."""
    folder = tmp_path_factory.mktemp("runs")
    for name, classes, seeds in (("two", 2, (0, 1)), ("three", 3, (0,))):
        data = write_data(folder / f"{name} data", classes=classes, train=2, val=1, test=1)
        large = Image.open(data / "images/test0.png").resize((2 * SIZE + 9, 3 * SIZE))
        options = {"photometric": "rgb", "extratags": GEO}
        tifffile.imwrite(folder / f"{name}.tif", np.asarray(large), **options)
        more = ("--num-classes", 3) if classes == 3 else ()
        for seed in seeds:
            arguments = ("--data", data, *SHORT, *more, "--seed", seed, "--augment", "dihedral")
            succeed("train", *arguments, "--output", folder / f"{name}{seed}")
    return folder


def predicted(runs, output, name, *options, seed=0):
    succeed("predict", runs / f"{name}{seed}", runs / f"{name}.tif", *options, "--output", output)
    mask = np.asarray(Image.open(output / f"{name}_mask.png"))
    raster = output / f"{name}_probabilities.tif"
    return mask, tifffile.imread(raster) if raster.exists() else None


@pytest.mark.parametrize("tiles", [(), ("--tiles", SIZE)])
def test_of_two_classes(runs, tmp_path, tiles):
    mask, found = predicted(runs, tmp_path / "a", "two", "--probabilities", "float32", *tiles)
    assert found.shape == mask.shape and found.dtype == np.float32
    assert np.array_equal(mask > 0, found > 0.5)
    assert tags_of(tmp_path / "a/two_probabilities.tif") == tags_of(runs / "two.tif")
    half = float(np.median(found))
    options = ("--probabilities", "uint8", "--threshold", half, *tiles)
    mask, bytes_ = predicted(runs, tmp_path / "b", "two", *options)
    assert np.array_equal(mask > 0, found > np.float32(half)) and 0.4 < (mask > 0).mean() < 0.6
    assert np.array_equal(bytes_, np.rint(255 * found).astype(np.uint8))
    assert find_samples([tmp_path / "b", runs / "two.tif"])  # its own files are no images


def test_in_16_bits(runs, tmp_path):
    raster = ("--probabilities", "float32", "--precision")
    found = [predicted(runs, tmp_path / p, "two", *raster, p)[1] for p in ("no", "bf16")]
    assert not np.array_equal(*found)
    np.testing.assert_allclose(*found, atol=0.05)


def test_of_several_classes(runs, tmp_path):
    mask, found = predicted(runs, tmp_path, "three", "--probabilities", "float32")
    assert found.shape == (*mask.shape, 3)
    np.testing.assert_allclose(found.sum(2), 1, rtol=1e-5)
    assert np.array_equal(found.argmax(2), mask)


def test_uncertainty_over_flips_and_runs(runs, tmp_path):
    raster = ("--probabilities", "float32")
    each = [predicted(runs, tmp_path / str(seed), "two", *raster, seed=seed)[1] for seed in (0, 1)]
    options = (*raster, "--members", runs / "two1")
    _, both = predicted(runs, tmp_path / "both", "two", *options)
    np.testing.assert_allclose(both[..., 0], np.mean(each, 0), atol=1e-6)
    # The deviation is taken before the maps are enlarged: linear where the two do not cross.
    assert both[..., 1].max() == pytest.approx(np.std(each, 0).max(), rel=0.05)
    _, flipped = predicted(runs, tmp_path / "flips", "two", *raster, "--flips")
    square = Image.open(runs / "two data/images/test0.png")
    turned = runs / "turned.png"
    square.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(turned)
    masks = []
    for number, image in enumerate((runs / "two data/images/test0.png", turned)):
        output = tmp_path / f"turn{number}"
        arguments = ("predict", runs / "two0", image, *raster, "--flips", "--output", output)
        succeed(*arguments)
        masks.append(tifffile.imread(output / f"{image.stem}_probabilities.tif"))
    np.testing.assert_allclose(masks[0], masks[1][:, ::-1], atol=1e-5)  # dihedral: four views
    assert flipped.shape[2] == 2 and 0 < flipped[..., 1].max() < 0.5


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("three", ("--threshold", "0.3"), "--threshold is for two classes"),
        ("two", ("--members", "three0"), "has another num_classes"),
        ("two", ("--precision", "fp16"), "fp16 needs a GPU"),
    ],
)
def test_bad_outputs(runs, tmp_path, name, options, message):
    given = [runs / own if own == "three0" else own for own in options]
    command = ("predict", runs / f"{name}0", runs / "two.tif", *given)
    assert message in refusal(*command, "--output", tmp_path / "o")
    assert not list((tmp_path / "o").glob("*.png"))


def test_maps_are_enlarged_as_torch_does():
    scores = torch.rand(2, 16, 16)
    for height, width in ((150, 33), (16, 16), (7, 40)):
        whole = F.interpolate(scores[None], (height, width), mode="bilinear")[0]
        bands = torch.cat(list(_enlarged(scores, height, width)), 1)
        torch.testing.assert_close(bands, whole)


def test_strips_do_not_depend_on_the_bands(tmp_path):
    values = np.random.default_rng(0).random((150, 20, 3)).astype(np.float32)
    for steps in ([150], [1, 63, 64, 22], [100, 50]):
        bands = np.split(values, np.cumsum(steps)[:-1])
        write_tiff(tmp_path / "a.tif", bands, values.shape, values.dtype, [])
        assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), values)
