"""Images of more than 8 bits: their scaling, TIFF files of every kind, and georeferences."""

from functools import partial

import numpy as np
import pytest
import tifffile
from conftest import SHORT, error_of, refusal, succeed, write_data
from miniatures import as_tiff
from PIL import Image

from naslora.data.cache import Cache
from naslora.data.contents import read_contents, warnings_about
from naslora.data.dataset import SegmentationDataset
from naslora.data.images import Sample, open_picture
from naslora.data.picture import Intensity, parse_intensity, scale

WINDOW = Intensity("window", 1000, 3000)
GREY = np.array([[0, 1000, 1500], [2000, 3000, 65535]], np.uint16)
EXPECTED = [[0, 0, 64], [128, 255, 255]]  # 255 (v - 1000) / 2000, clipped; 63.75 and 127.5 rounded


def read(path, intensity=WINDOW):
    return open_picture(Sample(path, None, "here"), intensity).rows()


# --- the option


@pytest.mark.parametrize(
    "words, expected",
    [
        ("window -160 240.5", Intensity("window", -160, 240.5)),
        ("percentile", Intensity("percentile", 1, 99)),
        ("percentile 0 99.9", Intensity("percentile", 0, 99.9)),
    ],
)
def test_words(words, expected):
    assert parse_intensity(words.split()) == expected
    assert "below HI, got window 0 inf" in error_of(parse_intensity, ["window", "0", "inf"])


# --- scaling


def test_a_window_by_hand():
    limits = [WINDOW[1:]]
    assert scale(GREY[..., None], limits)[..., 0].tolist() == EXPECTED
    values = np.array([np.nan, np.inf, -np.inf, 2000]).reshape(2, 2, 1)
    assert scale(values, limits).ravel().tolist() == [0, 255, 0, 128]
    constant = np.array([6.0, 7.0, 8.0, np.nan]).reshape(2, 2, 1)
    assert scale(constant, [(7, 7)]).ravel().tolist() == [0, 0, 255, 0]


