"""Pixels without a class, through a whole run: scores by hand, and no influence on training."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

VOID = 11
NAMES = ("sky", "building", "pole")
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
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(root / folder / f"{split}{i}.png")
            rows.append(f"images/{split}{i}.png,masks/{split}{i}.png")
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def run(naslora, tiny_sam, tmp_path_factory):
    folder = tmp_path_factory.mktemp("void")
    data = street(folder / "data")
    result = naslora("train", "--data", data, *TRAIN, "--output", folder / "run")
    assert result.status == 0, result.err
    return folder / "run"


def by_hand(predicted, truth):
    """Scores of three images from sets of pixels."""
    dice, iou, accuracy = [], [], []
    for p, t in zip(predicted, truth, strict=True):
        counts = t != VOID
        accuracy.append((p == t)[counts].mean())
        rows = []
        for label in (1, 2, 3):
            own, true = (p == label) & counts, (t == label) & counts
            both, either = (own & true).sum(), (own | true).sum()
            rows.append((2 * both / (own.sum() + true.sum()), both / either) if either else None)
        dice.append([np.nan if row is None else row[0] for row in rows])
        iou.append([np.nan if row is None else row[1] for row in rows])
    pooled_p, pooled_t = (np.concatenate([m.ravel() for m in part]) for part in (predicted, truth))
    pooled_p, pooled_t = pooled_p[pooled_t != VOID], pooled_t[pooled_t != VOID]
    classes = []
    for label in range(4):
        either = ((pooled_p == label) | (pooled_t == label)).sum()
        both = ((pooled_p == label) & (pooled_t == label)).sum()
        classes.append(both / either if either else np.nan)
    return {
        "dice": np.nanmean(np.nanmean(dice, axis=0)),
        "iou": np.nanmean(np.nanmean(iou, axis=0)),
        "accuracy": np.mean(accuracy),
        "pixel_accuracy": (pooled_p == pooled_t).mean(),
        "miou": np.nanmean(classes),
        "class_iou": dict(zip(("background", *NAMES), classes, strict=True)),
    }


def test_scores_of_three_images_by_hand(naslora, run, tmp_path):
    """``evaluate`` against counts in the masks that ``predict`` writes, both by tiles."""
    data = run.parent / "data"
    masks = [data / f"masks/test{i}.png" for i in range(3)]
    images = [data / f"images/test{i}.png" for i in range(3)]
    output = ("--output", tmp_path)
    assert naslora("predict", run, *images, "--tiles", 32, *output).status == 0
    predicted = [np.asarray(Image.open(tmp_path / f"test{i}_mask.png")) for i in range(3)]
    truth = [np.asarray(Image.open(path)) for path in masks]
    assert all((mask == VOID).any() for mask in truth)
    scores = json.loads(naslora("evaluate", run, "--resolution", "tiles").out)["metrics"]
    expected = by_hand(predicted, truth)
    assert scores.pop("class_iou") == pytest.approx(
        expected.pop("class_iou"), abs=1e-6, nan_ok=True
    )
    assert scores == pytest.approx(expected, abs=1e-6)  # float32 ratios


def test_void_pixels_have_no_influence(naslora, run, tmp_path):
    """Another void label, and the default 255 without the option, end with the same bits."""
    data = street(tmp_path / "data", void_label=255)
    options = [word for word in TRAIN if word not in ("--ignore-index", "11")]
    result = naslora("train", "--data", data, *options, "--output", tmp_path / "run")
    assert result.status == 0, result.err
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()
    own, other = (
        json.loads((path / "metrics.json").read_text()) for path in (run, tmp_path / "run")
    )
    assert own["test"] == other["test"]
