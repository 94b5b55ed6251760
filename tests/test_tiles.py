"""Large images: the grid of tiles, the blending, prediction and scores by tiles, random windows."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TRAIN, scores_of, succeed, write_checkpoint, write_data
from miniatures import save
from PIL import Image
from run_configs import run_config

from naslora.data import picture
from naslora.data.augmentation import Crop, draw_window
from naslora.data.dataset import SegmentationDataset
from naslora.data.images import Sample, source_of, source_of_array
from naslora.data.masks import IGNORED
from naslora.data.picture import Picture
from naslora.data.tiles import Grid, Tiles, fit_tiles
from naslora.predictor import Predictor
from naslora.sam.export import read_description
from naslora.sam.runtimes import load_class_map
from naslora.sam.segmentation import labels_of
from naslora.training.run_data import tiles_of

SIDE = 16


def by_tiles(tiles, image, function):
    """The blended class maps of a (1, H, W) image's tiles."""
    grid = Grid(tiles, *image.shape[1:])
    maps = (function(image[:, b.top : b.bottom, b.left : b.right]) for b in grid.boxes())
    return torch.cat([band for _, band in grid.blend(maps)], dim=1)


# --- the grid


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5])
def test_tiles_cover_the_image_and_overlap(overlap):
    for height, width in itertools.product((1, 15, 16, 17, 40, 100), (3, 16, 31, 64)):
        grid = Grid(Tiles(SIDE, overlap), height, width)
        boxes = list(grid.boxes())
        covered = np.zeros((height, width), int)
        for box in boxes:
            assert 0 <= box.top < box.bottom <= height and 0 <= box.left < box.right <= width
            assert box.bottom - box.top == min(SIDE, height)
            covered[box.top : box.bottom, box.left : box.right] += 1
        assert covered.min() >= 1
        assert len(boxes) == len(grid) == len(set(boxes))
        for starts in (sorted({box[axis] for box in boxes}) for axis in (0, 1)):
            shared = [a + SIDE - b for a, b in itertools.pairwise(starts)]
            assert all(SIDE * overlap - 1 <= s < SIDE for s in shared)  # evenly spread: rounded


@pytest.mark.parametrize("overlap", [0, 0.1, 0.25, 0.5])
def test_tiles_start_at_patches(overlap):
    side, step = 64, 8
    for length in range(64, 400):
        plain, grid = (Grid(Tiles(side, overlap, of), length, side) for of in (1, step))
        tops = [box.top for box in grid.boxes()]
        assert all(top % step == 0 for top in tops[:-1]) and tops[-1] == length - side
        spacings = [b - a for a, b in itertools.pairwise(tops)]
        assert all(0 < spacing <= side - round(overlap * side) for spacing in spacings)
        assert len(grid) <= 1.2 * len(plain) + 1  # 8 of 32 pixels fewer at most


def test_the_step_of_tiles_is_a_patch():
    assert fit_tiles(1024, 1024, 16).step == 16
    assert fit_tiles(512, 256, 16) == Tiles(512, 0.25, 32)
    assert fit_tiles(128, 256, 16, 0.5) == Tiles(128, 0.5, 8)
    assert fit_tiles(1036, 518, 14).step == 28
    assert fit_tiles(1000, 1024, 16).step == 1  # a patch has 15.6 pixels
    assert tiles_of(run_config(image_size=256, crop=320)).step == 20
    # Not more tiles than are needed: two of 16 with a quarter shared cover 28 pixels.
    for overlap, length, count in ((0, 32, 2), (0.25, 28, 2), (0.25, 29, 3)):
        assert len(Grid(Tiles(16, overlap), length, 16)) == count
    # A tile of a single patch, of which a half is shared: the overlap comes first.
    assert [box.top for box in Grid(Tiles(16, 0.5, 16), 32, 16).boxes()] == [0, 8, 16]


# --- blending


def test_a_model_of_patches_predicts_as_on_the_whole_image():
    """A model whose output is the mean of each patch, as an encoder without attention."""
    image = torch.rand(1, 240, 144, generator=torch.Generator().manual_seed(0))

    def means(pixels):
        return F.interpolate(F.avg_pool2d(pixels[None], 16), scale_factor=16)[0]

    torch.testing.assert_close(by_tiles(fit_tiles(80, 80, 16), image, means), means(image))
    # 53 pixels from tile to tile
    assert (by_tiles(Tiles(80), image, means) - means(image)).abs().max() > 0.01


