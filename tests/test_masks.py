"""Images and masks of every kind: what a file of labels, greys or colours is read as, or the line
that refuses it."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import error_of
from miniatures import check_samples
from PIL import Image
from run_configs import run_config

from naslora.data.cache import Cache
from naslora.data.dataset import SegmentationDataset
from naslora.data.images import Sample, open_picture
from naslora.data.masks import IGNORED, open_mask, read_mask

SIDE = 64
DISC = np.hypot(*(np.mgrid[:SIDE, :SIDE] - SIDE // 2)) < 20
NOISE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
CLASSES = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 3
GREYS = np.array([[0, 1, 2], [2, 1, 0]])
BINARY = np.array([[0, 1, 1], [1, 0, 0]])


def written(pixels: Any, kind: Any = np.uint8, name: str = "a.png", palette=None, **options: Any):
    """What writes pixels with Pillow; kind "P": indices of a palette, of ``COLOURS`` if None."""

    def write(folder: Path) -> None:
        if kind == "P":
            image = Image.fromarray(np.asarray(pixels, np.uint8), "P")
            image.putpalette(palette or COLOURS[:3].astype(np.uint8).tobytes())
        else:
            image = Image.fromarray(np.asarray(pixels, dtype=kind))
        image.save(folder / name, **options)

    return write


def grey(labels: np.ndarray) -> np.ndarray:
    """The same number in three channels."""
    return np.stack([np.asarray(labels)] * 3, axis=-1)


def tiff(pixels: np.ndarray, **options: Any):
    return lambda folder: tifffile.imwrite(folder / "a.tif", pixels, **options)


def png_of_16_bits(kind: int, channels: int):
    """Writes class indices as PNG of 16 bits; Pillow cannot."""

    def chunk(name: bytes, data: bytes) -> bytes:
        length, checksum = (struct.pack(">I", n) for n in (len(data), zlib.crc32(name + data)))
        return length + name + data + checksum

    header = struct.pack(">2I5B", SIDE, SIDE, 16, kind, 0, 0, 0)
    rows = np.repeat(CLASSES, channels, axis=1).astype(">u2")
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    content = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return lambda folder: (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)


PALETTE = ["#000000", "#ff0000", "#00ff00"]
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [9, 9, 9], [0, 0, 255]])
HELD = np.where(GREYS == 2, IGNORED, GREYS)
OTHER = np.where(GREYS == 2, 11, GREYS)
IN_11 = {"ignore_index": 11}
RAMP = np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes()
# Another encoding of the grey 128, which is ignored.
ENCODED = [
    ("threshold", [0, 100, 128, 200], [0, 0, IGNORED, 1]),
    ("nonzero", [0, 1, 128, 200], [0, 1, IGNORED, 1]),
    ("thirds", [0, 85, 128, 255], [0, 1, IGNORED, 2]),
]
# Pixels of a PNG file and their type, the classes, further arguments of read_mask, and the labels
# or a part of the line that refuses them.
PIXELS = [
    *((BINARY * high, dtype, classes, {}, BINARY) for classes in (1, 2) for dtype, high in
      ((np.uint8, 1), (np.uint8, 255), (np.uint16, 1), (np.uint16, 65535), (bool, 1))),
    *(([[value] * 2], np.uint8, 1, {}, [[label] * 2]) for value, label in
      ((0, 0), (1, 1), (255, 1))),
    *((pixels, dtype, 3, {}, GREYS) for pixels, dtype in (
        (GREYS, np.uint8), (GREYS, np.uint16), (GREYS, "P"), (grey(GREYS), np.uint8),
        (np.stack([GREYS, np.full_like(GREYS, 255)], axis=-1), np.uint8))),
    ([[[0, 0, 0], [0, 0, 7], [128, 0, 0]]], np.uint8, 1, {}, [[0, 1, 1]]),
    # Labels that are ignored.
    *((pixels, dtype, classes, IN_11, HELD) for classes in (1, 2, 11) for pixels, dtype in
      ((OTHER, np.uint8), (OTHER, np.uint16), (grey(OTHER), np.uint8))),
    *((OTHER, np.uint8, 3, more, "beyond") for more in ({"ignore_index": 12}, {})),
    ([[0, 128, 255]], np.uint8, 1, {"ignore_index": 128}, [[0, IGNORED, 1]]),
    (np.where(GREYS == 2, 255, GREYS), np.uint8, 3, {}, HELD),  # 255 needs no --ignore-index
    (np.where(GREYS == 2, 255, GREYS), np.uint8, 2, {}, "beyond"),
    (np.where(GREYS == 2, 255, GREYS), np.uint8, 3, IN_11, "beyond"),
    ([COLOURS[:4]], np.uint8, 3, {"palette": [*PALETTE, "#090909"], "ignore_index": 3},
     [[0, 1, 2, IGNORED]]),
    ([COLOURS[[0, 1, 3]]], np.uint8, 1, {"palette": [*PALETTE[:2], "#090909"], "ignore_index": 2},
     [[0, 1, IGNORED]]),
    ([COLOURS[:4]], np.uint8, 3, {"palette": PALETTE, "ignore_index": 3},
     "expected 4 different colours, one per class in order, and one for ignored"),
    # Colours of a palette. A palette image is read by its colours, not by its indices.
    (COLOURS[GREYS], np.uint8, 3, {"palette": PALETTE}, GREYS),
    (GREYS, "P", 3, {"palette": [PALETTE[i] for i in (0, 2, 1)]}, np.array([0, 2, 1])[GREYS]),
    ([[0, 85, 255]], np.uint8, 3, {"palette": ["#000000", "#555555", "#ffffff"]}, [[0, 1, 2]]),
    ([COLOURS[:2]], np.uint8, 1, {"palette": PALETTE[:2]}, [[0, 1]]),
    ([COLOURS[[0, 1, 4]]], np.uint8, 3, {}, "#000000, #0000ff, #ff0000"),
    ([COLOURS[[0, 1, 4]]], np.uint8, 3, {"palette": PALETTE}, "--palette lacks: #0000ff;"),
    *(([values], np.uint8, classes, {}, f"has the labels {str(values)[1:-1]}, beyond")
      for values, classes in (([0, 1, 2], 1), ([0, 2], 1), ([0, 128, 255], 1), ([0, 1, 255], 2),
                              ([0, 1, 3], 3))),
]  # fmt: skip
PHOTOGRAPH = "so it is a photograph, or noise, and no mask; check that the columns"
RECTANGLE = np.zeros((32, 32), int)
RECTANGLE[5:21, 9:30] = 1
MASKS = [
    *((written(pixels, kind), *others) for pixels, kind, *others in PIXELS),
    # Compression changes pixels of masks of two classes; the others are refused.
    *((written(pixels, name="a.jpg"), classes, {}, RECTANGLE) for classes in (1, 2)
      for pixels in (255 * RECTANGLE, 255 * grey(RECTANGLE))),
    (written(255 * RECTANGLE, name="a.jpg"), 3, {}, "save masks of colours"),
    (written(255 * RECTANGLE, name="a.jpg"), 1, {"palette": PALETTE[:2]}, "is a JPEG"),
    (written(grey(255 * DISC), name="a.webp", quality=40), 1, {}, DISC),
    (written(grey(255 * DISC), name="a.webp", quality=40, exif=Image.Exif().tobytes()), 1, {},
     DISC),
    (written(grey(CLASSES), name="a.webp"), 3, {}, "is a JPEG or a lossy WebP"),
    (written(grey(CLASSES), name="a.webp", lossless=True), 3, {}, CLASSES),
    (written(grey(255 * DISC), name="a.tif", compression="jpeg"), 1, {}, DISC),
    *((png_of_16_bits(*kind), 3, {}, "has colours of 16 bits, of which 8 are read")
      for kind in ((2, 3), (4, 2), (6, 4))),
    (tiff(np.where(DISC, 0, 65535).astype(np.uint16), photometric="miniswhite"), 1, {}, DISC),
    (written(NOISE), 1, {}, f"has 4096 colours, {PHOTOGRAPH}"),
    (written(NOISE, name="a.jpg"), 1, {}, PHOTOGRAPH),
    (written(NOISE[..., 0]), 1, {}, "beyond the two classes"),
    (lambda folder: (folder / "a.png").write_bytes(b"%PDF-1.4\n"), 1, {}, "it is none of"),
    (written([[0.5]], np.float32, "a.tif"), 1, {}, "floating-point"),
    # Encodings of the paper's data sets.
    *((written([pixels], kind, palette=palette), 1, {"encoding": "threshold"}, [labels])
      for pixels, kind, palette, labels in (
        ([0, 127, 128, 255], np.uint8, None, [0, 0, 1, 1]), ([0, 1], np.uint8, None, [0, 1]),
        ([False, True], bool, None, [0, 1]), ([0, 33000, 65535], np.uint16, None, [0, 1, 1]),
        ([0, 1], "P", b"\0\0\0\x80\0\0", [0, 1]),  # dark red, as class colours have it
        ([0, 1], "P", b"\xff\xff\xff\0\0\0", [1, 0]))),  # black and white exchanged
    *((written(pixels, kind, palette=RAMP), 3 if encoding == "thirds" else 1,
       {"encoding": encoding, "ignore_index": 128}, [labels])
      for encoding, greys, labels in ENCODED
      for pixels, kind in (([greys], np.uint8), (grey([greys]), np.uint8), ([greys], "P"))),
    *((written(grey([greys]), name="a.jpg"), 1, {"encoding": encoding, "ignore_index": 128},
       "is a JPEG") for encoding, greys, _ in ENCODED[:2]),
]  # fmt: skip


@pytest.mark.parametrize("write, classes, options, expected", MASKS)
def test_masks(tmp_path, write, classes, options, expected):
    write(tmp_path)
    (path,) = tmp_path.iterdir()
    sample = Sample(Path("image.png"), path, "row 2", options.get("encoding", "labels"))
    options = {name: value for name, value in options.items() if name != "encoding"}
    if isinstance(expected, str):
        message = error_of(read_mask, sample, classes, **options)
        assert expected in message and (str(path) in message or "expected 4" in message)
    else:
        mask = read_mask(sample, classes, **options)
        assert mask.dtype == np.int32 and mask.tolist() == np.asarray(expected).tolist()


@pytest.mark.parametrize(
    "pixels, dtype, classes, options, expected",
    [case for case in PIXELS if case[1] in (np.uint8, np.uint16) and np.ndim(case[0]) == 2],
)
def test_windows_of_masks(tmp_path, pixels, dtype, classes, options, expected):
    """Of TIFF files in tiles; what single windows do not show is refused as well."""
    values = np.tile(np.asarray(pixels, dtype), (20, 20))
    tifffile.imwrite(tmp_path / "a.tif", values, tile=(16, 16), compression="zlib")
    mask = open_mask(Sample(Path("image.png"), tmp_path / "a.tif", "x"), classes, **options)
    assert mask[:2] == values.shape
    size = len(values) // 2, values.shape[1] // 2 + 3
    windows = [(top, top + 3, left, left + 1) for top in range(size[0]) for left in range(size[1])]
    if isinstance(expected, str):
        message = error_of(lambda: [mask.values(*window) for window in windows])
        assert expected.split(" labels ")[0] in message and "a.tif" in message
        return
    labels = np.tile(np.asarray(expected, np.int32), (20, 20))
    for top, bottom, left, right in [*windows, (0, len(values), 0, values.shape[1])]:
        found = mask.values(top, bottom, left, right)
        assert found.dtype == np.int32 and np.array_equal(found, labels[top:bottom, left:right])


@pytest.mark.parametrize(
    "palette", [PALETTE[:2], [*PALETTE, "#ffffff"], ["#000000"] * 3, ["#000000", "x", "#fff"]]
)
def test_palettes_that_do_not_fit(palette):
    assert "--palette" in error_of(SegmentationDataset, [], 8, 3, palette)
    assert "--palette" in error_of(check_samples, [], 3, palette)


def test_images_that_are_refused(tmp_path):
    sample = Sample(tmp_path / "a.tif", None, "row 2")
    for value, kind, line in ((0.5, np.float32, "floating-p"), (70000, np.int32, "beyond 16 bits")):
        written([[value]], kind, "a.tif")(tmp_path)
        assert line in error_of(lambda: open_picture(sample).rows())


# What EXIF orientations do to an image.
UPRIGHT = (
    lambda a: a,
    lambda a: a[:, ::-1],
    lambda a: a[::-1, ::-1],
    lambda a: a[::-1],
    lambda a: a.T,
    lambda a: np.rot90(a, -1),
    lambda a: np.rot90(a, 2).T,
    lambda a: np.rot90(a),
)


@pytest.mark.parametrize("orientation, upright", list(enumerate(UPRIGHT, 1)))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_files_of_any_orientation(tmp_path, orientation, upright, dtype, compression):
    rotated = {"compression": compression, "extratags": [(274, "H", 1, orientation, True)]}
    labels = DISC[:, 9:].astype(dtype)
    tiff(labels, **rotated)(tmp_path)
    sample = Sample(tmp_path / "a.tif", tmp_path / "a.tif", "row 2")
    assert check_samples([sample], 1) == [True]
    assert np.array_equal(read_mask(sample, 1), upright(labels))


@pytest.mark.parametrize("cached", [False, True])
def test_the_ignored_label_passes_through_the_data_set(tmp_path, cached):
    written(np.full((4, 4), 11))(tmp_path)
    cache = Cache(tmp_path / "cache") if cached else None
    sample = Sample(tmp_path / "a.png", tmp_path / "a.png", "row 2")
    dataset = SegmentationDataset([sample], 32, 11, cache=cache, truth=True, ignore_index=11)
    for _ in range(2):
        assert (dataset[0]["mask"] == IGNORED).all() and (dataset[0]["truth"] == IGNORED).all()
    check_samples([sample], 11, ignore_index=11)
    other = SegmentationDataset([sample], 32, 11, cache=cache)
    assert "beyond the 11 classes" in error_of(other.__getitem__, 0)


def test_a_data_set_without_mask_files_ignores_no_label():
    assert "coco has no mask files" in error_of(run_config, dataset="coco", ignore_index=11)
