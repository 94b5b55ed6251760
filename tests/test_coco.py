"""COCO's annotations: drawing as pycocotools does, the layout of files, and bad input."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from naslora.data.cache import Cache
from naslora.data.dataset import SegmentationDataset
from naslora.data.datasets import load_splits
from naslora.data.masks import IGNORED, read_mask
from naslora.data.regions import draw_polygon, draw_segmentation
from naslora.errors import UserError
from naslora.training.run_config import RunConfig

HEIGHT, WIDTH = 16, 20
SQUARE = [2, 2, 10, 2, 10, 9, 2, 9]
SQUARE_RUNS = "R1790000000000000n4"
# Polygons and the run lengths that pycocotools 2.0.11 draws of them: frPyObjects([p], 16, 20).
# 3000 random polygons were compared in the same way.
POLYGONS = (
    (SQUARE, SQUARE_RUNS),
    ([3.2, 1.7, 16.4, 4.1, 11.9, 13.6, 5.5, 10.2], "b11?3M4L10O01O001O00O2M2N2Nn1"),
    ([-5, 4.5, 8.25, -3, 25, 7.75, 9.1, 30, 4.4, 12], "2782N101O1OT4MoK1O001O1O0OM"),
)
# mask.encode of np.random.default_rng(1).random((50, 70)) < 0.02
SPARSE_RUNS = (
    "c61_20WO0PO0\\20cN0hN0h00PO0f20o00WM0O0QO0a20]30\\J050i10aN000[20]M0[20e30UJ0?0ZO0<0YO0o10S30lJ"
    "0P1040oN0R10ZO0O0<04050F0E0=0h00oN0j00\\10`N0kN0o20oL0_30eL0e10\\N0:0b00d00F0[O0k60]H0Q10J0TO"
)


def draw(segmentation, height=HEIGHT, width=WIDTH):
    return draw_segmentation(segmentation, height, width, "here")


def runs(text, height=HEIGHT, width=WIDTH):
    return {"size": [height, width], "counts": text}


# --- drawing


def test_run_lengths():
    square = np.zeros((HEIGHT, WIDTH), bool)
    square[2:9, 2:10] = True
    assert np.array_equal(draw(runs(SQUARE_RUNS)), square)
    # Down the columns: two columns of 16 and two pixels, then seven, then nine between, ...
    plain = [34, *([7, 9] * 7), 7, HEIGHT * WIDTH - 34 - 8 * 7 - 7 * 9]
    assert np.array_equal(draw(runs(plain)), square)
    sparse = np.random.default_rng(1).random((50, 70)) < 0.02
    assert np.array_equal(draw(runs(SPARSE_RUNS, 50, 70), 50, 70), sparse)
    assert draw(runs([0, HEIGHT * WIDTH])).all() and not draw(runs([HEIGHT * WIDTH])).any()


@pytest.mark.parametrize("polygon, expected", POLYGONS)
def test_polygons_are_drawn_as_by_pycocotools(polygon, expected):
    mask = draw_polygon(np.array(polygon, float), HEIGHT, WIDTH)
    assert np.array_equal(mask, draw(runs(expected))) and mask.any()


def test_polygons_of_one_instance_are_united():
    other = [12, 3, 18, 3, 18, 14, 12, 14]
    assert np.array_equal(draw([SQUARE, other]), draw([SQUARE]) | draw([other]))


@pytest.mark.parametrize(
    "segmentation, message",
    [
        (runs(SQUARE_RUNS, 20, 16), "run lengths of 16x20 pixels (width x height), its image has"),
        (runs([3, 4]), "do not add up to 320 pixels"),
        (runs([-1, 321]), "do not add up to 320 pixels"),
        (runs(SQUARE_RUNS[:-1]), "here is neither"),
        (runs("é"), "the run lengths hold the character"),
        (runs(None), "here is neither"),
        ({"counts": [320]}, "here is neither"),
        ([[1, 2, 3, 4]], "a polygon needs at least three points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon needs at least three points"),
        ([[1, 2, 3, 4, 5, None]], "a polygon needs at least three points"),
        ([["a"] * 6], "here is neither a list of polygons nor run lengths"),
        (7, "here is neither"),
    ],
)
def test_segmentations_that_are_none(segmentation, message):
    with pytest.raises(UserError) as caught:
        draw(segmentation)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# --- files

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]  # classes: dog 1, cat 2


def annotation(number, image, category, segmentation):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "bbox": [0, 0, 1, 1],
        "iscrowd": 0,
    }


def annotations(split: str) -> dict:
    """Two images: a dog, and a cat that overlaps it; and nothing."""
    return {
        "info": {"year": 2026},
        "images": [
            {"id": 1, "file_name": f"{split}1.png", "height": HEIGHT, "width": WIDTH},
            {"id": 2, "file_name": f"{split}2.png", "height": HEIGHT, "width": WIDTH},
        ],
        "annotations": [
            annotation(11, 1, 3, [SQUARE]),
            annotation(12, 1, 7, runs([8 * HEIGHT, 3 * HEIGHT, 9 * HEIGHT])),  # columns 8 to 10
        ],
        "categories": list(CATEGORIES),
    }


def write_images(folder, split):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(split))
    for i in (1, 2):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{split}{i}.png")


LAYOUTS = {
    "plain": ("{split}.json", "images"),
    "coco": ("annotations/instances_{split}2017.json", "{split}2017"),
    "roboflow": ("{split}/_annotations.coco.json", "{split}"),
}


def write(root, layout="plain", content=annotations):
    for split in ("train", "val", "test"):
        name = "valid" if (layout, split) == ("roboflow", "val") else split
        file, folder = (part.format(split=name) for part in LAYOUTS[layout])
        write_images(root / folder, split)
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(json.dumps(content(split)))
    return root


EXPECTED = np.zeros((HEIGHT, WIDTH), int)
EXPECTED[2:9, 2:10] = 1
EXPECTED[:, 8:11] = 2
EXPECTED[2:9, 8:10] = IGNORED


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    splits = load_splits("coco", write(tmp_path, layout))
    assert {split: len(samples) for split, samples in splits.items()} == dict.fromkeys(
        ("train", "val", "test"), 2
    )
    for split, (first, second) in splits.items():
        assert first.image.name == f"{split}1.png" and first.image.is_file()
        assert np.array_equal(read_mask(first, 3), EXPECTED)
        assert not read_mask(second, 3).any()


def test_categories_that_a_run_wants(tmp_path):
    root = write(tmp_path)
    (cat, _) = load_splits("coco", root, ["cat"])["train"]
    assert np.array_equal(read_mask(cat, 1), (EXPECTED == 2) | (EXPECTED == IGNORED))
    (swapped, _) = load_splits("coco", root, ["cat", "dog"])["train"]
    assert read_mask(swapped, 3)[0, 8] == 1


def test_items_with_and_without_a_cache(tmp_path):
    samples = load_splits("coco", write(tmp_path))["train"]
    plain = SegmentationDataset(samples, 16, 3)
    for _ in range(2):
        cached = SegmentationDataset(samples, 16, 3, cache=Cache(tmp_path / "cache"))
        assert all((cached[i]["mask"] == plain[i]["mask"]).all() for i in (0, 1))
    assert set(plain[0]["mask"].unique().tolist()) == {0, 1, 2, IGNORED}


def test_the_classes_of_a_run(tmp_path):
    root = write(tmp_path)
    config = RunConfig(dataset="coco", root=root)
    assert (config.num_classes, config.class_names) == (3, ("dog", "cat"))
    again = RunConfig.from_dict(config.to_dict() | {"root": str(tmp_path / "moved away")})
    assert again.num_classes == 3
    one = RunConfig(dataset="coco", root=root, class_names=("cat",))
    assert (one.num_classes, one.foreground_names) == (1, ["cat"])
    with pytest.raises(UserError, match="coco has 3 classes, got 5"):
        RunConfig(dataset="coco", root=root, num_classes=5)


TRAIN = shlex.split("--model vit_t --image-size 32 --epochs 1 --search-start 0 --workers 0")


def test_a_run(naslora, tiny_vit, tmp_path):
    root = write(tmp_path / "data")
    output = ("--output", tmp_path / "run")
    result = naslora("train", "--dataset", "coco", "--root", root, *TRAIN, *output)
    assert result.status == 0, result.err
    scores = json.loads((tmp_path / "run/metrics.json").read_text())
    assert list(scores["test"]["per_class"]) == ["dog", "cat"]
    # A changed annotation is a change of the data.
    changed = annotations("train")
    changed["annotations"][0]["segmentation"] = [[2, 2, 10, 2, 10, 8, 2, 8]]
    (root / "train.json").write_text(json.dumps(changed))
    again = naslora("train", "--dataset", "coco", "--root", root, *TRAIN, "--resume", *output)
    assert again.status == 2 and "the mask of" in again.err and "train1.png" in again.err


# --- bad input


def spoilt(change):
    def content(split):
        file = annotations(split)
        if split == "train":
            change(file)
        return file

    return content


def rename(file):
    file["categories"] = [{"id": 7, "name": "cat"}, {"id": 3, "name": "horse"}]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f["annotations"][1].pop("segmentation"), "annotation 12 has no segmentation"),
        (lambda f: f["annotations"][1].update(segmentation=[]), "annotation 12 has no segmenta"),
        (rename, "val.json collide: 3 is horse and dog; give both the same"),
        (lambda f: f["categories"].append({"id": 3, "name": "cow"}), "ids and names must differ"),
        (lambda f: f["categories"].append({"id": 9, "name": "cat"}), "ids and names must differ"),
        (lambda f: f["annotations"][0].update(category_id=5), "the category 5, which the file la"),
        (lambda f: f["annotations"][0].update(image_id=5), "image 5, which the file lacks"),
        (lambda f: f["images"][0].update(file_name="no.png"), "names no.png, which is in none of"),
        (lambda f: f.update(images=[]), "train.json names no images"),
        (lambda f: f.pop("categories"), "is no file of COCO annotations"),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        load_splits("coco", write(tmp_path, content=spoilt(change)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_run_lengths_of_another_size_end_a_run_with_one_line(naslora, tiny_vit, tmp_path):
    other = spoilt(lambda f: f["annotations"][0].update(segmentation=runs([400], 20, 20)))
    root = write(tmp_path / "data", content=other)
    arguments = ("--root", root, *TRAIN, "--output", tmp_path / "run")
    result = naslora("train", "--dataset", "coco", *arguments)
    (line,) = result.err.strip().splitlines()
    assert result.status == 2 and not (tmp_path / "run").exists()
    assert "annotation 11 has run lengths of 20x20 pixels" in line and "has 20x16" in line


def test_missing_and_ambiguous_files(tmp_path):
    root = write(tmp_path)
    with pytest.raises(UserError, match="no category bird of --class-names, it has cat, dog"):
        load_splits("coco", root, ["bird"])
    (root / "val").mkdir()
    (root / "val/_annotations.coco.json").write_text("{}")
    with pytest.raises(UserError, match="expected one annotation file of val, found"):
        load_splits("coco", root)
    (root / "val/_annotations.coco.json").unlink()
    (root / "val.json").unlink()
    with pytest.raises(UserError, match="val missing"):
        load_splits("coco", root)
