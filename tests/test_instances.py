"""Objects found without prompts from a user: label images, COCO files, scores; what is refused."""

import dataclasses
import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import SIZE, refusal, scores_of, succeed
from miniatures import save
from PIL import Image
from pycocotools import mask as coco
from safetensors.torch import save_file

from naslora.data.masks import IGNORED
from naslora.instances import Instance, InstanceScores, label_image, score_instances
from naslora.prediction import find_samples, predict_run
from naslora.sam.instance_config import InstanceConfig
from naslora.sam.prompts import PromptableSam


@pytest.fixture
def checkpoint(tiny_sam, tmp_path):
    """A SAM with random weights; ``vit_t`` has no other."""
    path = tmp_path / "sam.safetensors"
    save_file(PromptableSam("vit_t", SIZE).state_dict(), path)
    return path


def instance(mask: np.ndarray, score: float) -> Instance:
    runs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return Instance({"size": list(mask.shape), "counts": runs["counts"].decode()}, float(score))


def test_a_pixel_belongs_to_the_best_object_and_many_take_16_bits():
    rows, columns = np.mgrid[:20, :30]
    best, half, little = columns < 10, columns < 20, (columns < 12) & (rows < 5)
    labels = label_image([instance(m, 1) for m in (best, half, little)], (20, 30))
    assert labels.dtype == np.uint8
    expected = np.where(columns < 10, 1, np.where(columns < 20, 2, 0))
    assert np.array_equal(labels, expected)  # ``little`` keeps a sixth of its pixels
    single = [instance((rows == y) & (columns == x), 1) for y in range(20) for x in range(30)]
    many = label_image(single, (20, 30))
    assert many.dtype == np.uint16 and many.max() == 600
    assert not label_image([], (20, 30)).any()


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    """Two images with two bright discs each, and the discs of both, (2, H, W) bool."""
    folder = tmp_path_factory.mktemp("images")
    rows, columns = np.mgrid[:96, :144]
    masks = np.stack([np.hypot(rows - 46, columns - x) < 20 for x in (40, 105)])
    for name in ("a", "b"):
        noise = np.random.default_rng(ord(name)).integers(0, 30, (96, 144, 3))
        save(folder / f"{name}.png", noise + 40 + 150 * masks.any(0)[..., None])
    return folder, masks


def test_files_hold_the_same_objects(discs, tmp_path):
    """With the weights in the package, which find what a disc is."""
    images, truth = shutil.copytree(discs[0], tmp_path / "images"), discs[1]
    output = tmp_path / "output"
    options = shlex.split("--instances --points-per-side 8 --min-iou 0.6 --min-stability 0.7")
    command = ("predict", "vit_t", images, "--output", output, *options)
    assert "wrote 2 masks" in succeed(*command).out
    content = json.loads((output / "instances.json").read_text())
    assert [one["file_name"] for one in content["images"]] == ["a.png", "b.png"]
    assert {(one["height"], one["width"]) for one in content["images"]} == {(96, 144)}
    assert content["categories"] == [{"id": 1, "name": "object"}]
    count = len(content["annotations"])
    assert [one["id"] for one in content["annotations"]] == [*range(1, 1 + count)]
    for image in content["images"]:
        own = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        scores = [one["score"] for one in own]
        assert scores == sorted(scores, reverse=True)
        found = [Instance(one["segmentation"], one["score"]) for one in own]
        assert all(one["area"] == f.mask().sum() > 0 for one, f in zip(own, found, strict=True))
        for disc in truth:
            masks = [instance.mask() for instance in found]
            assert max((m & disc).sum() / (m | disc).sum() for m in masks) > 0.8
        labels = np.asarray(Image.open(output / f"{image['file_name'][0]}_mask.png"))
        assert np.array_equal(labels, label_image(found, (96, 144)))
        assert Image.open(output / f"{image['file_name'][0]}_overlay.jpg").size == (144, 96)
    assert "give --overwrite" in refusal(*command)
    # What an earlier call wrote into the folder of the images is no image.
    for file in output.glob("*.png"):
        shutil.copy(file, images)
    assert len(find_samples([images])) == 2


