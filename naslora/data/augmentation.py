"""Random changes of training images and their masks, and random crops.

Every choice is a pure function of the seed, the epoch and the index of the sample. The global
random state stays as it is.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from naslora.choices import Augment
from naslora.data.masks import IGNORED
from naslora.data.picture import Source
from naslora.data.sampling import AUGMENT, CROP, seeded_generator
from naslora.data.tiles import Box

# What a rotation brings in from outside is black, and no pixel with a known class.
_OUTSIDE = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}


def geometry(augment: Augment, size: int) -> list[v2.Transform]:
    """The transforms that move pixels, of images of ``size`` x ``size`` pixels.

    The mirroring is not among them: ``SegmentationDataset`` has it, for every choice but "none".
    """
    if augment == "dihedral":  # mirrored or not, the four turns are the symmetries of the square
        turns = [v2.Lambda(partial(torch.rot90, k=k, dims=(-2, -1)), *_OUTSIDE) for k in range(4)]
        return [v2.RandomChoice(turns)]
    if augment == "medical":
        return [
            v2.RandomAffine(
                degrees=15,
                translate=(0.05, 0.05),
                scale=(0.85, 1.15),
                interpolation=v2.InterpolationMode.BILINEAR,
                fill=_OUTSIDE,
            )
        ]
    if augment == "natural":
        return [v2.RandomResizedCrop((size, size), scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3))]
    return []


def colour(augment: Augment) -> list[v2.Transform]:
    """The transforms that change values, and leave every pixel in its place."""
    if augment == "medical":
        # No change of hue or saturation, because the colour of a stain or a tissue is evidence.
        blur = v2.GaussianBlur(kernel_size=5, sigma=(0.1, 1.5))
        return [v2.ColorJitter(brightness=0.2, contrast=0.2), v2.RandomApply([blur], p=0.2)]
    if augment == "natural":
        jitter = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05)
        return [jitter, v2.RandomGrayscale(p=0.1)]
    return []


class Augmentation:
    """Changes an image and its mask together. Colours change only if there are three channels."""

    def __init__(self, augment: Augment, size: int, channels: int = 3) -> None:
        changes = [*geometry(augment, size), *(colour(augment) if channels == 3 else [])]
        self._transform = v2.Compose(changes) if changes else None

    def __call__(
        self, image: Tensor, mask: Tensor | None, seed: int, epoch: int, index: int
    ) -> tuple[Tensor, Tensor | None]:
        """Changes a (C, S, S) uint8 image and its (S, S) integer labels; None without a mask.

        Pixels from outside the image become 0, and their label ``IGNORED``. ``seed`` is the run's,
        ``index`` that of the sample in its data set.
        """
        if self._transform is None:
            return image, mask
        number = int(seeded_generator(AUGMENT, seed, epoch, index).integers(2**63))
        # torchvision draws from PyTorch's generator of the CPU. ``torch.manual_seed`` would also
        # seed the GPU, whose state is not restored here.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(number)
            labels = None if mask is None else tv_tensors.Mask(mask)  # None passes through
            changed, labels = self._transform(tv_tensors.Image(image), labels)
        return changed.as_subclass(Tensor), None if mask is None else labels.as_subclass(Tensor)


# ---- Crops ---------------------------------------------------------------------------------------


class Crop(NamedTuple):
    """Random windows of the training images."""

    size: int
    """Side of a window in the image's own pixels. A shorter side of an image is taken whole."""
    foreground: float = 0.5
    """Share of the windows that hold foreground, in [0, 1], of images that have some."""


def draw_window(
    crop: Crop, height: int, width: int, mask: Source | None, seed: int, epoch: int, index: int
) -> Box:
    """Draws the window of a sample.

    With the probability ``crop.foreground`` the window holds a pixel of the foreground: a class of
    the mask is drawn, so that rare classes are seen as often as others, then one of its pixels, and
    then a window around it. Otherwise, and without foreground, every window is equally likely.

    ``height`` and ``width`` are the image's in pixels. Labels of ``mask``, None without one, are
    read band by band if they are needed. The seeds are those of ``Augmentation``.
    """
    random = seeded_generator(CROP, seed, epoch, index)
    wanted = random.random() < crop.foreground
    pixel = _foreground_pixel(mask, random) if wanted and mask is not None else None
    size = min(crop.size, height), min(crop.size, width)
    corner = []
    for axis, (length, side) in enumerate(zip((height, width), size, strict=True)):
        first, last = 0, length - side
        if pixel is not None:
            first, last = max(first, pixel[axis] - side + 1), min(last, pixel[axis])
        corner.append(int(random.integers(first, last + 1)))
    return Box(corner[0], corner[1], corner[0] + size[0], corner[1] + size[1])


def _foreground_pixel(mask: Source, random: np.random.Generator) -> tuple[int, int] | None:
    """Draws a class of the foreground, then a pixel of it; None without foreground."""
    bands = [*mask.bands()]
    parts = (mask.rows(*band).ravel() for band in bands)
    counts = np.stack([np.bincount(part, minlength=IGNORED + 1) for part in parts])
    counts[:, [0, IGNORED]] = 0
    classes = np.flatnonzero(counts.sum(0))
    if not len(classes):
        return None
    label = classes[random.integers(len(classes))]
    ends = counts[:, label].cumsum()
    place = int(random.integers(ends[-1]))
    band = int(np.searchsorted(ends, place, side="right"))
    place -= int(ends[band] - counts[band, label])
    pixels = np.flatnonzero(mask.rows(*bands[band]) == label)
    row, column = divmod(int(pixels[place]), mask.width)
    return bands[band][0] + row, column
