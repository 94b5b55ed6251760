"""The layouts for users' own images, and the pairing of image and mask folders.

A layout is a function that turns the folder of a data set into its splits.
"""

import csv
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from naslora.data.images import Encoding, Sample
from naslora.data.sampling import hold_out
from naslora.data.volumes import NIFTI, stem_of
from naslora.errors import UserError, listing

REQUIRED_SPLITS = ("train", "val", "test")
OPTIONAL_SPLIT = "arch"
GROUP = "group"
"""The column of CSV files that names groups, unless another one is given."""
UNDRAWN = ""
"""In place of a split: the samples of data without splits."""

Splits = dict[str, list[Sample]]
"""The samples of each split. "arch", where it exists, is the split that alpha is trained on."""


class DataSet(NamedTuple):
    """How a data set is read, and the properties that do not depend on its files."""

    read: Callable[..., Splits]
    """Reads the splits from the folder of the data set."""
    metrics: tuple[str, ...] = ("dice", "iou", "accuracy")
    """Metrics that the paper reports on it: names of ``naslora.metrics.METRICS``."""
    counts: Mapping[str, int] = MappingProxyType({})
    """The paper's number of images in each split, or in each group of the test split."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, the background first; empty if the user defines the classes."""
    categories: Callable[[Path], tuple[str, ...]] | None = None
    """Reads the names of the foreground classes from the folder of the data set. ``read`` then
    takes the names that a run wants as its second argument. None if its files name no classes."""
    drawable: bool = False
    """Whether other splits may be drawn from all its samples. ``read`` then takes data without
    splits, too, and the groups of its samples are those that stay together."""


# ---- CSV files -----------------------------------------------------------------------------------


def read_csv(root: Path, group: str = GROUP) -> Splits:
    """Reads those of train.csv, val.csv, test.csv and arch.csv that exist, or one CSV file.

    Each file has the columns ``image`` and ``label``, with paths relative to its folder. Columns
    ``image2``, ``image3``, ... name files with further channels. The column ``group`` becomes the
    groups. A file may lack it if it has its default name.

    Raises:
        UserError: there is no train.csv and not one other file, or a file is not such a CSV file,
            or names files that do not exist.
    """
    if root.is_file():
        return {UNDRAWN: read_rows(root, group=group)}
    check_folder(root)
    files = {path.stem: path for path in root.glob("*.csv")}
    if "train" not in files and len(files) == 1:
        return read_csv(next(iter(files.values())), group)
    if "train" not in files:
        raise UserError(
            f"{root}: expected train.csv, val.csv and test.csv, or one CSV file, found "
            f"{listing(path.name for path in files.values() or root.iterdir())} (train --dataset "
            "folders reads folders of images and masks)"
        )
    splits = (*REQUIRED_SPLITS, OPTIONAL_SPLIT)
    return {split: read_rows(files[split], group=group) for split in splits if split in files}


