"""Bad images, masks, CSV files and COCO files: each costs one line. Tables, and what Hypothesis
makes of good files."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import error_of
from hypothesis import strategies as st
from miniatures import check_samples, save
from PIL import Image
from test_coco import SQUARE_RUNS, annotations, write
from test_masks import CLASSES, DISC, NOISE, grey

from naslora.data.datasets import load_splits
from naslora.data.images import Sample
from naslora.data.masks import IGNORED, read_mask
from naslora.errors import UserError, one_line
from reliability.conftest import fuzz

TABLES = {
    group["name"]: group["cases"]
    for group in yaml.safe_load((Path(__file__).parent / "bad_data.yaml").read_text())
}


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
    with pytest.raises(UserError) as caught:  # a name in the file may have a line break
        read_csv(tmp_path, content)
    assert line in one_line(str(caught.value))


# ---- Files of a folder ---------------------------------------------------------------------------

# What replaces an image of a folder, and the line.
FILES = {
    "pipe": (os.mkfifo, "train/images/a.png is a pipe, a socket or a device"),
    "broken link": (lambda path: path.symlink_to("nowhere"), "cannot be read (No such file"),
    "folder": (os.mkdir, "cannot be read (Is a directory)"),
    "EPS": (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "it is none of BMP"),
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
        for kind, pixels in (("images", NOISE), ("masks", 255 * DISC)):
            save(tmp_path / split / kind / "a.png", pixels)
    path = tmp_path / "train/images/a.png"
    path.unlink()
    replace(path)
    assert line in error_of(lambda: check_samples(load_splits("folders", tmp_path)["train"], 1))


# ---- What Hypothesis makes -----------------------------------------------------------------------

EXAMPLES = pytest.mark.parametrize(
    "examples", [60, pytest.param(5_000, marks=pytest.mark.campaign)]
)


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

    fuzz(examples, check, change=CHANGES)


@EXAMPLES
def test_any_csv_file(tmp_path, examples):
    (tmp_path / "a.png").touch()
    cells = st.sampled_from(["image", "label", "a.png", ".", "", '"', "\0", "../"]) | st.text()
    rows = st.lists(st.lists(cells, max_size=4).map(",".join), max_size=5).map("\n".join)
    files = st.binary(max_size=80) | rows.map(lambda text: ("image,label\n" + text).encode())
    fuzz(examples, lambda content: read_csv(tmp_path, content), content=files)


@EXAMPLES
def test_any_mask(tmp_path, examples):
    """Files of every format with changed bytes, or cut off."""
    good = []
    for name in ("a.png", "a.jpg", "a.tif", "a.bmp", "a.webp", "a.gif", "a.ppm"):
        for pixels in (255 * DISC, grey(CLASSES)):
            good.append(save(tmp_path / name, pixels).read_bytes())
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
        examples,
        check,
        content=st.sampled_from(good),
        changes=st.dictionaries(early, st.integers(0, 255), max_size=6),
        end=st.just(0) | st.integers(0, 500),
        classes=st.integers(1, 4),
    )
