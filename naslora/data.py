"""Images with masks: their decoding, and batches that no number of processes changes.

``check_samples`` reads every file once, so that what is wrong with the data is said before training
starts. The flips and the order of an epoch are pure functions
of the seed, the epoch and the sample's index: the same in any worker, with any number of processes,
and in a run that was resumed.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps
from torch.utils.data import Dataset, Sampler, default_collate
from torchvision.transforms.v2 import functional as transforms

from naslora.cache import Cache
from naslora.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm")
Encoding = Literal["labels", "threshold", "nonzero", "thirds"]

# Each use of random numbers draws from a stream of its own.
_HOLD_OUT, _ORDER, _FLIP = range(3)


class Sample(NamedTuple):
    """One image, its mask where there is one, and where the user named them, for messages."""

    image: Path
    mask: Path | None
    origin: str
    encoding: Encoding = "labels"
    """How the mask is drawn; see ``read_mask``."""
    group: str | None = None
    """A part of its split that is also scored on its own."""


def list_images(folder: Path) -> list[Path]:
    """Returns the folder's files with a suffix of ``IMAGE_SUFFIXES``, hidden ones left out, sorted.

    Raises:
        UserError: the folder does not exist.
    """
    check_folder(folder)
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def check_folder(folder: Path) -> None:
    """Raises a UserError where there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist")


