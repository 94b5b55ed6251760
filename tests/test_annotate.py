"""Labelling by clicks: objects, the data set that they become, and the page."""

import asyncio
import shutil
import socket
import sys
from collections import Counter
from contextlib import closing
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import SIZE, TRAIN, error_of, free_port, refusal, scores_of, succeed, write_data
from miniatures import noise
from PIL import Image
from safetensors.torch import save_file

from naslora.annotate import Page
from naslora.data.layouts import read_csv
from naslora.instances import InstanceFinder
from naslora.labelling import LabelledSet, Labelling
from naslora.sam.instance_config import InstanceConfig
from naslora.sam.prompts import PromptableSam
from naslora.training.run_config import RunConfig

SHAPE = (24, 40)


class Boxes:
    """A predictor whose mask is the box, or a square around the last point in the object."""

    def set_image(self, pixels):
        self.seen = pixels

    def predict(self, points, kinds, box, logits, multimask_output):
        if box is None:
            x, y = points[np.flatnonzero(kinds)[-1]]
            box = (x - 2, y - 2, x + 3, y + 3)
        rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
        mask = (columns >= box[0]) & (columns < box[2]) & (rows >= box[1]) & (rows < box[3])
        count = 3 if multimask_output else 1
        return np.stack([mask] * count), np.arange(count), np.zeros((count, 4, 4))


@pytest.fixture
def images(tmp_path):
    return noise(tmp_path / "images", 6, SHAPE)


@pytest.fixture
def labelling(images, tmp_path):
    finder = SimpleNamespace(predictor=Boxes(), config=RunConfig())
    made = Labelling(finder, LabelledSet(tmp_path / "set"))
    made.open(images[0])
    return made


def test_three_images_are_a_data_set_and_keep_their_splits(images, tmp_path):
    root = tmp_path / "set"
    for i, image in enumerate(images):
        labels = np.full(SHAPE, i, np.uint8)
        LabelledSet(root).save(image, labels)  # as if every image were labelled another day
        if i == 2:
            assert {split: len(own) for split, own in read_csv(root).items()} == {
                "train": 1, "val": 1, "test": 1
            }  # fmt: skip
    labelled = LabelledSet(root)
    assert labelled.counts() == Counter(train=4, val=1, test=1)
    labelled.save(images[1], np.full(SHAPE, 300, np.uint16))
    again = LabelledSet(root)
    assert again.counts() == labelled.counts() and (again.read(images[1]) == 1).all()
    assert (again.read(images[5]) == 1).all() and again.read(tmp_path / "new.png") is None
    shutil.copytree(tmp_path, tmp_path.parent / "moved")  # paths are relative
    for samples in read_csv(tmp_path.parent / "moved" / "set").values():
        for sample in samples:
            assert "moved" in str(sample.image) and sample.mask.parent.name == "masks"


def test_equal_names_from_two_folders_do_not_collide(images, tmp_path):
    other = tmp_path / "other" / images[0].name
    other.parent.mkdir()
    shutil.copy(images[0], other)
    labelled = LabelledSet(tmp_path / "set")
    for number, image in enumerate((images[0], other), 1):
        labelled.save(image, np.full(SHAPE, number - 1, np.uint8))
    assert not labelled.read(images[0]).any() and labelled.read(other).all()


def test_objects_are_made_corrected_and_saved(labelling, images, tmp_path):
    labelling.prompt((10.0, 10.0))
    labelling.prompt((20.0, 10.0))
    labelling.prompt((3.0, 3.0), 0)
    step = labelling.steps[-1]
    assert len(step.points) == 3 and step.kinds == [1, 1, 0]
    labelling.undo()
    labelling.undo()
    assert labelling.shown()[10, 10] == 1 and not labelling.labels.any()
    labelling.keep()
    labelling.prompt(box=(8, 0, 30, 24))  # overlaps: kept objects keep their pixels
    labelling.keep()
    assert labelling.labels[10, 10] == 1 and labelling.labels[2, 9] == 2
    labelling.prompt((35.0, 20.0))
    labelling.remove(10, 10)
    labelling.remove(SHAPE[1], SHAPE[0])  # the corner of the last pixel
    labelling.save()  # with the object that is being made; numbers begin at 1
    assert np.unique(labelling.labels).tolist() == [0, 1, 2] and not labelling.changed
    labelling.open(images[1])
    labelling.save()  # no objects
    labelling.open(images[0])
    assert labelling.labels[20, 35] == 2 and labelling.labels[10, 10] == 0
    mask = np.asarray(Image.open(tmp_path / "set" / "masks" / "00.png"))
    assert mask.dtype == np.uint8 and np.array_equal(mask, labelling.labels)


def test_bad_masks_are_refused(labelling, images, tmp_path):
    labelling.save()
    path = tmp_path / "set" / "masks" / "00.png"
    Image.new("L", (5, 5)).save(path)
    assert "differ in size" in error_of(labelling.open, images[0])
    path.write_bytes(b"no image")
    assert "cannot be read" in error_of(labelling.open, images[0])


