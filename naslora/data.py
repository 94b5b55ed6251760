"""Images with masks: the files of a data set, their decoding, and batches that no layout changes.

``load_splits`` finds the files and ``check_samples`` reads each of them once, so that what is wrong
with the data is said before training starts. The flips and the order of an epoch are pure functions
of the seed, the epoch and the sample's index: the same in any worker, with any number of processes,
and in a run that was resumed.
"""

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps
from torch.utils.data import Dataset, Sampler, default_collate
from torchvision.transforms.v2 import functional as transforms

from naslora.demo_data import write_mni152
from naslora.errors import UserError

REQUIRED_SPLITS = ("train", "val", "test")
OPTIONAL_SPLIT = "arch"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm")
IMAGE_FOLDERS = ("images", "image")
MASK_FOLDERS = ("masks", "mask", "labels", "label")

# Each use of random numbers draws from a stream of its own.
_HOLD_OUT, _ORDER, _FLIP = range(3)


class Sample(NamedTuple):
    """One image, its mask where there is one, and where the user named them, for messages."""

    image: Path
    mask: Path | None
    origin: str


Splits = dict[str, list[Sample]]


def load_splits(source: str, root: Path) -> Splits:
    """Finds the files of a data set.

    Args:
        source: a key of ``DATASETS``: "csv" (``train.csv``, ``val.csv``, ``test.csv`` and perhaps
            ``arch.csv`` with the columns ``image,label``, paths relative to ``root``), "folders"
            (``train``, ``val``, ``test`` and perhaps ``arch``, each with ``images`` and ``masks``
            whose files pair up by stem) or "mni152" (the demo, written to ``root`` on first use).
        root: the folder of the data set.

    Returns:
        "train", "val", "test" and, where the data set has it, "arch" (the split that the
        architecture is trained on): each a list of at least one sample, all with a mask.

    Raises:
        UserError: the source is unknown, files are missing or do not pair up, a CSV file is empty
            or has other columns, or an image appears twice, in one split or in two.
    """
    if source not in DATASETS:
        raise UserError(f"unknown data set {source!r}; known are: {', '.join(DATASETS)}")
    splits = DATASETS[source](Path(root))
    _check_distinct(splits)
    return splits


def list_images(folder: Path) -> list[Path]:
    """Returns the folder's files with a suffix of ``IMAGE_SUFFIXES``, hidden ones left out, sorted.

    Raises:
        UserError: the folder does not exist.
    """
    _check_folder(folder)
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def _read_csv_splits(root: Path) -> Splits:
    _check_folder(root)
    missing = [f"{split}.csv" for split in REQUIRED_SPLITS if not (root / f"{split}.csv").is_file()]
    if missing:
        raise UserError(
            f"{root}: looked for train.csv, val.csv and test.csv, {' and '.join(missing)} missing; "
            f"the folder holds {_listing(p.name for p in root.iterdir())} (paired image and mask "
            "folders are read with --dataset folders)"
        )
    splits = {split: _read_csv(root / f"{split}.csv") for split in REQUIRED_SPLITS}
    optional = root / f"{OPTIONAL_SPLIT}.csv"
    if optional.is_file():
        splits[OPTIONAL_SPLIT] = _read_csv(optional)
    return splits


def _read_csv(path: Path) -> list[Sample]:
    samples = []
    try:
        # utf-8-sig also reads files that a spreadsheet has begun with a byte order mark
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = reader.fieldnames or []
            if columns and not {"image", "label"} <= set(columns):
                raise UserError(
                    f"{path}: expected the columns image,label in the first line, "
                    f"found {_listing(columns)}"
                )
            for row in reader:
                origin = f"{path.name} row {reader.line_num}"
                if not row["image"] or not row["label"]:
                    raise UserError(f"{path}: row {reader.line_num} needs an image and a label")
                samples.append(
                    Sample(path.parent / row["image"], path.parent / row["label"], origin)
                )
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8 ({error})") from error
    if not samples:
        raise UserError(f"{path} names no images; expected the line image,label and one per image")
    _check_files_exist(path, samples)
    return samples


def _check_files_exist(csv_path: Path, samples: list[Sample]) -> None:
    missing = [
        (file, sample.origin)
        for sample in samples
        for file in (sample.image, sample.mask)
        if not file.is_file()
    ]
    if missing:
        file, origin = missing[0]
        raise UserError(
            f"{csv_path} names {len(missing)} missing file{'s' * (len(missing) > 1)}, first {file} "
            f"({origin}); paths are relative to the folder of the CSV file"
        )


def _read_folder_splits(root: Path) -> Splits:
    _check_folder(root)
    missing = [split for split in REQUIRED_SPLITS if not (root / split).is_dir()]
    if missing:
        raise UserError(
            f"{root}: looked for the folders train, val and test, {' and '.join(missing)} missing; "
            f"found {_listing(p.name for p in root.iterdir())}"
        )
    splits = {split: _pair_folders(root / split) for split in REQUIRED_SPLITS}
    if (root / OPTIONAL_SPLIT).is_dir():
        splits[OPTIONAL_SPLIT] = _pair_folders(root / OPTIONAL_SPLIT)
    return splits


