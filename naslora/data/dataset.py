"""The data set that a training loop reads: resized images and masks, changes, and collation."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms.v2 import functional as transforms

from naslora.choices import Augment, ObjectSource
from naslora.data.augmentation import Augmentation, Crop, draw_window
from naslora.data.cache import Cache
from naslora.data.images import Annotation, Sample, open_picture, source_of_array
from naslora.data.masks import has_foreground, open_mask, palette_codes, read_mask, read_numbers
from naslora.data.objects import Counts, choose_objects, components, count_objects, numbered
from naslora.data.picture import Intensity, Picture, Source, readable
from naslora.data.regions import draw_objects
from naslora.data.sampling import FLIP, seeded_generator
from naslora.data.tiles import Box, Tiles
from naslora.errors import UserError


class Item(TypedDict, total=False):
    """One sample of ``SegmentationDataset``."""

    image: Tensor
    """(C, S, S) float32 in [0, 1], RGB by default, resized bicubically with antialiasing."""
    index: int
    """Position of the sample in ``SegmentationDataset.samples``."""
    name: str
    """Path of the image, relative to the folder that contains all images."""
    mask: Tensor
    """(S, S) int64 class indices, resized to the nearest pixel. Absent without a mask."""
    truth: Tensor
    """(H, W) int64 class indices at the size of the file, never flipped. Only on request."""
    pixels: Tensor
    """(C, H, W) uint8 at the size of the file, in place of ``image`` and ``mask``, of whole
    images."""


@dataclass(eq=False)
class SegmentationDataset(Dataset[Item]):
    """Images and masks, resized to a square without keeping the aspect ratio.

    Raises:
        UserError: the palette does not fit the classes.
            On access: as ``open_picture`` and ``read_mask``, or an image and its mask differ in
            size.
    """

    samples: list[Sample]
    image_size: int
    """Side S of the square, in pixels."""
    num_classes: int
    """As in ``read_mask``, and so are ``palette`` and ``ignore_index``."""
    palette: Sequence[str] | None = None
    flip: bool = False
    """Whether to mirror half of the images, with their masks, from left to right. The choice
    depends only on the seed, the epoch and the index."""
    seed: int = 0
    """Seed of the flips."""
    cache: Cache | None = None
    """Cache for the resized images and masks; None decodes a file at each access."""
    truth: bool = False
    """Whether items contain ``truth``."""
    ignore_index: int | None = None
    augment: Augment = "none"
    """Further changes of the images and masks, as ``Augmentation``."""
    crop: Crop | None = None
    """Windows that are drawn anew in each epoch, in place of whole images; None for none."""
    intensity: Intensity | None = None
    """As in ``open_picture``, and so are ``channels``."""
    channels: int | None = None
    objects: ObjectSource | None = None
    """What the objects of ``PromptConfig.objects`` are, if masks shall hold objects' numbers, as
    ``choose_objects`` gives them; None for class indices."""
    most_objects: int = 1
    """Largest number of objects that an item has."""
    tiles: Tiles | None = None
    """How the images will be cut, if items shall hold images and masks at the size of their files;
    None for items of S x S pixels."""

    def __post_init__(self) -> None:
        self.augmentation = Augmentation(self.augment, self.image_size, self.channels or 3)
        self.whole = self.crop is not None or self.tiles is not None
        palette_codes(self.palette, self.num_classes, self.ignore_index)  # raises if they misfit
        # The images' paths below their common folder; pictures and tables show them.
        paths = [os.path.abspath(sample.image) + sample.at for sample in self.samples]
        common = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
        self.names = [Path(path).relative_to(common).as_posix() for path in paths]
        # In shared memory, because persistent workers must see the change of the epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the flips depend on. Call it before the epoch's iteration."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        sample, place = self.samples[index], (self.seed, int(self._epoch), index)
        item: Item = {"index": index, "name": self.names[index]}
        read = self.read if self.crop is None else partial(self._window, self.crop, place)
        image, mask = read(sample)
        if self.tiles is not None:
            item["pixels"] = image
            if mask is not None:
                item["truth"] = mask.long()
            return item
        image, mask = self.augmentation(image, mask, *place)
        if self.flip and seeded_generator(FLIP, *place).random() < 0.5:
            image = transforms.horizontal_flip(image)
            mask = None if mask is None else transforms.horizontal_flip(mask)
        item["image"] = transforms.to_dtype(image, torch.float32, scale=True)
        if mask is not None:
            mask = mask.long()
            item["mask"] = choose_objects(mask, self.most_objects, *place) if self.objects else mask
        if self.truth:
            item["truth"] = torch.from_numpy(self._labels(sample).rows()).long()
        return item

    def read(self, sample: Sample) -> tuple[Tensor, Tensor | None]:
        """Reads an image and its mask, from the cache if there is one.

        Returns:
            (C, S, S) uint8, and (S, S) int32 class indices, None without a mask. With ``crop`` or
            ``tiles`` they have the size of the files.

        Raises:
            UserError: as ``open_picture`` and ``read_mask``, the image and the mask differ in size,
                or the cache cannot be written.
        """
        if self.cache is None:
            return self._decode(sample)
        files = _contents(sample)
        labels = (self.num_classes, self.palette, self.ignore_index, sample.encoding)
        size = "whole" if self.whole else self.image_size
        how = (size, *labels, self.intensity, self.channels, self.objects)

        def entry() -> tuple[Tensor, Tensor | None]:
            image, mask = self._decode(sample)
            if _contents(sample) != files:  # else the key would be another one's
                raise UserError(f"{sample.origin}: a file changed while it was read; run again")
            kind = torch.uint16 if self.objects else torch.uint8
            return image, None if mask is None else mask.to(kind)

        image, mask = self.cache.get(files, repr(how), entry)
        return image, None if mask is None else mask.int()

    def check(self, sample: Sample) -> tuple[bool, int | None, Counts | None]:
        """Reads a sample once, which fills the cache. An image is decoded piece by piece.

        Returns:
            Whether a pixel of the mask that counts has another label than 0. The highest value of
            an image of more than 8 bits, without ``intensity``; None for other images, and for
            those of the cache. The objects; None for class indices.

        Errors as ``read``.
        """
        if self.cache is not None or (self.objects and sample.mask is not None):
            mask = self.read(sample)[1]
            if mask is None or not self.objects:
                return mask is not None and has_foreground(mask.numpy()), None, None
            counts = count_objects(mask.numpy())
            if isinstance(sample.mask, Annotation):
                drawn = draw_objects(sample.mask.content, sample.origin)
                counts = Counts(*counts[:2], drawn.overlapping, drawn.crowds)
            return counts.objects > 0, None, counts
        picture, labels = self._open(sample)
        for top, bottom in picture.source.bands():
            picture.rows(top, bottom)
        picture.check_channels()
        found = [False]
        if labels is not None:
            found = [has_foreground(labels.rows(*band)) for band in labels.bands()]
        return any(found), picture.highest, None

    def cut(
        self, pixels: Tensor, labels: Tensor | None, box: Box | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Cuts a box, None for the whole, out of an image and its mask, and resizes both.

        (C, H, W) uint8 pixels become (C, S, S) uint8, (H, W) class indices (S, S) int32. Without a
        mask ``labels`` is None, and so is its result.
        """
        top, left, bottom, right = box or (0, 0, None, None)
        image = resize_image(pixels[:, top:bottom, left:right], self.image_size)
        if labels is None:
            return image, None
        mask = Image.fromarray(labels[top:bottom, left:right].int().numpy())
        mask = mask.resize((self.image_size, self.image_size), Image.Resampling.NEAREST)
        return image, torch.from_numpy(np.array(mask))

    def _window(
        self, crop: Crop, place: tuple[int, int, int], sample: Sample
    ) -> tuple[Tensor, Tensor | None]:
        """Reads the window of an epoch; without a cache, no more than that."""
        if self.cache is not None:
            image, mask = self.read(sample)
            labels = None if mask is None else source_of_array(mask.numpy())
            height, width = image.shape[1:]
            return self.cut(image, mask, draw_window(crop, height, width, labels, *place))
        picture, labels = self._open(sample)
        box = draw_window(crop, picture.height, picture.width, labels, *place)
        window = box.top, box.bottom, box.left, box.right
        mask = None if labels is None else torch.from_numpy(labels.values(*window))
        return self.cut(torch.from_numpy(picture.rows(*window)).permute(2, 0, 1), mask)

    def _decode(self, sample: Sample) -> tuple[Tensor, Tensor | None]:
        """Decodes an image and its mask."""
        picture, labels = self._open(sample)
        pixels = torch.from_numpy(picture.rows()).permute(2, 0, 1)
        mask = None if labels is None else torch.from_numpy(labels.rows())
        return (pixels.contiguous(), mask) if self.whole else self.cut(pixels, mask)

    def _open(self, sample: Sample) -> tuple[Picture, Source | None]:
        """Opens an image and its mask."""
        picture = open_picture(sample, self.intensity, self.channels)
        if sample.mask is None:
            return picture, None
        mask = self._labels(sample)
        if mask[:2] != (picture.height, picture.width):
            raise UserError(
                f"{sample.origin}: image {sample.image} has {picture.width}x{picture.height} "
                f"pixels (width x height), its mask {sample.mask} has "
                f"{mask.width}x{mask.height}; the sizes must be the same"
            )
        return picture, mask

    def _labels(self, sample: Sample) -> Source:
        """Opens a mask as class indices, or as the numbers of its objects."""
        labels = self.num_classes, self.palette, self.ignore_index
        if not self.objects:
            return open_mask(sample, *labels)
        if isinstance(sample.mask, Annotation):
            numbers = numbered(draw_objects(sample.mask.content, sample.origin).numbers)
        elif self.objects == "numbers":
            numbers = numbered(*read_numbers(sample, self.ignore_index))
        else:
            numbers = components(read_mask(sample, *labels))
        return source_of_array(numbers)


