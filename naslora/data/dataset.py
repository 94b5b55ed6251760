"""The data set that a training loop reads: resized images and masks, flips, and collation."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms.v2 import functional as transforms

from naslora.data.cache import Cache
from naslora.data.masks import (
    Sample,
    check_sizes,
    decode_mask,
    open_upright,
    palette_codes,
    to_rgb,
    unreadable,
)
from naslora.data.sampling import FLIP, seeded_generator
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

    Raises:
        UserError: the palette does not fit the classes, or the cache cannot store so many classes.
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
    ) -> None:
        self.samples = list(samples)
        self.image_size = image_size
        self.num_classes = num_classes
        self.flip = flip
        self.seed = seed
        self.cache = cache
        self.truth = truth
        self.ignore_index = ignore_index
        if cache is not None and num_classes > 256:
            raise UserError(f"the cache supports at most 256 classes, got {num_classes}")
        self._codes = palette_codes(palette, num_classes)
        self._names = _names_below_common_folder(self.samples)
        # In shared memory, because persistent workers must see the change of the epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the flips depend on. Call it before the epoch's iteration."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        sample = self.samples[index]
        flipped = self.is_flipped(index)
        image, mask = self.read(sample)
        item: Item = {
            "image": _mirror(transforms.to_dtype(image, torch.float32, scale=True), flipped),
            "index": index,
            "name": self._names[index],
        }
        if mask is not None:
            item["mask"] = _mirror(mask.long(), flipped)
        if self.truth:
            truth = decode_mask(
                sample, sample.mask, self.num_classes, self._codes, self.ignore_index
            )
            item["truth"] = torch.from_numpy(truth).long()
        return item

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
        if self.cache is None:
            return self.resize(sample, sample.image, sample.mask)
        # The key and the entry are made from the same bytes, even if a file is replaced meanwhile.
        files = [_read_bytes(path, sample) for path in (sample.image, sample.mask) if path]
        how: tuple[Any, ...] = (self.image_size, self.num_classes, self._codes, sample.encoding)
        if self.ignore_index is not None:
            how += (self.ignore_index,)
        entry = self.cache.get(files, repr(how), lambda: self._entry(sample, files))
        pixels = torch.from_numpy(entry)
        return pixels[:3], pixels[3] if sample.mask is not None else None

    def _entry(self, sample: Sample, files: list[bytes]) -> np.ndarray:
        """Makes a cache entry: (3, S, S) uint8, or (4, S, S) with the class indices last."""
        image, mask = self.resize(sample, *map(io.BytesIO, files))
        channels = [image] if mask is None else [image, mask[None].to(torch.uint8)]
        return torch.cat(channels).numpy()

    def resize(
        self,
        sample: Sample,
        image_file: Path | io.BytesIO,
        mask_file: Path | io.BytesIO | None = None,
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
        where = f"{sample.origin}: image {sample.image}"
        image = to_rgb(open_upright(image_file, where)[0], where)
        pixels = self.resize_image(image)
        if mask_file is None:
            return pixels, None
        mask = decode_mask(sample, mask_file, self.num_classes, self._codes, self.ignore_index)
        check_sizes(sample, image.size, mask)
        size = (self.image_size, self.image_size)
        nearest = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
        return pixels, torch.from_numpy(np.array(nearest))

    def resize_image(self, image: Image.Image) -> Tensor:
        """Resizes an RGB image to (3, S, S) uint8."""
        # Bicubic interpolation overshoots at edges. Resizing in 8 bits clamps the overshoot.
        size = (self.image_size, self.image_size)
        return transforms.pil_to_tensor(image.resize(size, Image.Resampling.BICUBIC))


def _read_bytes(path: Path, sample: Sample) -> bytes:
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
    batch: Batch = default_collate(items)
    if truths:
        batch["truth"] = truths
    return batch
