"""How close the masks of enlarged images by tiles are to those of the whole images.

python -m bench.tile_agreement RUNS --data DATA --output tiles.csv

The same weights predict the whole image and its tiles at the same scale: the model for tiles is
built at the size of a tile, the model for whole images at theirs. Images are mirrored to squares.
"""

import csv
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from naslora.data.images import Sample, read_image
from naslora.data.large import LargeImage
from naslora.data.layouts import read_csv
from naslora.data.masks import read_mask
from naslora.data.tiles import PATCH, Box, Grid, Tiles, fit_tiles
from naslora.errors import UserError
from naslora.methods import load_adapter
from naslora.prediction import Predictor, scores_of
from naslora.results import ADAPTER, CONFIG
from naslora.sam.export import ClassMap
from naslora.training.run_config import RunConfig, read_config
from naslora.training.run_model import build_frozen_model

NEAR, FAR = 16, 48
"""Pixels from the line between two tiles: within the first is a seam, beyond the second is none."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Tiles against whole images, over all of them."""

    model: str
    tile: int
    """Side in pixels of the enlarged image."""
    overlap: float
    """Share of a tile that neighbours have in common at least; it may exceed what was asked for."""
    at_patches: bool
    """Whether tiles start where patches of the encoder start."""
    equal_pixels: float
    """Share of pixels with the same label."""
    mask_dice: float
    """Dice of the two masks, mean over images."""
    seam_error: float
    """Mean absolute difference of the probabilities within ``NEAR`` pixels of a seam."""
    inner_error: float
    """The same beyond ``FAR`` pixels of every seam."""
    whole_dice: float
    """Dice of the whole images' masks with the truth, mean over images."""
    tiles_dice: float
    """Dice of the tiles' masks with the truth, mean over images."""
    patch_dice: float
    """Dice of the whole image's mask with its own after the image moved by a patch: how much of the
    disagreement is the model's own."""
    half_patch_dice: float
    """The same after it moved by half a patch."""


