"""Pixels without a class, through a whole run: they have no influence."""

import shlex

import numpy as np
import pytest
from conftest import succeed, write_pairs

from naslora.files import read_json

VOID = 11
TRAIN = shlex.split(
    "--model vit_t --image-size 32 --epochs 2 --search-start 1 --workers 0 --num-classes 4 "
    "--class-names sky building pole --metrics dice iou accuracy pixel_accuracy miou class_iou "
    "--resolution original --ignore-index 11"
)


def street(root, void_label=VOID):
    """Three test images, and others, of four classes in random blocks, a fifth of them void."""

    def draw(rng):
        mask = np.kron(rng.integers(0, 5, (4, 5)), np.ones((12, 8), int))  # 48 x 40
        image = 60 * mask[..., None] + rng.integers(0, 15, (*mask.shape, 3))
        return image, np.where(mask == 4, void_label, mask)

    return write_pairs(root, draw, train=4, val=1, test=3)


@pytest.fixture(scope="module")
def run(tiny_sam, tmp_path_factory):
    folder = tmp_path_factory.mktemp("void")
    data = street(folder / "data")
    succeed("train", "--data", data, *TRAIN, "--output", folder / "run")
    return folder / "run"


def test_void_pixels_have_no_influence(run, tmp_path):
    """Another void label, and the default 255 without the option, end with the same bits."""
    data = street(tmp_path / "data", void_label=255)
    options = [word for word in TRAIN if word not in ("--ignore-index", "11")]
    succeed("train", "--data", data, *options, "--output", tmp_path / "run")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()
    own, other = (read_json(path / "metrics.json") for path in (run, tmp_path / "run"))
    assert own["test"] == other["test"]
