"""What a distillation reads: crops of images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from naslora.data.cache import Cache
from naslora.data.dataset import Item, SegmentationDataset
from naslora.data.images import Sample
from naslora.data.layouts import list_images, read_csv
from naslora.data.sampling import AUGMENT, hold_out, seeded_generator
from naslora.errors import UserError

FULL_SIZE = 1.375
"""Side of the images from which crops are taken, in sides of a crop."""


class Crops(SegmentationDataset):
    """Random crops of images, half of them mirrored.

    An epoch takes one crop of every image. After ``count`` epochs the crops repeat.

    Args:
        samples: the images.
        size: side of a crop in pixels.
        count: different crops of an image.
        smallest: smallest share of the area of a crop.
        seed: seed of the crops.
        cache: keeps the decoded images.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: int,
        count: int,
        smallest: float,
        seed: int,
        cache: Cache,
    ) -> None:
        super().__init__(samples, round(FULL_SIZE * size), 1, seed=seed, cache=cache)
        self.size, self.count, self.smallest = size, count, smallest

    def __getitem__(self, index: int) -> Item:
        """A crop."""
        draw = seeded_generator(AUGMENT, self.seed, int(self._epoch) % self.count, index)
        pixels, _ = self.read(self.samples[index])
        size, bicubic = [self.size, self.size], InterpolationMode.BICUBIC
        pixels = transforms.resized_crop(pixels, *self._box(draw), size, bicubic, antialias=True)
        if draw.random() < 0.5:
            pixels = transforms.horizontal_flip(pixels)
        return {"image": transforms.to_dtype(pixels, torch.float32, scale=True)}

    def _box(self, draw: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width: sides between 3:4 and 4:3, as far as they fit."""
        area = draw.uniform(self.smallest, 1)
        ratio = np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
        sides = np.clip(np.sqrt([area * ratio, area / ratio]), None, 1)
        height, width = (self.image_size * sides).round().astype(int).tolist()
        top = int(draw.integers(self.image_size - height + 1))
        return top, int(draw.integers(self.image_size - width + 1)), height, width


def find_images(
    photographs: Path, held_out: float, repeat: int, others: Sequence[Path], seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Finds the images to train on, and those to score on.

    Args:
        photographs: a folder of images.
        held_out: share of the photographs to score on.
        repeat: how often each other photograph is listed.
        others: CSV data sets whose training images are listed once.
        seed: seed of the held-out photographs.

    Raises:
        UserError: a folder is missing or holds no images.
    """
    found = [Sample(path, None, path.name) for path in list_images(photographs)]
    if not found:
        raise UserError(f"there are no images in {photographs}; give another --photographs")
    kept, scored = hold_out(found, held_out, seed)
    more = [s._replace(mask=None) for folder in others for s in read_csv(folder)["train"]]
    return repeat * kept + more, scored