def read_rows(path: Path, masks: bool = True, group: str = GROUP) -> list[Sample]:
    """Reads a CSV file as ``read_csv``, without the masks if they are not needed."""
    samples = []
    try:
        # utf-8-sig accepts the byte order mark with which some spreadsheets start a file.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = reader.fieldnames or []
            named = ["image", *(c for c in columns if re.fullmatch(r"image\d+", c))]
            needed = [*named, "label"] if masks else named
            if columns and not {"image", needed[-1]} <= set(columns):
                raise UserError(
                    f"{path}: expected the columns image,label in the first line, "
                    f"found {listing(columns)}"
                )
            if columns and group not in {GROUP, *columns}:
                raise UserError(f"{path} has no column {group!r}, only {listing(columns)}")
            for row in reader:
                if not all(map(row.get, needed)):  # absent after an empty first line
                    raise UserError(f"{path}: row {reader.line_num} needs {' and '.join(needed)}")
                image, *further = (path.parent / row[name] for name in named)
                mask = path.parent / row["label"] if masks else None
                origin, own = f"{path.name} row {reader.line_num}", row.get(group)
                samples.append(Sample(image, mask, origin, group=own, further=tuple(further)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8 ({error})") from error
    if not samples:
        raise UserError(f"{path} names no images; expected the line image,label and one per image")
    missing = [
        f"{file} ({sample.origin})"
        for sample in samples
        for file in map(str, filter(None, (*sample.files, sample.mask)))
        if not os.path.isfile(file)  # also if its name is too long
    ]
    if missing:
        raise UserError(
            f"{path} names {len(missing)} missing file{'s' * (len(missing) > 1)}, first "
            f"{missing[0]}; paths are relative to the folder of the CSV file"
        )
    return samples


# ---- Folders -------------------------------------------------------------------------------------

IMAGE_FOLDER = "images|image"
MASK_FOLDER = "masks|mask|labels|label"


class Part(NamedTuple):
    """A folder of images and the folder of their masks: a split, or a part of one.

    In their paths ``a|b`` accepts both names. The case is ignored.
    """

    split: str
    images: str
    masks: str
    group: str | None = None
    """The samples' group."""


class Layout(NamedTuple):
    """The folders of a data set."""

    parts: tuple[Part, ...]
    encoding: Encoding = "labels"
    """The encoding of the masks."""
    suffix: str = ""
    """Text that a mask's stem may have after the stem of its image."""
    skip: str = "(?!)"
    """Regular expression; files with a matching stem are ignored. The default matches none."""
    test: float = 0
    """Share of the training images that are drawn at random as test images."""
    val: float = 0
    """Share of the rest that are drawn as validation images, as the paper does."""
    mark: str = ""
    """A folder by which the layout is known."""


def read_layout(layouts: Sequence[Layout], root: Path) -> Splits:
    """Reads the folders of the first layout whose mark ``root`` contains, or of the last layout.

    Raises:
        UserError: a folder is missing, or two folders match one path; as ``pair_files``.
    """
    layout = next((one for one in layouts[:-1] if find_folders(root, one.mark)), layouts[-1])
    splits: Splits = {}
    for part in layout.parts:
        images, masks = _locate(root, part.images), _locate(root, part.masks)
        splits.setdefault(part.split, []).extend(
            Sample(*pair, f"folder {images.relative_to(root)}", layout.encoding, part.group)
            for pair in pair_files(images, masks, layout)
        )
    return draw_splits(splits, layout.val, layout.test)


def draw_splits(splits: Splits, val: float, test: float = 0) -> Splits:
    """Draws test images from the training images, and validation images from the rest.

    The shares are in [0, 1). A split of which no share is drawn is kept.
    """
    drawn = dict(splits)
    for split, share in (("test", test), ("val", val)):
        if share:
            drawn["train"], drawn[split] = hold_out(drawn["train"], share, seed=0)
    order = (UNDRAWN, *REQUIRED_SPLITS, OPTIONAL_SPLIT)
    return {split: drawn[split] for split in order if split in drawn}


def read_folders(root: Path) -> Splits:
    """Reads train, val, test and, if it exists, arch, each with an image and a mask folder.

    Or else reads the one image and mask folder of data without splits. Errors as ``read_layout``.
    """
    names = [*REQUIRED_SPLITS, *([OPTIONAL_SPLIT] if find_folders(root, OPTIONAL_SPLIT) else [])]
    parts = [Part(name, f"{name}/{IMAGE_FOLDER}", f"{name}/{MASK_FOLDER}") for name in names]
    if find_folders(root, IMAGE_FOLDER):
        parts = [Part(UNDRAWN, IMAGE_FOLDER, MASK_FOLDER)]
    return read_layout([Layout(tuple(parts))], root)


def _locate(root: Path, path: str) -> Path:
    """Finds a folder of a ``Part``.

    Raises:
        UserError: there is none, or there are two. The message lists those that exist.
    """
    matching = find_folders(root, path)
    if len(matching) != 1:
        shown = matching or [f for f in (*root.glob("*"), *root.glob("*/*")) if f.is_dir()]
        names = listing((folder.relative_to(root).as_posix() for folder in shown), limit=12)
        raise UserError(f"{root}: expected one folder {path}, found {names}")
    return matching[0]


def check_folder(folder: Path) -> None:
    """Raises ``UserError`` if a folder does not exist."""
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "does not exist"
        raise UserError(f"the folder {folder} {problem}")


def find_folders(root: Path, path: str) -> list[Path]:
    """The folders below ``root``, which must exist, with a path of a ``Part``."""
    check_folder(root)
    folders = [root]
    for step in path.split("/"):
        names = step.lower().split("|")
        folders = [
            child
            for folder in folders
            for child in sorted(folder.iterdir())
            if child.is_dir() and child.name.lower() in names
        ]
    return folders


# ---- Pairs ---------------------------------------------------------------------------------------

_PILLOW = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm")
IMAGE_SUFFIXES = (*_PILLOW, ".npy", *NIFTI)


def list_images(folder: Path) -> list[Path]:
    """Lists the files with a suffix of ``IMAGE_SUFFIXES``, sorted and without hidden files.

    Raises:
        UserError: the folder does not exist, or such a file is a pipe, a socket or a device.
    """
    check_folder(folder)
    found = sorted(
        path
        for path in folder.iterdir()
        if path.name.lower().endswith(IMAGE_SUFFIXES) and not path.name.startswith(".")
    )
    for path in found:  # reading a pipe would wait for ever
        if not (path.is_file() or path.is_dir()) and path.exists():
            raise UserError(f"{path} is a pipe, a socket or a device, no file; remove it")
    return found


def pair_files(images: Path, masks: Path, layout: Layout) -> list[tuple[Path, Path]]:
    """Pairs each image of a folder with the mask of the same stem. The case is ignored.

    Raises:
        UserError: there are no images, two images or two masks have the same stem, or a file has
            no partner.
    """
    suffix = layout.suffix
    named = _files_by_stem(images, layout.skip), _files_by_stem(masks, layout.skip, suffix)
    for (files, partners), kind in ((named, "mask"), (named[::-1], "image")):
        unpaired = [files[stem].name for stem in files if stem not in partners]
        if unpaired:
            ending = f" (the mask's may end in {suffix})" if suffix else ""
            raise UserError(
                f"{images.parent}: {len(unpaired)} of {len(files)} files without {kind}: "
                f"{listing(unpaired)}; an image and its mask must have the same name before the "
                f"suffix{ending}"
            )
    if not named[0]:
        raise UserError(
            f"{images} holds no images; supported suffixes: {', '.join(IMAGE_SUFFIXES)}"
        )
    return [(named[0][stem], named[1][stem]) for stem in named[0]]


def _files_by_stem(folder: Path, skip: str, suffix: str = "") -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in list_images(folder):
        if re.search(skip, path.stem, re.IGNORECASE):
            continue
        stem = stem_of(path).lower().removesuffix(suffix)
        if stem in files:
            raise UserError(
                f"{folder}: {files[stem].name} and {path.name} differ only in their suffix or in "
                "case; remove one"
            )
        files[stem] = path
    return files
