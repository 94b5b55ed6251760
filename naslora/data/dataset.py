"""Images with masks: their decoding, and batches that no number of processes changes.

``check_samples`` reads every file once, so that what is wrong with the data is said before training
starts. The flips and the order of an epoch are pure functions
of the seed, the epoch and the sample's index: the same in any worker, with any number of processes,
and in a run that was resumed.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
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


class SegmentationDataset(Dataset):
    """Images and masks squashed to a square, by index.

    An item is a dict of

    - ``image``: (3, S, S) float32 in [0, 1], RGB, resized bicubically with antialiasing;
    - ``mask``: (S, S) int64 class indices, resized to the nearest; absent where a sample has none;
    - ``truth``: (H, W) int64, the mask at the size of its file; with ``truth=True`` only;
    - ``index``: int, the sample's place in ``samples``;
    - ``name``: str, the image's path below the folder that holds all images.

    Args:
        samples: what to read.
        image_size: S, in pixels.
        num_classes: as in ``read_mask``.
        palette: as in ``read_mask``.
        flip: mirror half of the images, with their masks, left to right; which ones depends on
            ``seed``, the epoch and the index alone.
        seed: of the flips.
        cache: where squashed images and masks are kept, so that a file is decoded once.
        truth: also give every mask at its own size, upright and never mirrored.

    Raises:
        UserError: the palette does not fit the classes, or these the cache; on access, as
            ``read_image`` and ``read_mask`` do, and where an image and its mask have different
            sizes.
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
    ) -> None:
        self.samples = list(samples)
        self.image_size = image_size
        self.num_classes = num_classes
        self.flip = flip
        self.seed = seed
        self.cache = cache
        self.truth = truth
        if cache is not None and num_classes > 256:
            raise UserError(f"the cache holds up to 256 classes, not {num_classes}")
        self._codes = palette_codes(palette, num_classes)
        self._names = _names_below_common_folder(self.samples)
        # In shared memory, so that workers which live for several epochs see it change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the flips depend on; call it before iterating over the epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int | str]:
        sample = self.samples[index]
        flipped = self.flip and self._is_flipped(index)
        image, mask = self.read(sample)
        item = {
            "image": _mirror(transforms.to_dtype(image, torch.float32, scale=True), flipped),
            "index": index,
            "name": self._names[index],
        }
        if mask is not None:
            item["mask"] = _mirror(mask.long(), flipped)
        if self.truth:
            truth = decode_mask(sample, sample.mask, self.num_classes, self._codes)
            item["truth"] = torch.from_numpy(truth).long()
        return item

    def read(self, sample: Sample) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(3, S, S) uint8 and, where there is a mask, (S, S) labels; from the cache if it can."""
        if self.cache is None:
            return self._squash(sample, sample.image, sample.mask)
        # The files are read whole and decoded from memory: what is kept belongs to the key even if
        # a file is replaced meanwhile.
        files = [_read_bytes(path, sample) for path in (sample.image, sample.mask) if path]
        how = (self.image_size, self.num_classes, self._codes, sample.encoding)
        entry = self.cache.get(files, repr(how), lambda: self._entry(sample, files))
        pixels = torch.from_numpy(entry)
        return pixels[:3], pixels[3] if sample.mask is not None else None

    def _entry(self, sample: Sample, files: list[bytes]) -> np.ndarray:
        """(3, S, S) uint8, the labels as a fourth channel."""
        image, mask = self._squash(sample, *map(io.BytesIO, files))
        channels = [image] if mask is None else [image, mask[None].to(torch.uint8)]
        return torch.cat(channels).numpy()

    def _squash(
        self,
        sample: Sample,
        image_file: Path | io.BytesIO,
        mask_file: Path | io.BytesIO | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        where = f"{sample.origin}: image {sample.image}"
        image = to_rgb(open_upright(image_file, where)[0], where)
        size = (self.image_size, self.image_size)
        # 8-bit resizing clamps what bicubic interpolation overshoots
        pixels = transforms.pil_to_tensor(image.resize(size, Image.Resampling.BICUBIC))
        if mask_file is None:
            return pixels, None
        mask = decode_mask(sample, mask_file, self.num_classes, self._codes)
        check_sizes(sample, image.size, mask)
        nearest = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
        return pixels, torch.from_numpy(np.array(nearest))

    def _is_flipped(self, index: int) -> bool:
        return bool(seeded_generator(FLIP, self.seed, int(self._epoch), index).random() < 0.5)


def _read_bytes(path: Path, sample: Sample) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(f"{sample.origin}: {path}", error) from error


def _mirror(pixels: torch.Tensor, flipped: bool) -> torch.Tensor:
    return transforms.horizontal_flip(pixels) if flipped else pixels


def _names_below_common_folder(samples: Sequence[Sample]) -> list[str]:
    if not samples:
        return []
    paths = [os.path.abspath(sample.image) for sample in samples]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [Path(path).relative_to(common).as_posix() for path in paths]


def collate(items: list[dict]) -> dict | None:
    """Makes a batch of a data set's items.

    Args:
        items: of ``SegmentationDataset``; either all or none with a mask.

    Returns:
        The items' tensors stacked, ``index`` as (B,) int64, ``name`` and ``truth`` as lists; None
        for no items (a process may have no share of a small last batch).
    """
    if not items:
        return None
    truths = [item.pop("truth") for item in items if "truth" in item]
    batch = default_collate(items)
    return {**batch, "truth": truths} if truths else batch