def _contents(sample: Sample) -> list[bytes]:
    """The bytes of the files of a sample; of a volume what stands for the slice."""
    contents = []
    for path in (*sample.files, sample.mask):
        with readable(f"{sample.origin}: {path}"):
            if isinstance(path, Path) and sample.slice:  # whose bytes are those of all slices
                stamp = os.path.abspath(path), path.stat().st_mtime_ns, sample.slice
                contents.append(repr(stamp).encode())
            elif path is not None:
                with path.open("rb") as file:
                    contents.append(file.read())
    return contents


def resize_image(pixels: Tensor, size: int) -> Tensor:
    """Resizes (C, H, W) uint8 to (C, size, size) uint8, bicubically with antialiasing."""
    # Bicubic interpolation overshoots at edges. Resizing in 8 bits clamps the overshoot.
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.resize(pixels, [size, size], bicubic).contiguous()


def collate(items: list[Item]) -> dict[str, Any] | None:
    """Makes a batch of items of one data set. All of them have a mask, or none has.

    Returns:
        The entries of ``Item``, stacked: (B, C, S, S) images, for instance. ``name``, ``truth`` and
        ``pixels`` are lists, because sizes may differ. None for no items: a process may have no
        share of a small last batch.
    """
    if not items:
        return None
    plain = [dict(item) for item in items]
    unequal = plain[0].keys() & {"truth", "pixels"}
    whole = {name: [item.pop(name) for item in plain] for name in unequal}
    return {**default_collate(plain), **whole}
