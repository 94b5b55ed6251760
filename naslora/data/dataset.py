"""The data set that a training loop reads: resized images and masks, changes, and collation."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms.v2 import functional as transforms

from naslora.choices import Augment
from naslora.data.augmentation import Augmentation, Crop, draw_window
from naslora.data.cache import Cache
from naslora.data.images import (
    Annotation,
    Sample,
    decode_image,
    unreadable,
)
from naslora.data.intensity import Intensity
from naslora.data.masks import IGNORED, check_sizes, decode_mask, palette_codes
from naslora.data.sampling import FLIP, seeded_generator
from naslora.data.tiles import Box, Tiles
from naslora.errors import UserError


class Item(TypedDict, total=False):
    """One sample of ``SegmentationDataset``."""

    image: Tensor
    """(3, S, S) float32 in [0, 1], RGB, resized bicubically with antialiasing."""
    index: int
    """Position of the sample in ``SegmentationDataset.samples``."""
    name: str
    """Path of the image, relative to the folder that contains all images."""
    mask: Tensor
    """(S, S) int64 class indices, resized to the nearest pixel. Absent without a mask."""
    truth: Tensor
    """(H, W) int64 class indices at the size of the file, never flipped. Only on request."""
    pixels: Tensor
    """(3, H, W) uint8 RGB at the size of the file, in place of ``image`` and ``mask``, of whole
    images."""


class Batch(TypedDict, total=False):
    """B items of ``SegmentationDataset``."""

    image: Tensor
    """(B, 3, S, S) float32."""
    index: Tensor
    """(B,) int64."""
    name: list[str]
    mask: Tensor
    """(B, S, S) int64. Absent without masks."""
    truth: list[Tensor]
    """(H, W) int64 each; sizes may differ. Only on request."""
    pixels: list[Tensor]
    """(3, H, W) uint8 each, of whole images."""


class SegmentationDataset(Dataset[Item]):
    """Images and masks, resized to a square without keeping the aspect ratio.

    Args:
        samples: the samples to read.
        image_size: side S of the square, in pixels.
        num_classes: as in ``read_mask``.
        palette: as in ``read_mask``.
        flip: whether to mirror half of the images, with their masks, from left to right. The choice
            depends only on the seed, the epoch and the index.
        seed: seed of the flips.
        cache: cache for the resized images and masks; None decodes a file at each access.
        truth: whether items contain ``truth``.
        ignore_index: as in ``read_mask``.
        augment: further changes of the images and masks, as ``Augmentation``.
        crop: windows that are drawn anew in each epoch, in place of whole images; None for none.
        intensity: as in ``read_image``.
        tiles: how the images will be cut, if items shall hold images and masks at the size of their
            files; None for items of S x S pixels.

    Raises:
        UserError: the palette does not fit the classes, or there are more than 255 of them.
            On access: as ``read_image`` and ``read_mask``, or an image and its mask differ in size.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        image_size: int,
        num_classes: int,
        palette: Sequence[str] | None = None,
        flip: bool = False,
        seed: int = 0,
        cache: Cache | None = None,
        truth: bool = False,
        ignore_index: int | None = None,
        augment: Augment = "none",
        crop: Crop | None = None,
        intensity: Intensity | None = None,
        tiles: Tiles | None = None,
    ) -> None:
        self.samples = list(samples)
        self.image_size = image_size
        self.num_classes = num_classes
        self.flip = flip
        self.seed = seed
        self.cache = cache
        self.truth = truth
        self.ignore_index = ignore_index
        self.augmentation = Augmentation(augment, image_size)
        self.crop = crop
        self.intensity = intensity
        self.tiles = tiles
        if num_classes > IGNORED:
            raise UserError(f"there can be at most {IGNORED} classes, got {num_classes}")
        self._codes = palette_codes(palette, num_classes, ignore_index)
        # One a sample; pictures and tables show them.
        self.names = _names_below_common_folder(self.samples)
        # In shared memory, because persistent workers must see the change of the epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the flips depend on. Call it before the epoch's iteration."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        sample = self.samples[index]
        item: Item = {"index": index, "name": self.names[index]}
        if self.tiles is not None:
            pixels, labels = self.read_whole(sample)
            item["pixels"] = pixels
            if labels is not None:
                item["truth"] = labels.long()
            return item
        image, mask = self.read(sample) if self.crop is None else self._window(index)
        epoch = int(self._epoch)
        image, mask = self.augmentation(image, mask, self.seed, epoch, index)
        flipped = self.is_flipped(index)
        item["image"] = _mirror(transforms.to_dtype(image, torch.float32, scale=True), flipped)
        if mask is not None:
            item["mask"] = _mirror(mask.long(), flipped)
        if self.truth:
            truth = decode_mask(
                sample, sample.mask, self.num_classes, self._codes, self.ignore_index
            )
            item["truth"] = torch.from_numpy(truth).long()
        return item

    def _window(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Draws a window of a sample and resizes it, as ``cut``."""
        assert self.crop is not None
        pixels, labels = self.read_whole(self.samples[index])
        mask = None if labels is None else labels.numpy()
        height, width = pixels.shape[1:]
        box = draw_window(self.crop, height, width, mask, self.seed, int(self._epoch), index)
        return self.cut(pixels, labels, box)

    def cut(self, pixels: Tensor, labels: Tensor | None, box: Box) -> tuple[Tensor, Tensor | None]:
        """Cuts a box out of an image and its mask, and resizes both.

        Args:
            pixels: (3, H, W) uint8.
            labels: (H, W) class indices; None without a mask.
            box: the box.

        Returns:
            (3, S, S) uint8, and (S, S) class indices, as ``resize`` makes them.
        """
        rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
        image = transforms.to_pil_image(pixels[:, rows, columns])
        mask = None if labels is None else self._nearest(labels[rows, columns].int().numpy())
        return resize_image(image, self.image_size), mask

    def is_flipped(self, index: int) -> bool:
        """Returns whether the item is mirrored in the current epoch."""
        if not self.flip:
            return False
        return bool(seeded_generator(FLIP, self.seed, int(self._epoch), index).random() < 0.5)

    def read(self, sample: Sample) -> tuple[Tensor, Tensor | None]:
        """Reads a resized image and mask, from the cache if there is one.

        Returns:
            (3, S, S) uint8, and (S, S) class indices, None without a mask.

        Raises:
            UserError: as ``resize``, or the cache cannot be written.
        """
        return self._cached(sample, self.image_size, self.resize)

    def read_whole(self, sample: Sample) -> tuple[Tensor, Tensor | None]:
        """Reads an image and its mask at their own size, from the cache if there is one.

        Returns:
            (3, H, W) uint8, and (H, W) class indices, None without a mask.

        Raises:
            UserError: as ``read``.
        """
        return self._cached(sample, "whole", self._decode_whole)

    def fill_cache(self, sample: Sample) -> Tensor | None:
        """Reads a sample as items do, which fills the cache.

        Returns:
            Its class indices; None without a mask.

        Raises:
            UserError: as ``read``.
        """
        whole = self.tiles is not None or self.crop is not None
        return (self.read_whole if whole else self.read)(sample)[1]

    def _cached(
        self, sample: Sample, size: int | str, make: Callable[..., tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor | None]:
        """Reads what ``make`` returns, from the cache if there is one."""
        if self.cache is None:
            return make(sample, sample.image, sample.mask)
        # The key and the entry are made from the same bytes, even if a file is replaced meanwhile.
        files = [_read_bytes(path, sample) for path in (sample.image, sample.mask) if path]
        how: tuple[Any, ...] = (size, self.num_classes, self._codes, sample.encoding)
        if self.ignore_index is not None:
            how += (self.ignore_index,)
        if self.intensity is not None:
            how += tuple(self.intensity)

        def entry() -> np.ndarray:
            image, mask = make(sample, *map(io.BytesIO, files))
            channels = [image] if mask is None else [image, mask[None].to(torch.uint8)]
            return torch.cat(channels).numpy()

        pixels = torch.from_numpy(self.cache.get(files, repr(how), entry))
        return pixels[:3], pixels[3] if sample.mask is not None else None

    def resize(
        self,
        sample: Sample,
        image_file: Path | io.BytesIO,
        mask_file: Path | Annotation | io.BytesIO | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Decodes an image and its mask and resizes both.

        Args:
            sample: the encoding of the mask, and the names for messages.
            image_file: path or content of the image.
            mask_file: path or content of the mask; None for none.

        Returns:
            (3, S, S) uint8, and (S, S) int32 class indices, None without a mask.

        Raises:
            UserError: as ``read_image`` and ``read_mask``, or the image and the mask differ in
                size.
        """
        image, mask = self._decode(sample, image_file, mask_file)
        return resize_image(image, self.image_size), None if mask is None else self._nearest(mask)

    def _decode_whole(
        self,
        sample: Sample,
        image_file: Path | io.BytesIO,
        mask_file: Path | Annotation | io.BytesIO | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Decodes an image and its mask to (3, H, W) uint8 and (H, W) int32."""
        image, mask = self._decode(sample, image_file, mask_file)
        return transforms.pil_to_tensor(image), None if mask is None else torch.from_numpy(mask)

    def _decode(
        self,
        sample: Sample,
        image_file: Path | io.BytesIO,
        mask_file: Path | Annotation | io.BytesIO | None,
    ) -> tuple[Image.Image, np.ndarray | None]:
        where = f"{sample.origin}: image {sample.image}"
        image = decode_image(image_file, where, self.intensity)
        if mask_file is None:
            return image, None
        mask = decode_mask(sample, mask_file, self.num_classes, self._codes, self.ignore_index)
        check_sizes(sample, image.size, mask)
        return image, mask

    def _nearest(self, mask: np.ndarray) -> Tensor:
        """Resizes (H, W) int32 labels to the nearest pixel, (S, S)."""
        size = (self.image_size, self.image_size)
        nearest = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(nearest))


def resize_image(image: Image.Image, size: int) -> Tensor:
    """Resizes an RGB image to (3, size, size) uint8."""
    # Bicubic interpolation overshoots at edges. Resizing in 8 bits clamps the overshoot.
    return transforms.pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))


def _read_bytes(path: Path | Annotation, sample: Sample) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(f"{sample.origin}: {path}", error) from error


def _mirror(pixels: Tensor, flipped: bool) -> Tensor:
    return transforms.horizontal_flip(pixels) if flipped else pixels


def _names_below_common_folder(samples: Sequence[Sample]) -> list[str]:
    if not samples:
        return []
    paths = [os.path.abspath(sample.image) for sample in samples]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [Path(path).relative_to(common).as_posix() for path in paths]


def collate(items: list[Item]) -> Batch | None:
    """Makes a batch of items.

    Args:
        items: items of one ``SegmentationDataset``. All of them have a mask, or none has.

    Returns:
        The batch. None for no items: a process may have no share of a small last batch.
    """
    if not items:
        return None
    truths = [item.pop("truth") for item in items if "truth" in item]
    pixels = [item.pop("pixels") for item in items if "pixels" in item]
    batch: Batch = default_collate(items)
    if truths:
        batch["truth"] = truths
    if pixels:
        batch["pixels"] = pixels
    return batch
