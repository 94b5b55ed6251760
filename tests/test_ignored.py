"""Pixels without a class, through a whole run: they have no influence."""

import shlex

import numpy as np
import pytest
from conftest import succeed
from miniatures import save

from naslora.files import read_json

VOID = 11
TRAIN = shlex.split(
    "--model vit_t --image-size 32 --epochs 2 --search-start 1 --workers 0 --num-classes 4 "
    "--class-names sky building pole --metrics dice iou accuracy pixel_accuracy miou class_iou "
    "--resolution original --ignore-index 11"
)


def street(root, void_label=VOID, seed=0):
    """Three test images, and others, of four classes in random blocks, a fifth of them void."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 4), ("val", 1), ("test", 3)):
        rows = ["image,label"]
        for i in range(count):
            blocks = rng.choice(5, (4, 5), p=[0.2, 0.2, 0.2, 0.2, 0.2])
            mask = np.kron(blocks, np.ones((12, 8), int))  # 48 x 40
            image = 60 * mask[..., None] + rng.integers(0, 15, (*mask.shape, 3))
            mask[mask == 4] = void_label
            for folder, pixels in (("images", image), ("masks", mask)):
                save(root / folder / f"{split}{i}.png", pixels)
            rows.append(f"images/{split}{i}.png,masks/{split}{i}.png")
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return root


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