def test_what_is_labelled_trains_and_finds_the_next_objects(tiny_sam, tmp_path):
    """Ten images, a training, the next ten: the loop of two commands."""
    data = write_data(tmp_path / "data", train=4)
    images = sorted((data / "images").iterdir())
    labelled = LabelledSet(tmp_path / "set")
    for image in images[:3]:
        mask = np.asarray(Image.open(data / "masks" / image.name))
        labelled.save(image, 7 * mask)
    options = (*TRAIN, "--task", "promptable", "--objects", "numbers", "--target", "qkv")
    output = tmp_path / "run"
    succeed("train", "--data", tmp_path / "set", *options, "--output", output)
    search = ("--points-per-side", "2", "--min-iou", "0", "--min-stability", "0")
    assert scores_of(output, "--instances", *search)["objects"] == 1
    found = ("--instances", "--output", tmp_path / "found", *search)
    assert "wrote 1 masks" in succeed("predict", output, images[3], *found).out
    labelling = Labelling(InstanceFinder(output, InstanceConfig()), LabelledSet(tmp_path / "set"))
    labelling.open(images[3])
    labelling.prompt(box=(8.0, 8.0, 24.0, 24.0))
    labelling.save()
    assert labelling.labelled.counts() == Counter(train=2, val=1, test=1)
    result = refusal("export", output, "--format", "x-anylabeling", "--output", tmp_path / "tool")
    assert "merge it first" in result


# ---- The page ------------------------------------------------------------------------------------


def test_the_page_labels(tiny_sam, images, tmp_path):
    """By NiceGUI's client for tests, which runs no browser."""
    testing = pytest.importorskip("nicegui.testing")
    from nicegui import ui

    labelled = LabelledSet(tmp_path / "set")
    labelled.save(images[0], np.zeros(SHAPE, np.uint8))
    checkpoint = tmp_path / "sam.safetensors"
    save_file(PromptableSam("vit_t", SIZE).state_dict(), checkpoint)
    search = InstanceConfig(points_per_side=2, min_iou=0, min_stability=0, image_size=SIZE)
    page = Page(Labelling(InstanceFinder(checkpoint, search), labelled), images[:3])
    assert page.labelling.image == images[1]  # the first that is not labelled

    async def seen(user, text) -> None:
        await user.should_see(text, retries=1000)  # every 0.1 s

    async def label() -> None:
        async with testing.user_simulation(root=page.build) as user:
            await user.open("/")
            view = user.find(ui.interactive_image)

            async def mouse(x, y, to=None, **more) -> None:
                steps = len(page.labelling.steps)
                for kind, at in (("mousedown", (x, y)), ("mouseup", to or (x, y))):
                    place = {"image_x": at[0], "image_y": at[1]}
                    view.trigger("mouse", {"mouse_event_type": kind, **place, **more})
                while page.lock.locked() or len(page.labelling.steps) == steps:
                    await asyncio.sleep(0.01)

            await mouse(20, 12)
            await mouse(5, 5, button=2)
            await mouse(8, 8, to=(30, 20))
            assert page.labelling.steps[1].kinds == [1, 0]
            assert page.labelling.steps[2].box == (8, 8, 30, 20)
            assert page.marks().count("<circle") == 2 and page.marks().count("<rect") == 1
            user.find("Save").click()
            await seen(user, "01.png, 2 of 3, saved; objects: ")
            user.find("Next").click()
            await seen(user, "02.png, 3 of 3, new")
            user.find("Find all").click()
            await seen(user, "3 of 3, changed")
            images[0].unlink()
            key = {"action": "keydown", "repeat": False, "code": "ArrowRight", "location": 0}
            key |= dict.fromkeys(("altKey", "ctrlKey", "metaKey", "shiftKey"), False)
            user.find(ui.keyboard).trigger("key", {**key, "key": "ArrowRight"})
            await seen(user, "cannot be read")

    asyncio.run(label())
    assert labelled.counts() == Counter(train=1, val=1, test=1)


def test_what_is_refused_and_served(tiny_sam, images, monkeypatch, tmp_path):
    model = tmp_path / "sam.safetensors"
    save_file(PromptableSam("vit_t", SIZE).state_dict(), model)
    command = ("annotate", model, images[0].parent, "--output", tmp_path / "set", "--no-browser")
    command += ("--image-size", SIZE)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        taken = server.getsockname()[1]
        assert f"port {taken} cannot be used" in refusal(*command, "--port", taken)
    monkeypatch.setitem(sys.modules, "nicegui", None)
    assert "pip install 'naslora[annotate]'" in refusal(*command, "--port", port := free_port())
    page = Mock()  # which other machines cannot open
    monkeypatch.setitem(sys.modules, "nicegui", SimpleNamespace(ui=page))
    assert f"label 6 images at http://127.0.0.1:{port}; " in succeed(*command, "--port", port).out
    given = page.run.call_args.kwargs
    assert (given["host"], given["port"], given["show"]) == ("127.0.0.1", port, False)
