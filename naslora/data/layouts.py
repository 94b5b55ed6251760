"""The layouts for users' own images, and the pairing of image and mask folders.

A layout is a function that turns the folder of a data set into its splits.
"""

import csv
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from naslora.data.images import Encoding, Sample
from naslora.errors import UserError, listing

REQUIRED_SPLITS = ("train", "val", "test")
OPTIONAL_SPLIT = "arch"

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


# ---- CSV files -----------------------------------------------------------------------------------


def read_csv(root: Path) -> Splits:
    """Reads train.csv, val.csv, test.csv and, if it exists, arch.csv.

    Each file has the columns ``image`` and ``label``, with paths relative to ``root``.

    Raises:
        UserError: a file is missing, is not such a CSV file, or names files that do not exist.
    """
    check_folder(root)
    missing = [f"{split}.csv" for split in REQUIRED_SPLITS if not (root / f"{split}.csv").is_file()]
    if missing:
        raise UserError(
            f"{root}: looked for train.csv, val.csv and test.csv, {' and '.join(missing)} missing; "
            f"the folder holds {listing(p.name for p in root.iterdir())} (--dataset folders reads "
            "folders of images and masks)"
        )
    splits = {split: _read_csv(root / f"{split}.csv") for split in REQUIRED_SPLITS}
    optional = root / f"{OPTIONAL_SPLIT}.csv"
    if optional.is_file():
        splits[OPTIONAL_SPLIT] = _read_csv(optional)
    return splits


def _read_csv(path: Path) -> list[Sample]:
    samples = []
    try:
        # utf-8-sig accepts the byte order mark with which some spreadsheets start a file.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = reader.fieldnames or []
            if columns and not {"image", "label"} <= set(columns):
                raise UserError(
                    f"{path}: expected the columns image,label in the first line, "
                    f"found {listing(columns)}"
                )
            for row in reader:
                origin = f"{path.name} row {reader.line_num}"
                if not row.get("image") or not row.get("label"):  # absent after an empty first line
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
        if isinstance(file, Path) and not os.path.isfile(file)  # also if its name is too long
    ]
    if missing:
        file, origin = missing[0]
        raise UserError(
            f"{csv_path} names {len(missing)} missing file{'s' * (len(missing) > 1)}, first {file} "
            f"({origin}); paths are relative to the folder of the CSV file"
        )


# ---- Folders -------------------------------------------------------------------------------------

IMAGE_FOLDER = "images|image"
MASK_FOLDER = "masks|mask|labels|label"


def read_folders(root: Path) -> Splits:
    """Reads train, val, test and, if it exists, arch, each with an image and a mask folder.

    Raises:
        UserError: as ``locate_folders`` and ``pair_files``.
    """
    names = list(REQUIRED_SPLITS)
    if (root / OPTIONAL_SPLIT).is_dir():
        names.append(OPTIONAL_SPLIT)
    wanted = [(f"{name}/{IMAGE_FOLDER}", f"{name}/{MASK_FOLDER}") for name in names]
    return {
        name: pair_files(folders, f"folder {name}")
        for name, folders in zip(names, locate_folders(root, *wanted), strict=True)
    }


class Folders(NamedTuple):
    """A folder of images and the folder of their masks."""

    images: Path
    masks: Path


def locate_folders(root: Path, *wanted: tuple[str, str]) -> list[Folders]:
    """Locates pairs of folders below ``root``. The case of their names is ignored.

    Args:
        root: the folder of the data set.
        wanted: for each pair, the paths of the image and of the mask folder, relative to ``root``.
            In a path, ``a|b`` accepts both names.

    Raises:
        UserError: a folder is missing, or two folders match one path. The message lists the
            expected and the existing folders.
    """
    check_folder(root)
    paths = [path for pair in wanted for path in pair]
    found = {path: _descend(root, path) for path in paths}
    missing = [path for path, folders in found.items() if not folders]
    if missing:
        raise UserError(
            f"{root}: looked for the folders {', '.join(paths)}; {', '.join(missing)} missing; "
            f"found {_below(root)}"
        )
    for path, folders in found.items():
        if len(folders) > 1:
            names = " and ".join(str(folder.relative_to(root)) for folder in folders)
            raise UserError(f"{root}: expected one folder {path}, found {names}; remove one")
    return [Folders(found[images][0], found[masks][0]) for images, masks in wanted]


def has_folder(root: Path, name: str) -> bool:
    """Returns whether ``root`` contains the folder ``name``; as in ``locate_folders``.

    Raises:
        UserError: ``root`` does not exist.
    """
    check_folder(root)
    return bool(_descend(root, name))


def check_folder(folder: Path) -> None:
    """Checks that a folder exists.

    Raises:
        UserError: it does not.
    """
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "does not exist"
        raise UserError(f"the folder {folder} {problem}")


def _descend(root: Path, path: str) -> list[Path]:
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


def _below(root: Path) -> str:
    """Lists the entries of a folder and the folders in them, shortened to fit into one line."""
    entries = []
    for path in sorted(root.iterdir()):
        inner = path.iterdir() if path.is_dir() else ()
        folders = [f"{path.name}/{child.name}" for child in inner if child.is_dir()]
        entries += folders or [path.name]
    return listing(entries, limit=12)


# ---- Pairs ---------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm")


def list_images(folder: Path) -> list[Path]:
    """Lists the files with a suffix of ``IMAGE_SUFFIXES``, sorted and without hidden files.

    Raises:
        UserError: the folder does not exist, or such a file is a pipe, a socket or a device.
    """
    check_folder(folder)
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    for path in found:  # reading a pipe would wait for ever
        if not (path.is_file() or path.is_dir()) and path.exists():
            raise UserError(f"{path} is a pipe, a socket or a device, no file; remove it")
    return found


def pair_files(
    folders: Folders,
    origin: str,
    encoding: Encoding = "labels",
    suffix: str = "",
    skip: str | None = None,
    group: str | None = None,
) -> list[Sample]:
    """Pairs each image of a folder with the mask of the same stem. The case is ignored.

    Args:
        folders: the image folder and the mask folder.
        origin: the samples' origin, for messages.
        encoding: the encoding of the masks.
        suffix: text that a mask's stem may have after the stem of its image.
        skip: regular expression; files with a matching stem are ignored.
        group: the samples' group.

    Raises:
        UserError: there are no images, two images or two masks have the same stem, or a file has
            no partner.
    """
    images = _files_by_stem(folders.images, skip)
    masks = _files_by_stem(folders.masks, skip, suffix)
    for files, partners, kind in ((images, masks, "mask"), (masks, images, "image")):
        unpaired = [files[stem].name for stem in files if stem not in partners]
        if unpaired:
            ending = f" (the mask's may end in {suffix})" if suffix else ""
            raise UserError(
                f"{folders.images.parent}: {len(unpaired)} of {len(files)} files without {kind}: "
                f"{listing(unpaired)}; an image and its mask must have the same name before the "
                f"suffix{ending}"
            )
    if not images:
        raise UserError(
            f"{folders.images} holds no images; supported suffixes: {', '.join(IMAGE_SUFFIXES)}"
        )
    return [Sample(images[stem], masks[stem], origin, encoding, group) for stem in images]


def _files_by_stem(folder: Path, skip: str | None, suffix: str = "") -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in list_images(folder):
        if skip is not None and re.search(skip, path.stem, re.IGNORECASE):
            continue
        stem = path.stem.lower().removesuffix(suffix)
        if stem in files:
            raise UserError(
                f"{folder}: {files[stem].name} and {path.name} differ only in their suffix or in "
                "case; remove one"
            )
        files[stem] = path
    return files
