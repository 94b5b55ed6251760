"""Large images: read with little memory, cut into RGB parts, written row by row."""

import itertools
import tracemalloc

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from naslora.data import intensity as scaling
from naslora.data.images import Sample, read_image
from naslora.data.intensity import Intensity, scale
from naslora.data.large import LargeImage, read_large
from naslora.data.png import PngWriter
from naslora.data.tiff import read_tiff
from naslora.data.tiles import Box
from naslora.errors import UserError
from naslora.report.pictures import paint, paint_bands

RGB = np.random.default_rng(0).integers(0, 256, (70, 53, 3), dtype=np.uint8)
PLANES = np.moveaxis(RGB, 2, 0)
ORIENTATIONS = [{"extratags": [(274, "H", 1, orientation, True)]} for orientation in range(1, 9)]
TILED = {"tile": (16, 32)}


def save_tiff(path, values, **options):
    tifffile.imwrite(path, values, photometric="rgb", **options)
    return path


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
    assert np.array_equal(read_tiff(path, "here"), expected)
    if "predictor" not in options and "extratags" not in options:
        save_tiff(path, PLANES, planarconfig="separate", **options)
        assert np.array_equal(read_tiff(path, "here"), RGB)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"here: image .*a.tif cannot be read"):
        read_large(Sample(path, None, "here"))


def test_what_pillow_has_to_read(tmp_path):
    alpha = np.concatenate([RGB, RGB[..., :1]], axis=2)
    save_tiff(tmp_path / "rgba.tif", alpha, extrasamples=["unassalpha"])
    save_tiff(tmp_path / "deep.tif", RGB.astype(np.uint16))
    tifffile.imwrite(tmp_path / "grey.tif", RGB[..., 0])
    Image.fromarray(RGB).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    greys = 257 * RGB[..., 0].astype(np.uint16)
    Image.fromarray(greys).save(tmp_path / "grey.png")
    Image.fromarray(RGB).save(tmp_path / "a.png")
    for name in ("rgba.tif", "deep.tif", "grey.tif", "lzw.tif", "a.png", "grey.png"):
        assert read_tiff(tmp_path / name, "here") is None, name
        sample = Sample(tmp_path / name, None, "here")
        whole = read_large(sample)
        assert np.array_equal(whole.rows(0, 70), np.asarray(read_image(sample))), name
    assert np.array_equal(whole.rows(0, 70)[..., 0], RGB[..., 0])  # 65535 / 255 = 257
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 4), np.float32))
    with pytest.raises(UserError, match="floating-point pixels; give --intensity"):
        read_large(Sample(tmp_path / "a.tif", None, "here"))


@pytest.mark.parametrize("options", [{}, TILED, {"rowsperstrip": 8, "compression": "zlib"}])
def test_percentiles_do_not_depend_on_the_pieces(tmp_path, monkeypatch, options):
    """Of 3710 values of a channel every fourth decides."""
    monkeypatch.setattr(scaling, "SAMPLED", 1000)
    values = np.random.default_rng(1).normal(0, 1, RGB.shape).astype(np.float32)
    values[3, 4] = np.nan
    percentile = Intensity("percentile", 5, 90)
    path = save_tiff(tmp_path / "a.tif", values, **options)
    found = read_tiff(path, "here", percentile)
    assert np.array_equal(found, scale(values, percentile))
    for channel in range(3):
        sampled = values[..., channel].reshape(-1)[::4]
        low, high = np.nanpercentile(sampled, [5, 90])
        shares = np.nan_to_num(np.clip((values[..., channel] - low) / (high - low), 0, 1))
        # The limits have float64, here as there.
        assert np.abs(found[..., channel] - 255 * shares.astype(np.float64)).max() <= 0.5001


def test_a_strip_of_the_whole_image_is_not_read_at_once(tmp_path):
    values = np.zeros((2000, 1000, 3), np.uint16)
    path = save_tiff(tmp_path / "a.tif", values)
    tracemalloc.start()
    pixels = read_tiff(path, "here", Intensity("window", 0, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values.nbytes > 2 * pixels.nbytes - 1  # 12 MB and 6 MB
    assert peak < pixels.nbytes + 32e6  # a band of 2 MB of values, with 8-byte numbers for it


# --- parts


def images_of_every_mode():
    image = Image.fromarray(RGB)
    palette = image.quantize(7)
    palette.info["transparency"] = 2
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(RGB[..., 1]))
    grey_alpha = alpha.convert("LA")
    return [
        image,
        palette,
        alpha,
        grey_alpha,
        *(image.convert(mode) for mode in ["L", "1", "CMYK"]),
    ]


@pytest.mark.parametrize("image", images_of_every_mode(), ids=lambda image: image.mode)
def test_parts_are_those_of_the_rgb_image(image):
    whole, large = np.asarray(image.convert("RGB")), LargeImage(image)
    assert (large.height, large.width) == (70, 53)
    for box in (Box(0, 0, 70, 53), Box(5, 7, 33, 30)):
        part = large.crop(box)
        assert part.mode == "RGB"
        assert np.array_equal(part, whole[box.top : box.bottom, box.left : box.right])
    assert np.array_equal(large.rows(69, 70), whole[69:70])


# --- writing


@pytest.mark.parametrize("pixels", [RGB, RGB[..., 0], RGB[:1, :1]], ids=["colours", "greys", "one"])
def test_png_files_row_by_row(tmp_path, pixels):
    height, width, *channels = pixels.shape
    for step in (1, 13, 70):
        with open(tmp_path / "a.png", "wb") as file:
            writer = PngWriter(file, width, height, *channels or [1], {"Software": "x"})
            for top in range(0, height, step):
                writer.write(pixels[top : top + step])
        with Image.open(tmp_path / "a.png") as image:
            assert image.info == {"Software": "x"} and image.mode == ("RGB" if channels else "L")
            assert np.array_equal(image, pixels)
    with pytest.raises(ValueError, match="does not fit"):
        writer.write(pixels[:1])


def test_painting_does_not_depend_on_the_bands():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, (70, 53), dtype=np.uint8)
    names = ["background", "a", "b"]
    whole = paint(RGB, labels, names)
    for heights in ([70], [1] * 70, [33, 1, 2, 34]):
        ends = list(itertools.accumulate(heights, initial=0))
        bands = (labels[top:bottom] for top, bottom in itertools.pairwise(ends))
        painted = list(paint_bands(lambda top, bottom: RGB[top:bottom], bands, names))
        assert np.array_equal(np.concatenate(painted), whole)