def listing(names: Iterable[str], limit: int = 8) -> str:
    """Names in order for a message, the first of them where they are many."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


def hold_out(
    samples: Sequence[Sample], fraction: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Splits samples at random into those kept and those held out for another purpose.

    Args:
        samples: what to split.
        fraction: the share to hold out, in [0, 1); above 0 at least one sample is held out and at
            least one is kept.
        seed: the same seed and samples give the same split.

    Returns:
        The samples kept and those held out, both in the order in which they came.

    Raises:
        UserError: the fraction is outside [0, 1), or there are fewer than two samples to split.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the held-out fraction must be in [0, 1), got {fraction}")
    if fraction == 0:
        return list(samples), []
    if len(samples) < 2:
        raise UserError(
            f"{len(samples)} training sample(s) cannot be split in two, to hold some out; "
            "give at least 2, or a split of its own"
        )
    count = min(max(1, round(fraction * len(samples))), len(samples) - 1)
    chosen = set(_random(_HOLD_OUT, seed).permutation(len(samples))[:count].tolist())
    kept = [sample for i, sample in enumerate(samples) if i not in chosen]
    return kept, [samples[i] for i in sorted(chosen)]


def _random(stream: int, seed: int, *path: int) -> np.random.Generator:
    # NumPy seeds from any tuple of integers, so that no two (epoch, index) share a state; the
    # modulus admits negative seeds.
    return np.random.default_rng((stream, seed % 2**64, *path))


def read_image(sample: Sample) -> Image.Image:
    """Reads an image as it is meant to be seen.

    Args:
        sample: the image's path is read.

    Returns:
        An RGB image of 8 bits, rotated as its EXIF tag says; palettes are resolved, alpha is
        dropped, and 16-bit greys are scaled by 255 / 65535 (stretch them beforehand where the
        images use only a part of their range).

    Raises:
        UserError: the file is missing, no image, truncated, or of a pixel type that is not read.
    """
    where = f"{sample.origin}: image {sample.image}"
    image, _ = _open(sample.image, where)
    return _to_rgb(image, where)


def read_mask(sample: Sample, num_classes: int, palette: Sequence[str] | None = None) -> np.ndarray:
    """Reads a mask as class indices.

    The sample's encoding says how the mask is drawn:

    - "labels": grey values and the indices of palette images are the classes; where there are two,
      0/255 (0/65535 at 16 bits) is read as 0/1, and a JPEG is thresholded at 128. Coloured masks of
      a binary task are foreground where any channel is not zero. With a palette, every mask is read
      by its colours.
    - "threshold": two classes, foreground from 128 of 255 on, for masks that were compressed or
      smoothed; masks of nothing but 0 and 1 are read as such.
    - "nonzero": two classes, foreground where any channel is not zero.
    - "thirds": three classes, told apart by the mean of the channels: 0, 85 or 255.

    Args:
        sample: the mask's path, not None, is read.
        num_classes: 1 for a binary task (masks of 0 and 1); K >= 2 for classes 0 .. K-1, of which 0
            is the background.
        palette: colours such as "#ff0000", one per class in order, two for a binary task.

    Returns:
        (H, W) int32, upright as its EXIF tag says.

    Raises:
        UserError: the file cannot be read, holds labels or colours beyond the classes, or would
            need a palette; or the palette itself is wrong.
    """
    return _read_mask(sample, sample.mask, num_classes, _palette_codes(palette, num_classes))


def _open(file: Path | io.BytesIO, where: str) -> tuple[Image.Image, str]:
    """Returns the upright image and the name of its file format."""
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image), image.format
    # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error and others:
    # whatever it is, the file is what is wrong.
    except Exception as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return UserError(f"{where} cannot be read ({reason}); replace the file or remove its entry")


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{where} has grey values beyond 16 bits; save it with 8 or 16 bits")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise UserError(f"{where} has floating-point pixels; save it with 8 or 16 bits")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise _unreadable(where, error) from error


def _read_mask(
    sample: Sample, file: Path | io.BytesIO, num_classes: int, codes: list[int] | None
) -> np.ndarray:
    where = f"{sample.origin}: mask {sample.mask}"
    image, file_format = _open(file, where)
    jpeg = file_format in ("JPEG", "MPO")
    exact = codes is not None or num_classes > 2 or sample.encoding in ("nonzero", "thirds")
    if jpeg and exact:
        raise UserError(
            f"{where} is a JPEG, whose compression changes labels and colours; "
            "save masks of colours or of more than two classes as PNG"
        )
    if sample.encoding != "labels":
        labels = _DECODERS[sample.encoding](image, where)
    elif codes is not None:
        labels = _decode_colors(np.asarray(_to_rgb(image, where)), codes, where)
    else:
        labels = _decode_values(_pixel_values(image, where), num_classes, jpeg, where)
    return labels.astype(np.int32, copy=False)


def _pixel_values(image: Image.Image, where: str) -> np.ndarray:
    """(H, W) of greys or palette indices, or (H, W, 3) of colours; int32."""
    if image.mode == "F":
        raise UserError(f"{where} has floating-point pixels; save it with 8 or 16 bits")
    if image.mode in ("LA", "La"):
        image = image.getchannel(0)
    elif image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        image = _to_rgb(image, where)
    return np.asarray(image).astype(np.int32)


def _decode_threshold(image: Image.Image, where: str) -> np.ndarray:
    rgb = np.asarray(_to_rgb(image, where))
    values = _pixel_values(image, where)
    if image.mode == "P":
        if (rgb != rgb[..., :1]).any():  # a palette of colours only shows the indices
            return values > 0
        values = rgb[..., 0]
    if values.max() <= 1:
        return values.any(axis=2) if values.ndim == 3 else values > 0
    return rgb.mean(axis=2) >= 128


def _decode_nonzero(image: Image.Image, where: str) -> np.ndarray:
    return np.asarray(_to_rgb(image, where)).any(axis=2)


def _decode_thirds(image: Image.Image, where: str) -> np.ndarray:
    means = np.asarray(_to_rgb(image, where)).mean(axis=2)
    labels = np.full(means.shape, -1, dtype=np.int32)
    for label, mean in enumerate((0, 85, 255)):
        labels[means == mean] = label
    if (labels < 0).any():
        strange = np.unique(means[labels < 0])[:8].round(1).tolist()
        raise UserError(
            f"{where} has colours whose channels have the means {', '.join(map(str, strange))}; "
            "expected are 0 (background), 85 (things) and 255 (stuff)"
        )
    return labels


_DECODERS: dict[str, Callable[[Image.Image, str], np.ndarray]] = {
    "threshold": _decode_threshold,
    "nonzero": _decode_nonzero,
    "thirds": _decode_thirds,
}


def _decode_values(values: np.ndarray, num_classes: int, jpeg: bool, where: str) -> np.ndarray:
    if values.ndim == 3:
        if jpeg:
            values = values.mean(axis=2)
        elif (values == values[..., :1]).all():
            values = values[..., 0]
        elif num_classes == 1:
            return values.any(axis=2)
        else:
            found = [_hex(code) for code in np.unique(_pack(values))]
            raise UserError(
                f"{where} is coloured ({listing(found)}); name the {num_classes} classes' colours "
                "in order with --palette, or save it as class indices"
            )
    highest = values.max()
    if jpeg and highest > 1:
        return values >= 128
    if values.min() >= 0 and highest < max(num_classes, 2):
        return values
    # Exactly 0 and the maximum: a tolerance would take an index mask that marks ignored pixels
    # with 255 for a binary one.
    if num_classes <= 2 and highest in (255, 65535) and np.isin(values, (0, highest)).all():
        return values > 0
    raise UserError(_beyond_classes(values, num_classes, where))


def _beyond_classes(values: np.ndarray, num_classes: int, where: str) -> str:
    found = np.unique(values)
    shown = ", ".join(map(str, found[:8])) + (f" .. {found[-1]}" if len(found) > 8 else "")
    if num_classes == 1:
        return (
            f"{where} has the labels {shown}, beyond the two classes 0/1 or 0/255 of a binary "
            "mask; set --num-classes, or save the mask with two values"
        )
    return (
        f"{where} has the labels {shown}, beyond the {num_classes} classes 0 to "
        f"{num_classes - 1}; raise --num-classes, or relabel the mask"
    )


def _decode_colors(rgb: np.ndarray, codes: list[int], where: str) -> np.ndarray:
    packed = _pack(rgb)
    labels = np.full(packed.shape, -1, dtype=np.int32)
    for label, code in enumerate(codes):
        labels[packed == code] = label
    unknown = np.unique(packed[labels < 0])
    if unknown.size:
        raise UserError(
            f"{where} has colours that --palette lacks: {listing([_hex(c) for c in unknown])}; "
            "add them as classes, or correct the mask"
        )
    return labels


def _palette_codes(palette: Sequence[str] | None, num_classes: int) -> list[int] | None:
    if palette is None:
        return None
    try:
        codes = [int(_pack(np.array(ImageColor.getcolor(color, "RGB")))) for color in palette]
    except ValueError as error:
        raise UserError(f"--palette: {error}; write colours as #ff0000") from error
    expected = max(num_classes, 2)
    if len(codes) != expected or len(set(codes)) != expected:
        raise UserError(
            f"--palette: expected {expected} different colours, one per class in order, "
            f"got {', '.join(palette)}"
        )
    return codes


def _pack(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) of 0..255 -> (...) int32, red in the highest byte."""
    red, green, blue = np.moveaxis(rgb.astype(np.int32), -1, 0)
    return (red << 16) | (green << 8) | blue