def main(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    data: Path,
    output: Path,
    split: str = "test",
    images: int = 12,
    enlarge: int = 2,
    sides: tuple[int, ...] = (320, 512),
    overlaps: tuple[float, ...] = (0, 0.125, 0.25, 0.5),
) -> None:
    """Writes a CSV file of ``Agreement``.

    Args:
        runs: folders of binary runs.
        data: a CSV folder of images of one size, whose longer side is a multiple of 16.
        output: the CSV file.
        split: the split of the images.
        images: their number.
        enlarge: factor of their sides. The models see them at their former scale.
        sides: of the tiles in pixels of the enlarged images; multiples of 16 * ``enlarge``.
        overlaps: of the tiles.
    """
    pairs = [enlarged(sample, enlarge) for sample in read_csv(data)[split][:images]]
    if len({picture.size for picture, _ in pairs}) > 1:
        raise UserError(f"{data}: the images of {split!r} must have one size")
    side = pairs[0][0].width
    rows = []
    for run in runs:
        class_map = class_map_at(run, side // enlarge)
        whole = [by_tiles(class_map, picture, Tiles(side), enlarge) for picture, _ in pairs]
        moved = [
            mean_dice(*moved_masks(class_map, pairs, whole, share * PATCH * enlarge // 2, enlarge))
            for share in (2, 1)
        ]
        for tiles in different(sides, overlaps, enlarge, side):
            class_map = class_map_at(run, tiles.size // enlarge)
            found = [by_tiles(class_map, picture, tiles, enlarge) for picture, _ in pairs]
            truths = [truth for _, truth in pairs]
            model = read_config(run / CONFIG).model
            rows.append(compare(model, tiles, whole, found, truths, moved))
            print(rows[-1], flush=True)
    with open(output, "w", newline="") as file:
        names = [field.name for field in dataclasses.fields(Agreement)]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = dataclasses.asdict(row)
            writer.writerow(
                {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
            )


def enlarged(sample: Sample, factor: int) -> tuple[Image.Image, np.ndarray]:
    """An enlarged image, mirrored to a square at its lower or right side, and its (H, W) mask."""
    image = read_image(sample)
    width, height = image.width * factor, image.height * factor
    side = max(width, height)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    pixels = np.pad(pixels, ((0, side - height), (0, side - width), (0, 0)), mode="reflect")
    truth = read_mask(sample, 1).repeat(factor, 0).repeat(factor, 1)
    return Image.fromarray(pixels), truth > 0


def class_map_at(run: Path, size: int) -> ClassMap:
    """The model of a run at another image size."""
    model = build_frozen_model(dataclasses.replace(read_config(run / CONFIG), image_size=size))
    load_adapter(model, run / ADAPTER)
    model.eval()
    return lambda images: model(images).class_map()


def different(
    sides: Sequence[int], overlaps: Sequence[float], enlarge: int, length: int
) -> list[Tiles]:
    """Tiles of every side and overlap, at patches and not, without those that lie as others do."""
    found: dict[tuple[Box, ...], Tiles] = {}
    for side, overlap in itertools.product(sides, overlaps):
        for tiles in (fit_tiles(side, side // enlarge, overlap), Tiles(side, overlap)):
            found.setdefault(tuple(Grid(tiles, length, length).boxes()), tiles)
    return list(found.values())


def by_tiles(class_map: ClassMap, picture: Image.Image, tiles: Tiles, enlarge: int) -> np.ndarray:
    """The (S, S) probabilities of a square picture, from its tiles or from one that covers it."""
    predictor = Predictor(class_map, RunConfig(image_size=tiles.size // enlarge), tiles)
    grid, image = Grid(tiles, picture.height, picture.width), LargeImage(picture)
    maps = (scores_of(predictor, image.crop(box))[0] for box in grid.boxes())
    return torch.cat([band[0] for _, band in grid.blend(maps)]).numpy()


def seam_distance(starts: Sequence[int], side: int, length: int) -> np.ndarray:
    """(S, S): distance of each pixel to the closest line in the middle of an overlap."""
    lines = [(first + side + second) / 2 for first, second in itertools.pairwise(starts)]
    along = np.abs(np.arange(length)[:, None] + 0.5 - np.array(lines)).min(1)
    return np.minimum(along[:, None], along[None, :])


def compare(
    model: str,
    tiles: Tiles,
    whole: Sequence[np.ndarray],
    found: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    moved: Sequence[float],
) -> Agreement:
    """Compares the (S, S) probabilities of all images, where these are not mirrored.

    Args:
        model: its name.
        tiles: of ``found``.
        whole: from the whole images.
        found: from their tiles.
        truths: (H, W) bool masks.
        moved: ``patch_dice`` and ``half_patch_dice``.
    """
    height, width = truths[0].shape
    length = len(whole[0])
    starts = sorted({box.top for box in Grid(tiles, length, length).boxes()})
    distance = seam_distance(starts, tiles.size, length)[:height, :width]
    one, other = (np.stack(maps)[:, :height, :width] for maps in (whole, found))
    masks, tile_masks = one > 0.5, other > 0.5
    error = np.abs(one - other)
    closest = min(first + tiles.size - second for first, second in itertools.pairwise(starts))
    return Agreement(
        model,
        tiles.size,
        closest / tiles.size,
        tiles.step > 1,
        float((masks == tile_masks).mean()),
        mean_dice(masks, tile_masks),
        mean_or_nan(error[:, distance <= NEAR]),
        mean_or_nan(error[:, distance > FAR]),
        mean_dice(masks, truths),
        mean_dice(tile_masks, truths),
        *moved,
    )


def moved_masks(
    class_map: ClassMap,
    pairs: Sequence[tuple[Image.Image, np.ndarray]],
    whole: Sequence[np.ndarray],
    pixels: int,
    enlarge: int,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The masks of whole images, and those after the images moved down and right by ``pixels``."""
    masks, others = [], []
    for (picture, truth), probabilities in zip(pairs, whole, strict=True):
        side, (height, width) = picture.width, truth.shape
        image = np.pad(np.asarray(picture), ((pixels, 0), (pixels, 0), (0, 0)), mode="reflect")
        image = Image.fromarray(image[:side, :side])
        moved = by_tiles(class_map, image, Tiles(side), enlarge)
        masks.append(probabilities[: height - pixels, : width - pixels] > 0.5)
        others.append(moved[pixels:height, pixels:width] > 0.5)
    return masks, others


def mean_or_nan(values: np.ndarray) -> float:
    """The mean, NaN of no values: small tiles have no pixel far from a seam."""
    return float(values.mean()) if values.size else float("nan")


def mean_dice(masks: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """Mean Dice of pairs of bool masks; 1 where both are empty."""
    dice = []
    for mask, other in zip(masks, others, strict=True):
        total = mask.sum() + other.sum()
        dice.append(2 * (mask & other).sum() / total if total else 1.0)
    return float(np.mean(dice))


if __name__ == "__main__":
    with torch.no_grad():
        tyro.cli(main)