def test_percentiles_of_each_channel(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal([0, 100, -5], [1, 50, 0.1], (64, 64, 3))
    values[0, 0] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    scaled = read(tmp_path / "a.tif", Intensity("percentile", 2, 98))
    for channel in range(3):
        low, high = np.nanpercentile(values[..., channel], [2, 98])
        expected = np.rint(255 * np.clip((values[..., channel] - low) / (high - low), 0, 1))
        assert np.array_equal(scaled[1:, :, channel], expected[1:])
    assert not scaled[0, 0].any()
    for constant in (7.0, np.nan):
        tifffile.imwrite(tmp_path / "b.tif", np.full((4, 4), constant))
        assert not read(tmp_path / "b.tif", Intensity("percentile", 1, 99)).any()


# --- files


def test_grey_files(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GREY)
    tifffile.imwrite(tmp_path / "b.tif", GREY.astype(np.float32), compression="zlib")
    tifffile.imwrite(tmp_path / "big.tif", GREY.astype(np.int32), bigtiff=True, byteorder=">")
    tifffile.imwrite(tmp_path / "white.tif", GREY, photometric="miniswhite")
    Image.fromarray(GREY).save(tmp_path / "c.png")
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "d.tif", compression="tiff_lzw")
    for name in ("a.tif", "b.tif", "big.tif", "c.png", "d.tif"):
        assert read(tmp_path / name).tolist() == np.stack([EXPECTED] * 3, 2).tolist(), name
    assert read(tmp_path / "white.tif")[..., 0].tolist() == (255 - np.array(EXPECTED)).tolist()
    tifffile.imwrite(tmp_path / "turned.tif", GREY, extratags=[(274, "H", 1, 6, True)])  # right
    assert read(tmp_path / "turned.tif")[..., 0].tolist() == np.rot90(EXPECTED, -1).tolist()
    (tmp_path / "cut.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:-6])
    for name in ("cut.tif", "no.tif"):
        assert f"{name} cannot be read" in error_of(read, tmp_path / name)


def test_colour_files(tmp_path, monkeypatch):
    rgb = np.random.default_rng(0).integers(0, 5000, (6, 7, 3), dtype=np.uint16)
    alpha = np.concatenate([rgb, np.full((6, 7, 1), 65535, np.uint16)], axis=2)
    tifffile.imwrite(tmp_path / "chunky.tif", rgb, photometric="rgb")
    planes = np.moveaxis(rgb, 2, 0).astype(np.float64)
    tifffile.imwrite(tmp_path / "planar.tif", planes, photometric="rgb", planarconfig="separate")
    tifffile.imwrite(tmp_path / "rgba.tif", alpha, photometric="rgb", extrasamples=["unassalpha"])
    for name in ("chunky.tif", "planar.tif", "rgba.tif"):
        assert np.array_equal(read(tmp_path / name), scale(rgb, 3 * [WINDOW[1:]])), name
    plain = np.rint(rgb / 257)  # 65535 / 255 = 257
    assert np.array_equal(read(tmp_path / "chunky.tif", None), plain)
    line = error_of(read, tmp_path / "planar.tif", None)
    assert "floating-point pixels; train with --int" in line
    for name in ("8.png", "8.tif"):  # 8 bits stay as they are
        Image.fromarray(rgb.astype(np.uint8)).save(tmp_path / name)
        assert np.array_equal(read(tmp_path / name), rgb.astype(np.uint8))
    four = np.concatenate([rgb, rgb[..., :1]], axis=2)
    tifffile.imwrite(tmp_path / "four.tif", four, photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(read(tmp_path / "four.tif", None), plain)  # infrared, for instance
    tifffile.imwrite(tmp_path / "bands.tif", four, photometric="minisblack", planarconfig="contig")
    assert "has 4 channels; save it with one" in error_of(read, tmp_path / "bands.tif")
    tag = b"\x03\x01\x03\0\x01\0\0\0"  # compression: one number of 16 bits
    content = (tmp_path / "chunky.tif").read_bytes()
    (tmp_path / "lzw.tif").write_bytes(content.replace(tag + b"\x01", tag + b"\x05"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "with LZW, which needs imagecodecs" in error_of(read, tmp_path / "lzw.tif")


def test_images_of_12_bits_are_nearly_black(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.minimum(GREY, 4000))
    samples = [Sample(tmp_path / "a.tif", None, "here")]
    for intensity, lines in ((None, ["values up to 4000 of 65535"]), (WINDOW, [])):
        (content,) = read_contents(SegmentationDataset(samples, 16, 1, intensity=intensity))
        found = warnings_about({"train": [content._replace(foreground=True)]})
        assert len(found) == len(lines) and all(map(str.__contains__, found, lines))


def test_the_cache_knows_the_scaling(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GREY)
    sample = Sample(tmp_path / "a.tif", None, "here")
    cache = Cache(tmp_path / "cache")
    for intensity in (WINDOW, Intensity("window", 0, 65535), None, WINDOW):
        make = partial(SegmentationDataset, [sample], 16, 1, intensity=intensity)
        assert (make()[0]["image"] == make(cache=cache)[0]["image"]).all()


@pytest.fixture(scope="module")
def runs(tiny_sam, tmp_path_factory):
    """A folder with a run on images of 8 bits, and a run on floating-point copies of them."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_data(folder / "data", train=2, val=1, test=1)
    floats = as_tiff(data, folder / "floats", lambda v: 0.01 * v - 1, photometric="rgb")
    scaling = ("--intensity", "window", "-1", "1.55")
    for source, more, name in ((data, (), "plain"), (floats, scaling, "scaled")):
        succeed("train", "--data", source, *SHORT, *more, "--output", folder / name)
    return folder


def test_a_run_on_scaled_images_is_the_run_on_images_of_8_bits(runs, tmp_path):
    weights = [runs / name / "adapter/adapter_model.safetensors" for name in ("plain", "scaled")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    image = runs / "floats/images/test0.tif"
    succeed("predict", runs / "scaled", image, "--output", tmp_path / "out")
    refused = refusal("predict", runs / "plain", image, "--output", tmp_path / "no")
    assert "test0.tif has floating-point pixels" in refused


# --- georeferences

SCALE, TIE = (0.5, 0.5, 0.0), (0.0, 0.0, 0.0, 440720.0, 3751320.0, 0.0)
KEYS = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32611)
GEO = [
    (33550, "d", 3, SCALE, True),
    (33922, "d", 6, TIE, True),
    (34735, "H", 16, KEYS, True),
    (34737, "s", 0, "WGS 84 / UTM zone 11N|", True),
]


def tags_of(path):
    with tifffile.TiffFile(path) as tiff:
        return tiff.geotiff_metadata, [tiff.pages.first.tags[code].value for code in (33550, 33922)]


def test_a_georeference_is_kept(runs, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    image = runs / "data/images/test0.png"
    pixels = np.asarray(Image.open(image))
    tifffile.imwrite(folder / "field.tif", pixels, photometric="rgb", extratags=GEO)
    for options in ((), ("--overwrite",)):  # its own files in the folder are no inputs
        succeed("predict", runs / "plain", folder, "--output", folder, *options)
    assert tags_of(folder / "field_mask.tif") == tags_of(folder / "field.tif")
    assert tags_of(folder / "field_mask.tif")[1] == [SCALE, TIE]
    masks = [np.asarray(Image.open(folder / f"field_mask.{kind}")) for kind in ("tif", "png")]
    assert np.array_equal(*masks)
    succeed("predict", runs / "plain", image, "--output", folder)
    assert not (folder / "test0_mask.tif").exists()