def _hex(code: int) -> str:
    return f"#{code:06x}"


def check_samples(
    samples: Sequence[Sample],
    num_classes: int,
    palette: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Reads every sample once, so that a bad file ends a run in its first seconds.

    Files are decoded in threads, JPEG images at a fraction of their size.

    Args:
        samples: what a run will read.
        num_classes: as in ``read_mask``.
        palette: as in ``read_mask``.
        progress: is called as ``progress(done, total)`` after each sample.

    Raises:
        UserError: of the first sample, in their order, with a file that cannot be read, an image
            and a mask of different sizes, or labels beyond the classes.
    """
    codes = _palette_codes(palette, num_classes)

    def check(sample: Sample) -> None:
        size = _check_image(sample)
        if sample.mask is not None:
            mask = _read_mask(sample, sample.mask, num_classes, codes)
            _check_sizes(sample, size, mask)

    in_threads(check, samples, progress)


def in_threads(
    work: Callable[[Sample], None],
    samples: Sequence[Sample],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Calls ``work`` with every sample; what the first of them in their order raises is raised."""
    with ThreadPoolExecutor() as threads:
        try:
            for done, _ in enumerate(threads.map(work, samples), start=1):
                if progress is not None:
                    progress(done, len(samples))
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _check_image(sample: Sample) -> tuple[int, int]:
    """Returns the upright image's (width, height) after decoding all of the file."""
    where = f"{sample.origin}: image {sample.image}"
    try:
        with Image.open(sample.image) as image:
            size = image.size
            # Orientations 5 to 8 turn by 90 degrees
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            image.draft("RGB", (1, 1))  # a JPEG is read to its end, but at an eighth of its size
            image.load()
    except Exception as error:  # as in _open
        raise _unreadable(where, error) from error
    _to_rgb(image, where)
    return size[::-1] if turned else size


def _check_sizes(sample: Sample, image_size: tuple[int, int], mask: np.ndarray) -> None:
    height, width = mask.shape
    if image_size != (width, height):
        raise UserError(
            f"{sample.origin}: image {sample.image} has {image_size[0]}x{image_size[1]} pixels "
            f"(width x height), its mask {sample.mask} {width}x{height}; they must be the same"
        )


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
        self._codes = _palette_codes(palette, num_classes)
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
            truth = _read_mask(sample, sample.mask, self.num_classes, self._codes)
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
        image = _to_rgb(_open(image_file, where)[0], where)
        size = (self.image_size, self.image_size)
        # 8-bit resizing clamps what bicubic interpolation overshoots
        pixels = transforms.pil_to_tensor(image.resize(size, Image.Resampling.BICUBIC))
        if mask_file is None:
            return pixels, None
        mask = _read_mask(sample, mask_file, self.num_classes, self._codes)
        _check_sizes(sample, image.size, mask)
        nearest = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
        return pixels, torch.from_numpy(np.array(nearest))

    def _is_flipped(self, index: int) -> bool:
        return bool(_random(_FLIP, self.seed, int(self._epoch), index).random() < 0.5)


def _read_bytes(path: Path, sample: Sample) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(f"{sample.origin}: {path}", error) from error


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


class GlobalBatches(Sampler[list[int]]):
    """This process's share of each batch, where the batches are the same for any number of them.

    The samples of an epoch, in an order that depends on the seed and the epoch alone, are cut into
    batches over all processes; none is dropped, so the last may be smaller. Process r of n takes
    every n-th sample of each batch from the r-th on, which may be none of a small one.

    Args:
        count: the number of samples.
        batch_size: of a batch over all processes.
        rank: of this process.
        world_size: the number of processes.
        shuffle: False keeps the samples in order, for evaluation.
        seed: of the order.

    Raises:
        UserError: the batch size is below 1.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"the batch size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to world_size - 1 = {world_size - 1}, got {rank}")
        self.count = count
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the order depends on; call it before iterating over the epoch."""
        self.epoch = epoch

    def global_size(self, step: int) -> int:
        """The number of samples that all processes together have in the epoch's batch ``step``."""
        return min(self.batch_size, self.count - step * self.batch_size)

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.count))
        if self.shuffle:
            order = _random(_ORDER, self.seed, self.epoch).permutation(self.count).tolist()
        for start in range(0, self.count, self.batch_size):
            yield order[start : start + self.batch_size][self.rank :: self.world_size]
