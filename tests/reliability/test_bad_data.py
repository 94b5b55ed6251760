"""Bad images, masks, CSV files and COCO files: each costs one line. Tables, and what Hypothesis
makes of good files."""

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml
from conftest import error_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from miniatures import check_samples
from PIL import Image
from test_coco import SQUARE_RUNS, annotations, write

from naslora.data.datasets import load_splits
from naslora.data.images import Sample
from naslora.data.masks import IGNORED, read_mask
from naslora.errors import UserError

TABLES = {
    group["name"]: group["cases"]
    for group in yaml.safe_load((Path(__file__).parent / "bad_data.yaml").read_text())
}
SIDE = 64
DISC = np.hypot(*(np.mgrid[:SIDE, :SIDE] - SIDE // 2)) < 20
NOISE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
CLASSES = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 3


# ---- COCO and CSV files --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write(tmp_path_factory.mktemp("coco"))


def read_all(root: Path, content: bytes) -> list[np.ndarray]:
    """Reads the training split of a COCO folder with another annotation file."""
    (root / "train.json").write_bytes(content)
    return [read_mask(sample, 3) for sample in load_splits("coco", root)["train"]]


def with_field(field: str, value: Any) -> bytes:
    """The annotation file with another value of a field, whose path has dots."""
    inner = file = json.loads(json.dumps(annotations("train")))
    *parents, name = [int(part) if part.isdigit() else part for part in field.split(".")]
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    return json.dumps(file).encode()


def contents():
    yield from ((with_field(*case), line) for *case, line in TABLES["field of a COCO file"])
    for counts, line in TABLES["run lengths of a COCO file"]:
        runs = {"size": [16, 20], "counts": counts}
        yield with_field("annotations.0.segmentation", runs), line
    yield from ((text.encode(), line) for text, line in TABLES["whole COCO file"])


@pytest.mark.parametrize("content, line", list(contents()))
def test_coco_files(coco, content, line):
    assert line in error_of(read_all, coco, content)


def read_csv(root: Path, content: bytes) -> list[Sample]:
    for split in ("train", "val", "test"):
        (root / f"{split}.csv").write_bytes(content)
    return load_splits("csv", root)["train"]


@pytest.mark.parametrize("text, line", TABLES["CSV file"])
def test_csv_files(tmp_path, text, line):
    content = text.replace("{long}", 25_000 * "a").encode("latin-1")
    assert line in error_of(read_csv, tmp_path, content)


# ---- Images and masks ----------------------------------------------------------------------------


def saved(pixels: np.ndarray, name: str, **options: Any):
    """Writes pixels with Pillow."""
    return lambda folder: Image.fromarray(pixels).save(folder / name, **options)


def colours(mask: np.ndarray) -> np.ndarray:
    return np.repeat(mask[..., None], 3, axis=2).astype(np.uint8)


def tiff(pixels: np.ndarray, **options: Any):
    return lambda folder: tifffile.imwrite(folder / "a.tif", pixels, **options)


def png_of_16_bits(kind: int, channels: int):
    """Writes class indices as PNG of 16 bits; Pillow cannot."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">2I5B", SIDE, SIDE, 16, kind, 0, 0, 0)
    rows = np.repeat(CLASSES, channels, axis=1).astype(">u2")
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    content = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return lambda folder: (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def raw(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
PHOTOGRAPH = "so it is a photograph, or noise, and no mask; check that the columns"
# What is written, the classes, and the line that refuses it, or the labels that are read.
MASKS = {
    "lossy WebP": (saved(colours(255 * DISC), "a.webp", quality=40), 1, DISC),
    "lossy WebP with EXIF": (
        saved(colours(255 * DISC), "a.webp", quality=40, exif=Image.Exif().tobytes()), 1, DISC
    ),
    "lossy WebP of classes": (saved(colours(CLASSES), "a.webp"), 3, "is a JPEG or a lossy WebP"),
    "lossless WebP": (saved(colours(CLASSES), "a.webp", lossless=True), 3, CLASSES),
    "TIFF with JPEG": (saved(colours(255 * DISC), "a.tif", compression="jpeg"), 1, DISC),
    "16-bit grey": (png_of_16_bits(0, 1), 3, CLASSES),
    "16-bit RGB": (png_of_16_bits(2, 3), 3, "has colours of 16 bits, of which 8 are read"),
    "16-bit grey and alpha": (png_of_16_bits(4, 2), 3, "has colours of 16 bits"),
    "16-bit RGBA": (png_of_16_bits(6, 4), 3, "has colours of 16 bits"),
    "white is zero": (
        tiff(np.where(DISC, 0, 65535).astype(np.uint16), photometric="miniswhite"), 1, DISC
    ),
    "noise": (saved(NOISE, "a.png"), 1, f"has 4096 colours, {PHOTOGRAPH}"),
    "noise as JPEG": (saved(NOISE, "a.jpg"), 1, PHOTOGRAPH),
    "grey noise": (saved(NOISE[..., 0], "a.png"), 1, "beyond the two classes"),
    "EPS": (raw("a.png", EPS), 1, "a.png cannot be read (it is none of BMP, GIF, JPEG"),
    "PDF": (raw("a.png", b"%PDF-1.4\n"), 1, "it is none of"),
}  # fmt: skip


@pytest.mark.parametrize("make, classes, expected", MASKS.values(), ids=MASKS)
def test_masks(tmp_path, make, classes, expected):
    make(tmp_path)
    (path,) = tmp_path.iterdir()
    sample = Sample(Path("image.png"), path, "row 2")
    if isinstance(expected, str):
        assert expected in error_of(read_mask, sample, classes)
    else:
        assert np.array_equal(read_mask(sample, classes), expected)


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
    labels = DISC[:, 9:].astype(dtype)
    rotated = {"compression": compression, "extratags": [(274, "H", 1, orientation, True)]}
    tifffile.imwrite(tmp_path / "mask.tif", labels, **rotated)
    tifffile.imwrite(tmp_path / "image.tif", labels, **rotated)
    sample = Sample(tmp_path / "image.tif", tmp_path / "mask.tif", "row 2")
    assert check_samples([sample], 1) == [True]
    assert np.array_equal(read_mask(sample, 1), upright(labels))


# What replaces an image of a folder, and the line.
FILES = {
    "pipe": (os.mkfifo, "train/images/a.png is a pipe, a socket or a device"),
    "broken link": (lambda path: path.symlink_to("nowhere"), "cannot be read (No such file"),
    "folder": (os.mkdir, "cannot be read (Is a directory)"),
    "EPS": (lambda path: path.write_bytes(EPS), "it is none of BMP"),
    "name that is not UTF-8": (
        lambda path: [
            Image.fromarray(NOISE).save(os.fsencode(folder) + b"/\xff.png")
            for folder in (path.parent, path.parent.with_name("masks"), )
        ] and Image.fromarray(NOISE).save(path),
        "\\udcff.png: the name is not UTF-8; rename the file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("replace, line", FILES.values(), ids=FILES)
def test_files_of_a_folder(tmp_path, replace, line):
    for split in ("train", "val", "test"):
        for kind, pixels in (("images", NOISE), ("masks", 255 * DISC.astype(np.uint8))):
            (tmp_path / split / kind).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / split / kind / "a.png")
    path = tmp_path / "train/images/a.png"
    path.unlink()
    replace(path)
    assert line in error_of(lambda: check_samples(load_splits("folders", tmp_path)["train"], 1))


# ---- What Hypothesis makes -----------------------------------------------------------------------

EXAMPLES = pytest.mark.parametrize(
    "examples", [60, pytest.param(5_000, marks=pytest.mark.campaign)]
)


def fuzz(check, examples: int, **strategies: st.SearchStrategy) -> None:
    """Calls ``check`` with examples; a ``UserError`` of one line is as good as a result."""

    def judged(**values: Any) -> None:
        try:
            check(**values)
        except UserError as error:
            assert str(error)

    few = settings(
        max_examples=examples,
        derandomize=examples < 1000,  # CI draws the same ones each time
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    few(given(**strategies)(judged))()


NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 16, 20, 320, 2**31, 2**62])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
COUNTS = (
    st.lists(st.integers(0, 40) | NUMBERS, max_size=30)
    | st.text(st.characters(min_codepoint=47, max_codepoint=112), max_size=40)
    | st.text()
    | st.integers(0, len(SQUARE_RUNS)).flatmap(
        lambda n: st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=3).map(
            lambda more: SQUARE_RUNS[:n] + more + SQUARE_RUNS[n + len(more) :]
        )
    )
)
SEGMENTATIONS = (
    JSON
    | st.fixed_dictionaries({"size": st.just([16, 20]) | JSON, "counts": COUNTS})
    | st.lists(st.lists(st.floats(-50, 50) | NUMBERS, min_size=5, max_size=12), max_size=3)
)
FIELDS = st.sampled_from(
    [
        *(f"images.0.{name}" for name in ("id", "file_name", "height", "width")),
        *(f"annotations.0.{name}" for name in ("id", "image_id", "category_id")),
        *("categories.0.id", "categories.0.name", "images", "annotations", "categories"),
    ]
)
CHANGES = st.tuples(FIELDS, JSON) | st.tuples(st.just("annotations.0.segmentation"), SEGMENTATIONS)


@EXAMPLES
def test_any_coco_file(coco, examples):
    def check(change: tuple[str, Any]) -> None:
        for mask in read_all(coco, with_field(*change)):
            assert mask.dtype == np.int32 and set(np.unique(mask)) <= {0, 1, 2, IGNORED}

    fuzz(check, examples, change=CHANGES)


@EXAMPLES
def test_any_csv_file(tmp_path, examples):
    (tmp_path / "a.png").touch()
    cells = st.sampled_from(["image", "label", "a.png", ".", "", '"', "\0", "../"]) | st.text()
    rows = st.lists(st.lists(cells, max_size=4).map(",".join), max_size=5).map("\n".join)
    files = st.binary(max_size=80) | rows.map(lambda text: ("image,label\n" + text).encode())
    fuzz(lambda content: read_csv(tmp_path, content), examples, content=files)


@EXAMPLES
def test_any_mask(tmp_path, examples):
    """Files of every format with changed bytes, or cut off."""
    good = []
    for name in ("a.png", "a.jpg", "a.tif", "a.bmp", "a.webp", "a.gif", "a.ppm"):
        for pixels in (255 * DISC.astype(np.uint8), colours(CLASSES)):
            Image.fromarray(pixels).save(tmp_path / name)
            good.append((tmp_path / name).read_bytes())
    sample = Sample(tmp_path / "no.png", tmp_path / "mask", "row 2")

    def check(content: bytes, changes: dict[int, int], end: int, classes: int) -> None:
        spoilt = bytearray(content)
        for place, value in changes.items():
            spoilt[place % len(spoilt)] = value
        sample.mask.write_bytes(spoilt[: len(spoilt) - end])
        mask = read_mask(sample, classes)
        assert mask.dtype == np.int32 and mask.ndim == 2
        assert set(np.unique(mask)) <= {*range(max(classes, 2)), IGNORED}

    early = st.integers(0, 200) | st.integers(0, 1 << 14)
    fuzz(
        check,
        examples,
        content=st.sampled_from(good),
        changes=st.dictionaries(early, st.integers(0, 255), max_size=6),
        end=st.just(0) | st.integers(0, 500),
        classes=st.integers(1, 4),
    )
