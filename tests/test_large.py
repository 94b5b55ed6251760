"""Large images: read row by row, written row by row."""

import tracemalloc

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from naslora.data import picture as pictures
from naslora.data.images import Sample, open_picture, source_of
from naslora.data.picture import Intensity, Picture, scale
from naslora.data.rasters import write_png
from naslora.data.tiff import open_tiff
from naslora.errors import UserError
from naslora.report import pictures as painting
from naslora.report.pictures import paint

RGB = np.random.default_rng(0).integers(0, 256, (70, 53, 3), dtype=np.uint8)
PLANES = np.moveaxis(RGB, 2, 0)
ORIENTATIONS = [{"extratags": [(274, "H", 1, orientation, True)]} for orientation in range(1, 9)]
TILED = {"tile": (16, 32)}


def save_tiff(path, values, **options):
    tifffile.imwrite(path, values, photometric="rgb", **options)
    return path


def sample_of(path) -> Sample:
    return Sample(path, None, "here")


def rows_of(picture, step):
    """The rows of a picture, a few at a time."""
    tops = range(0, picture.height, step)
    return np.concatenate([picture.rows(top, min(top + step, picture.height)) for top in tops])


# --- TIFF


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rowsperstrip": 16},
        TILED,
        {"compression": "zlib"},
        {"compression": "zlib", "predictor": 2, "rowsperstrip": 8},
        {"compression": "zlib", "byteorder": ">", **TILED},
        {"bigtiff": True, **TILED},
        *ORIENTATIONS,
        {"compression": "zlib", **TILED, **ORIENTATIONS[5]},
    ],
)
def test_colours_of_8_bits_as_pillow_reads_them(tmp_path, options):
    path = save_tiff(tmp_path / "a.tif", RGB, **options)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert open_tiff(path, "here") is not None
    for step in (7, 70):
        assert np.array_equal(rows_of(open_picture(sample_of(path)), step), expected)
    if "predictor" not in options and "extratags" not in options:
        save_tiff(path, PLANES, planarconfig="separate", **options)
        assert np.array_equal(rows_of(open_picture(sample_of(path)), 7), RGB)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"here: image .*a.tif cannot be read"):
        open_picture(sample_of(path)).rows()


def test_what_pillow_has_to_read(tmp_path):
    alpha = np.concatenate([RGB, RGB[..., :1]], axis=2)
    save_tiff(tmp_path / "rgba.tif", alpha, extrasamples=["unassalpha"])
    Image.fromarray(RGB[..., 0]).save(tmp_path / "grey.tif", compression="tiff_lzw")
    Image.fromarray(RGB).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    greys = 257 * RGB[..., 0].astype(np.uint16)
    Image.fromarray(greys).save(tmp_path / "grey.png")
    Image.fromarray(greys).save(tmp_path / "deep_lzw.tif", compression="tiff_lzw")
    for name in ("rgba.tif", "grey.tif", "lzw.tif", "grey.png", "deep_lzw.tif"):
        assert open_tiff(tmp_path / name, "here") is None, name
        pixels = rows_of(open_picture(sample_of(tmp_path / name)), 7)
        coloured = name in ("rgba.tif", "lzw.tif")  # 65535 / 255 = 257
        assert np.array_equal(pixels, RGB if coloured else RGB[..., [0, 0, 0]]), name


@pytest.mark.parametrize("options", [{}, TILED, {"rowsperstrip": 8, "compression": "zlib"}])
def test_percentiles_do_not_depend_on_the_pieces(tmp_path, monkeypatch, options):
    """Of the rows and columns every second decides."""
    monkeypatch.setattr(pictures, "SAMPLED", 1000)
    values = np.random.default_rng(1).normal(0, 1, RGB.shape).astype(np.float32)
    values[4, 4] = np.nan
    path = save_tiff(tmp_path / "a.tif", values, **options)
    for band in (100, 1 << 20):
        monkeypatch.setattr(pictures, "BAND", band)
        found = open_picture(sample_of(path), Intensity("percentile", 5, 90)).rows()
        for channel in range(3):
            limits = np.nanpercentile(values[::2, ::2, channel].astype(float), [5, 90])
            expected = scale(values[..., [channel]], [limits])
            assert np.array_equal(found[..., [channel]], expected)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", **TILED}])
def test_an_image_is_not_read_at_once(tmp_path, options):
    values = np.zeros((2000, 1000, 3), np.uint16)  # 12 MB
    path = save_tiff(tmp_path / "a.tif", values, **options)
    tracemalloc.start()
    picture = open_picture(sample_of(path), Intensity("window", 0, 1))
    for top in range(0, 2000, 100):
        picture.rows(top, top + 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9e6  # 100 rows with numbers of 8 bytes, several times


# --- Pillow


def images_of_every_mode():
    image = Image.fromarray(RGB)
    palette = image.quantize(7)
    palette.info["transparency"] = 2
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(RGB[..., 1]))
    others = [image.convert(mode) for mode in ("L", "1", "CMYK")]
    return [image, palette, alpha, alpha.convert("LA"), *others]


@pytest.mark.parametrize("image", images_of_every_mode(), ids=lambda image: image.mode)
def test_rows_are_those_of_the_rgb_image(image):
    for step in (7, 70):
        rows = rows_of(Picture(source_of(image), "here"), step)
        assert np.array_equal(rows, np.asarray(image.convert("RGB")))


# --- writing


@pytest.mark.parametrize("pixels", [RGB[..., 0], RGB[:1, :1, 0]], ids=["greys", "one"])
def test_png_files_row_by_row(tmp_path, pixels):
    for step in (1, 13, 70):
        bands = (pixels[top : top + step] for top in range(0, len(pixels), step))
        write_png(tmp_path / "a.png", pixels.shape[:2], bands)
        with Image.open(tmp_path / "a.png") as image:
            assert image.info == {"Software": "naslora predict"}
            assert image.mode == "L"
            assert np.array_equal(image, pixels)


def test_painting_does_not_depend_on_the_bands(monkeypatch):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, (70, 53), dtype=np.uint8)
    names = ["background", "a", "b"]
    whole = paint(RGB, labels, names)
    for rows in (70, 33, 1):
        monkeypatch.setattr(painting, "PAINTED_PIXELS", 53 * rows)
        assert np.array_equal(paint(RGB, labels, names), whole)