def test_only_one_row_of_tiles_is_in_memory():
    grid = Grid(Tiles(SIDE, 0.25), 100, 40)
    taken = []

    def maps():
        for box in grid.boxes():
            taken.append(box.top)
            yield torch.zeros(1, *grid.size)

    rows = []
    for top, band in grid.blend(maps()):
        assert top == sum(rows) and len(set(taken)) == len(rows) + 1
        rows.append(band.shape[1])
    assert sum(rows) == 100


# --- prediction


def brightness(images: torch.Tensor) -> torch.Tensor:
    """A class map that depends on each pixel and its neighbours, smooth and clear of 0.5."""
    mean = F.avg_pool2d(images.mean(1, keepdim=True), 3, 1, 1, count_include_pad=False)
    return (20 * (mean - 0.5)).sigmoid()


def picture_of_cracks(height: int, width: int) -> Image.Image:
    """Dark curves on light ground, with edges as soft as in a photograph."""
    y, x = np.mgrid[:height, :width]
    line = np.abs(np.sin(x / 17 + np.sin(y / 23))) + np.abs(np.cos(y / 29 + np.sin(x / 31)))
    grey = np.uint8(255 * line / 2)
    return Image.fromarray(np.stack([grey] * 3, axis=2))


def segment(side: int, tiles: Tiles | None, picture: Image.Image) -> np.ndarray:
    """The labels of a whole picture."""
    predictor = Predictor(brightness, run_config(image_size=side), tiles)
    bands = predictor.score_bands(Picture(source_of(picture), "here"))
    return labels_of(torch.cat(list(bands), 1)[None])[0].numpy().astype(np.uint8)