def _pair_folders(folder: Path) -> list[Sample]:
    images = _files_by_stem(_only_folder(folder, IMAGE_FOLDERS))
    masks = _files_by_stem(_only_folder(folder, MASK_FOLDERS))
    for have, lack, what in ((images, masks, "mask"), (masks, images, "image")):
        unpaired = [have[stem].name for stem in have if stem not in lack]
        if unpaired:
            raise UserError(
                f"{folder}: {len(unpaired)} of {len(have)} files without {what}: "
                f"{_listing(unpaired)}; an image and its mask share the name before the suffix"
            )
    if not images:
        raise UserError(f"{folder} holds no images; read are {', '.join(IMAGE_SUFFIXES)}")
    return [Sample(images[stem], masks[stem], f"folder {folder.name}") for stem in images]


def _only_folder(parent: Path, names: Sequence[str]) -> Path:
    found = [name for name in names if (parent / name).is_dir()]
    if len(found) != 1:
        raise UserError(
            f"{parent}: expected one folder named {' or '.join(names)}, "
            f"found {' and '.join(found) or 'none'}"
        )
    return parent / found[0]


def _files_by_stem(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in list_images(folder):
        if path.stem in files:
            raise UserError(
                f"{folder}: {files[path.stem].name} and {path.name} differ only in their suffix; "
                "remove one"
            )
        files[path.stem] = path
    return files


def _read_mni152(root: Path) -> Splits:
    write_mni152(root)
    return _read_csv_splits(root)


# A data set is one entry: from its folder to its splits.
DATASETS: dict[str, Callable[[Path], Splits]] = {
    "csv": _read_csv_splits,
    "folders": _read_folder_splits,
    "mni152": _read_mni152,
}


def _check_distinct(splits: Splits) -> None:
    seen: dict[Path, tuple[str, Sample]] = {}
    for split, samples in splits.items():
        for sample in samples:
            # resolved, so that two spellings of a path, or a link, are one image
            first_split, first = seen.setdefault(sample.image.resolve(), (split, sample))
            if first is sample:
                continue
            what = (
                f"is listed twice in {split}; remove one of the two"
                if split == first_split
                else f"is both in {first_split} and in {split}, so a score on one would be learned "
                "from the other; keep it in one"
            )
            raise UserError(f"{first.origin} and {sample.origin}: the image {sample.image} {what}")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist")


def _listing(names: Iterator[str] | Sequence[str], limit: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


def hold_out(
    samples: Sequence[Sample], fraction: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Splits samples at random into those for the weights and those for the architecture.

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
            f"{len(samples)} training sample(s) cannot be split between weights and architecture; "
            "give at least 2, or an arch split"
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

    Without a palette, grey values and the indices of palette images are the classes; where there
    are two, 0/255 (0/65535 at 16 bits) is read as 0/1, and a JPEG is thresholded at 128. Coloured
    masks of a binary task are foreground where any channel is not zero. With a palette, every mask
    is read by its colours.

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
    return _read_mask(sample, num_classes, _palette_codes(palette, num_classes))


def _open(path: Path, where: str) -> tuple[Image.Image, str]:
    """Returns the upright image and the name of its file format."""
    try:
        with Image.open(path) as image:
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


def _read_mask(sample: Sample, num_classes: int, codes: list[int] | None) -> np.ndarray:
    where = f"{sample.origin}: mask {sample.mask}"
    image, file_format = _open(sample.mask, where)
    jpeg = file_format in ("JPEG", "MPO")
    if jpeg and (codes is not None or num_classes > 2):
        raise UserError(
            f"{where} is a JPEG, whose compression changes labels and colours; "
            "save masks of colours or of more than two classes as PNG"
        )
    if codes is not None:
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
                f"{where} is coloured ({_listing(found)}); name the {num_classes} classes' colours "
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
            f"{where} has colours that --palette lacks: {_listing([_hex(c) for c in unknown])}; "
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
            _check_sizes(sample, size, _read_mask(sample, num_classes, codes))

    with ThreadPoolExecutor() as threads:
        for done, _ in enumerate(threads.map(check, samples), start=1):
            if progress is not None:
                progress(done, len(samples))


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

    Raises:
        UserError: the palette does not fit the classes; on access, as ``read_image`` and
            ``read_mask`` do, and where an image and its mask have different sizes.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        image_size: int,
        num_classes: int,
        palette: Sequence[str] | None = None,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.samples = list(samples)
        self.image_size = image_size
        self.num_classes = num_classes
        self.flip = flip
        self.seed = seed
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
        size = (self.image_size, self.image_size)
        image = read_image(sample)
        # 8-bit resizing clamps what bicubic interpolation overshoots
        resized = transforms.pil_to_tensor(image.resize(size, Image.Resampling.BICUBIC))
        item = {
            "image": _mirror(transforms.to_dtype(resized, torch.float32, scale=True), flipped),
            "index": index,
            "name": self._names[index],
        }
        if sample.mask is not None:
            mask = _read_mask(sample, self.num_classes, self._codes)
            _check_sizes(sample, image.size, mask)
            nearest = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
            labels = torch.from_numpy(np.asarray(nearest).astype(np.int64))
            item["mask"] = _mirror(labels, flipped)
        return item

    def _is_flipped(self, index: int) -> bool:
        return bool(_random(_FLIP, self.seed, int(self._epoch), index).random() < 0.5)


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
        The items' tensors stacked, ``index`` as (B,) int64, ``name`` as a list; None for no items
        (a process may have no share of a small last batch).
    """
    return default_collate(items) if items else None


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