# ---- Scores --------------------------------------------------------------------------------------


def squares(*corners: tuple[int, int], side: int = 6) -> np.ndarray:
    """(30, 30) numbers of squares, by their upper left corners."""
    numbers = np.zeros((30, 30), np.int32)
    for number, (y, x) in enumerate(corners, 1):
        numbers[y : y + side, x : x + side] = number
    return numbers


def test_scores_of_images_with_nothing():
    empty, one = squares(), squares((3, 4))
    found = [instance(one > 0, 1)]
    assert score_instances([([], empty)]) == InstanceScores(1, 0, 0, *[None] * 5)
    assert score_instances([(found, empty)]) == InstanceScores(1, 0, 1, None, None, 0, 0, 0)
    assert score_instances([([], one)]) == InstanceScores(1, 1, 0, 0, 0, 0, 0, 0)
    # An image with nothing counts for no score.
    both = score_instances([(found, one), ([], empty)])
    assert dataclasses.astuple(both) == (2, 1, 1, *[pytest.approx(1)] * 5)


def test_average_precision_counts_better_masks_first():
    truth = squares((0, 0), (0, 20))
    found = squares((0, 0), (0, 20), (20, 20))
    found[:2, 20:] = 0  # IoU 2/3 with the second square
    masks = [instance(found == number, 1 / number) for number in (1, 2, 3)]
    scores = score_instances([(masks, truth)])
    # At 0.50, 0.55, 0.60 and 0.65 both are found. At the others 51 of the 101 recalls are reached.
    assert (scores.ap50, scores.ap) == pytest.approx((1, (4 + 6 * 51 / 101) / 10))
    assert (scores.sq, scores.rq) == pytest.approx((5 / 6, 4 / 5))
    assert scores.pq == pytest.approx(2 / 3)
    worse = [Instance(runs, -score) for runs, score in masks]  # the wrong one first
    ignored = np.where(squares((19, 19), side=11), IGNORED, truth)
    assert score_instances([(worse, truth)]).ap50 == pytest.approx(2 / 3)
    assert score_instances([(worse, ignored)]).ap50 == pytest.approx(1)


def test_evaluate_scores_objects_of_any_model(discs, tmp_path):
    images, truth = discs
    root = tmp_path / "data"
    save(root / "labels.png", truth[0] + 2 * truth[1])
    for split, names in (("train", "c"), ("val", "d"), ("test", "ab")):
        for name in names:
            shutil.copy(images / f"{'b' if name == 'b' else 'a'}.png", root / f"{name}.png")
        rows = [f"{name}.png,labels.png" for name in names]
        (root / f"{split}.csv").write_text("\n".join(["image,label", *rows]))
    options = shlex.split(
        "--instances --objects numbers --points-per-side 8 --min-iou 0.6 --min-stability 0.7"
    )
    scores = scores_of("vit_t", "--data", root, *options)
    assert (scores["images"], scores["objects"]) == (2, 4) and scores["found"] >= 4
    assert 0 < scores["ap"] < scores["ap50"] <= 1
    assert scores["pq"] == pytest.approx(scores["rq"] * scores["sq"], rel=0.2)
    assert "give --data DIR" in refusal("evaluate", "vit_t", *options)


def test_images_without_objects_have_empty_files(checkpoint, tmp_path, capsys):
    Image.new("RGB", (20, 20)).save(tmp_path / "black.png")
    none = InstanceConfig(points_per_side=2, min_iou=1)
    images = [tmp_path / "black.png"]
    (path,) = predict_run(checkpoint, images, tmp_path / "out", search=none)
    assert not np.asarray(Image.open(path)).any()
    assert json.loads((tmp_path / "out" / "instances.json").read_text())["annotations"] == []
    assert "no object was found: lower --min-iou" in capsys.readouterr().err


def test_a_model_that_is_not_known_is_refused(clean_data, tmp_path):
    save_file({"image_encoder.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    command = ("predict", tmp_path / "other.safetensors", clean_data / "images", "--instances")
    assert "no checkpoint of SAM that is known" in refusal(*command, "--output", tmp_path / "out")