def test_an_image_at_twice_its_size_by_tiles():
    """Tiles of an image at twice its size predict as the whole image does at that size.

    The size of the tiles is that of the model, so that nothing is resized.
    """
    picture = picture_of_cracks(96, 144).resize((288, 192), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    whole = labels_of(brightness(pixels))[0].numpy()
    assert 0.1 < whole.mean() < 0.9
    labels = segment(64, Tiles(64), picture)
    assert labels.dtype == np.uint8 and (labels == whole).mean() > 0.9999  # ties of rounding


@pytest.mark.parametrize("size", [(64, 64), (40, 64), (64, 17)])
def test_an_image_that_fits_is_segmented_as_without_tiles(size):
    picture = picture_of_cracks(*size)
    whole = segment(32, None, picture)
    assert whole.shape == size and np.array_equal(segment(32, Tiles(64), picture), whole)


# --- windows


def test_windows_that_hold_foreground(monkeypatch):
    monkeypatch.setattr(picture, "BAND", 300 * 7)  # rows that are read at once
    mask = np.zeros((200, 300), np.int32)
    mask[:, :150] = IGNORED  # no foreground
    mask[7, 290] = 1
    mask[150:160, 200:260] = 2
    crop, labels = Crop(32, foreground=1.0), source_of_array(mask)
    boxes = [draw_window(crop, 200, 300, labels, 0, epoch, 5) for epoch in range(200)]
    inside = [mask[b.top : b.bottom, b.left : b.right] for b in boxes]
    assert all(window.shape == (32, 32) for window in inside)
    shares = [np.mean([(window == k).any() for window in inside]) for k in (1, 2)]
    # A class is drawn first: one pixel is seen as often as six hundred. Binomial, 200 draws of 1/2:
    # five standard deviations are 0.18.
    assert shares == pytest.approx([0.5, 0.5], abs=0.18)
    assert len({box.top for box in boxes}) > 30

    never = Crop(32, foreground=0.0)
    plain = [draw_window(never, 200, 300, labels, 0, epoch, 5) for epoch in range(200)]
    tops = np.array([box.top for box in plain])
    assert tops.min() < 20 and tops.max() > 148 and np.mean(tops) == pytest.approx(84, abs=20)
    nothing = source_of_array(np.zeros((200, 300), np.int32))
    empty = draw_window(crop, 200, 300, nothing, 0, 0, 0)
    assert empty.bottom - empty.top == 32
    assert draw_window(crop, 20, 300, None, 0, 0, 0)[0] == 0  # a short side is taken whole
    # A window depends on the seed, the epoch and the index.
    paths = ((1, 2, 3), (1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0))
    assert len({draw_window(Crop(8), 1000, 1000, None, *path) for path in paths}) == 4


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_items_are_windows_at_native_resolution(tmp_path, suffix):
    rng = np.random.default_rng(0)
    pixels, labels = (rng.integers(0, n, size) for n, size in ((256, (60, 90, 3)), (2, (60, 90))))
    files = [save(tmp_path / f"{n}.{suffix}", v) for n, v in (("i", pixels), ("m", labels))]
    sample = Sample(*files, "x")
    dataset = SegmentationDataset([sample], 32, 1, crop=Crop(32), seed=4)
    seen = set()
    for epoch in range(3):
        dataset.set_epoch(epoch)
        item = dataset[0]
        box = draw_window(Crop(32), 60, 90, source_of_array(labels), 4, epoch, 0)
        rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
        assert np.array_equal((255 * item["image"]).round().permute(1, 2, 0), pixels[rows, columns])
        assert np.array_equal(item["mask"], labels[rows, columns])
        seen.add(box)
    assert len(seen) == 3


# --- the command line


@pytest.fixture(scope="module")
def run(tiny_sam, tmp_path_factory):
    """A run on windows of larger images: the discs of ``write_data`` on canvases of 70 x 50."""
    folder = tmp_path_factory.mktemp("crops")
    data = write_data(folder / "data", train=4, val=2, test=2)
    for path in sorted((data / "images").iterdir()):
        for name, empty in (("images", 20), ("masks", 0)):
            file = data / name / path.name
            own = np.array(Image.open(file))
            canvas = np.full((70, 50, *own.shape[2:]), empty)
            canvas[20:52, 9:41] = own
            save(file, canvas)
    checkpoint = ("--checkpoint", write_checkpoint(folder / "sam.safetensors"))
    arguments = ("--data", data, *TRAIN, *checkpoint, "--crop", 32, "--augment", "medical")
    succeed("train", *arguments, "--cache", folder / "cache", "--output", folder / "run")
    return folder / "run"


def test_scores_by_tiles_are_those_of_the_predicted_masks(run, tmp_path):
    """Accuracy by tiles, counted in the masks that ``predict`` writes."""
    config = json.loads((run / "config.json").read_text())
    assert (config["data"]["crop"], config["data"]["resolution"]) == (32, "tiles")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test"]["resolution"] == "of each mask, by tiles of 32 x 32"
    assert "of each mask, by tiles of 32 x 32" in (run / "report.html").read_text()
    assert scores_of(run, "--resolution", "original")["resolution"] == "of each mask"
    data = run.parent / "data"
    images = [data / f"images/test{i}.png" for i in range(2)]
    succeed("predict", run, *images, "--tiles", "auto", "--output", tmp_path / "out")
    shares = []
    for image in images:
        predicted = np.array(Image.open(tmp_path / "out" / f"{image.stem}_mask.png")) > 0
        truth = np.array(Image.open(data / "masks" / image.name)) > 0
        shares.append((predicted == truth).mean())
    scores = scores_of(run)
    assert np.mean(shares) == pytest.approx(scores["accuracy"], abs=1e-6)
    assert scores["metrics"] == pytest.approx(metrics["test"]["metrics"], abs=1e-6)


def test_an_exported_model_knows_its_tiles(run, tmp_path):
    """The file predicts with ``--tiles auto`` what the merged model does."""
    image = run.parent / "data/images/test0.png"
    merged, file = tmp_path / "merged", tmp_path / "model.safetensors"
    succeed("merge", run, "--mode", "center", "--output", merged)
    succeed("export", merged, "--format", "safetensors", "--output", file)
    masks = []
    for model in (merged, file):
        output = tmp_path / f"of_{model.stem}"
        options = ("--tiles", "auto", "--output", output)
        succeed("predict", model, image, *options)
        masks.append(np.array(Image.open(output / "test0_mask.png")))
    assert (masks[0] == masks[1]).mean() > 0.999  # labels differ where rounding decides
    old = '{"model": "vit_t", "image_size": 32, "num_classes": 1, "class_names": ["a"]}'
    assert read_description(old).crop is None
    assert load_class_map(file)[1].crop == 32
