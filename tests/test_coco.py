"""COCO's annotations: drawing, and the layout of files. tests/reliability has the bad files."""

import json

import numpy as np
import pytest
from conftest import SHORT, refusal, succeed
from miniatures import save
from run_configs import run_config

from naslora.data.datasets import load_splits
from naslora.data.masks import IGNORED, read_mask
from naslora.data.regions import draw_annotation
from naslora.errors import UserError

HEIGHT, WIDTH = 16, 20
SQUARE = [2, 2, 10, 2, 10, 9, 2, 9]
SQUARE_RUNS = "R1790000000000000n4"


def draw(*segmentations, height=HEIGHT, width=WIDTH):
    """Draws instances of the class 1."""
    instances = [(1, annotation(0, 1, 3, part)) for part in segmentations]
    content = {"height": height, "width": width, "instances": instances}
    return draw_annotation(json.dumps(content).encode(), IGNORED, "here")


def runs(text, height=HEIGHT, width=WIDTH):
    return {"size": [height, width], "counts": text}


def test_run_lengths():
    square = np.zeros((HEIGHT, WIDTH), bool)
    square[2:9, 2:10] = True
    # Down the columns: two columns of 16 and two pixels, then seven, then nine between, ...
    plain = [34, *([7, 9] * 7), 7, HEIGHT * WIDTH - 34 - 8 * 7 - 7 * 9]
    for segmentation in (runs(SQUARE_RUNS), runs(plain), [SQUARE]):
        assert np.array_equal(draw(segmentation), square)
    assert draw(runs([0, HEIGHT * WIDTH])).all() and not draw(runs([HEIGHT * WIDTH])).any()
    assert draw(runs("01", 1, 1), height=1, width=1).all()
    # Polygons of one instance are united. Drawn by pycocotools; it reaches beyond the image.
    beyond = [-5, 4.5, 8.25, -3, 25, 7.75, 9.1, 30, 4.4, 12]
    assert np.array_equal(draw([beyond]), draw(runs("2782N101O1OT4MoK1O001O1O0OM")))
    assert np.array_equal(draw([SQUARE, beyond]), draw([SQUARE], [beyond]))


CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]  # classes: dog 1, cat 2


def annotation(number, image, category, segmentation):
    own = {"id": number, "image_id": image, "category_id": category, "segmentation": segmentation}
    return {**own, "bbox": [0, 0, 1, 1], "iscrowd": 0}


def annotations(split: str) -> dict:
    """Two images: a dog, and a cat that overlaps it; and nothing."""
    size = {"height": HEIGHT, "width": WIDTH}
    return {
        "info": {"year": 2026},
        "images": [{"id": i, "file_name": f"{split}{i}.png", **size} for i in (1, 2)],
        "annotations": [
            annotation(11, 1, 3, [SQUARE]),
            annotation(12, 1, 7, runs([8 * HEIGHT, 3 * HEIGHT, 9 * HEIGHT])),  # columns 8 to 10
        ],
        "categories": list(CATEGORIES),
    }


LAYOUTS = {
    "plain": ("{split}.json", "images"),
    "coco": ("annotations/instances_{split}2017.json", "{split}2017"),
    "roboflow": ("{split}/_annotations.coco.json", "{split}"),
}


def write(root, layout="plain"):
    for split in ("train", "val", "test"):
        name = "valid" if (layout, split) == ("roboflow", "val") else split
        file, folder = (part.format(split=name) for part in LAYOUTS[layout])
        for i in (1, 2):
            image = np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3))
            save(root / folder / f"{split}{i}.png", image)
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(json.dumps(annotations(split)))
    return root


EXPECTED = np.zeros((HEIGHT, WIDTH), int)
EXPECTED[2:9, 2:10] = 1
EXPECTED[:, 8:11] = 2
EXPECTED[2:9, 8:10] = IGNORED


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    splits = load_splits("coco", write(tmp_path, layout))
    assert list(splits) == ["train", "val", "test"]
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


def test_the_classes_of_a_run(tmp_path):
    root = write(tmp_path)
    config = run_config(dataset="coco", root=root)
    assert (config.data.num_classes, config.data.class_names) == (3, ("dog", "cat"))
    one = run_config(dataset="coco", root=root, class_names=("cat",))
    assert (one.data.num_classes, one.data.class_names) == (1, ("cat",))
    with pytest.raises(UserError, match="coco has 3 classes, got num_classes 5"):
        run_config(dataset="coco", root=root, num_classes=5)


def test_a_run(tiny_sam, tmp_path):
    root = write(tmp_path / "data")
    output = ("--output", tmp_path / "run")
    succeed("train", "--dataset", "coco", "--root", root, *SHORT, *output)
    scores = json.loads((tmp_path / "run/metrics.json").read_text())
    assert list(scores["test"]["per_class"]) == ["dog", "cat"]
    # A changed annotation is a change of the data.
    changed = annotations("train")
    changed["annotations"][0]["segmentation"] = [[2, 2, 10, 2, 10, 8, 2, 8]]
    (root / "train.json").write_text(json.dumps(changed))
    again = refusal("train", "--dataset", "coco", "--root", root, *SHORT, "--resume", *output)
    assert "the mask of" in again and "train1.png" in again


def test_missing_and_ambiguous_files(tmp_path):
    root = write(tmp_path)
    with pytest.raises(UserError, match="no category bird of --class-names, it has cat, dog"):
        load_splits("coco", root, ["bird"])
    (root / "val").mkdir()
    (root / "val/_annotations.coco.json").write_text("{}")
    lines = r"expected one annotation file of val .* found val.json, val/_annotations"
    with pytest.raises(UserError, match=lines):
        load_splits("coco", root)
    (root / "val/_annotations.coco.json").unlink()
    (root / "val.json").unlink()
    with pytest.raises(UserError, match="expected one annotation file of val"):
        load_splits("coco", root)
