"""The data sets: the layouts in which they are distributed, their splits, labels and metrics.

``csv`` and ``folders`` read anyone's images, ``mni152`` is the demo, and the others are the data
sets of the paper's study (its Appendix B), each read as its authors distribute it.
"""

import csv
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from naslora.data.demo_data import write_mni152
from naslora.data.masks import IMAGE_SUFFIXES, Encoding, Sample, check_folder, list_images, listing
from naslora.errors import UserError

Splits = dict[str, list[Sample]]

REQUIRED_SPLITS = ("train", "val", "test")
OPTIONAL_SPLIT = "arch"
IMAGE_FOLDERS = "images|image"
MASK_FOLDERS = "masks|mask|labels|label"


class DataSet(NamedTuple):
    """What is known of a data set beside its files."""

    read: Callable[[Path], Splits]
    """From its folder to its splits."""
    metrics: tuple[str, ...] = ("dice", "iou", "accuracy")
    """What the paper reports on it, names of ``naslora.metrics.METRICS``."""
    counts: Mapping[str, int] = MappingProxyType({})
    """How many images the paper has in each split, and in each group of the test split."""
    class_names: tuple[str, ...] = ()
    """The classes of its masks, the background first; none if the user has to tell."""


# ---- Anyone's images ----------------------------------------------------------------------------


def read_csv(root: Path) -> Splits:
    check_folder(root)
    missing = [f"{split}.csv" for split in REQUIRED_SPLITS if not (root / f"{split}.csv").is_file()]
    if missing:
        raise UserError(
            f"{root}: looked for train.csv, val.csv and test.csv, {' and '.join(missing)} missing; "
            f"the folder holds {listing(p.name for p in root.iterdir())} (paired image and mask "
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
                    f"found {listing(columns)}"
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


def read_folders(root: Path) -> Splits:
    names = list(REQUIRED_SPLITS)
    if (root / OPTIONAL_SPLIT).is_dir():
        names.append(OPTIONAL_SPLIT)
    wanted = [f"{name}/{kind}" for name in names for kind in (IMAGE_FOLDERS, MASK_FOLDERS)]
    folders = locate_folders(root, *wanted)
    return {
        name: pair_files(images, masks, f"folder {name}")
        for name, images, masks in zip(names, folders[::2], folders[1::2], strict=True)
    }


def read_mni152(root: Path) -> Splits:
    write_mni152(root)
    return read_csv(root)


# ---- The paper's data sets ----------------------------------------------------------------------


# ---- Folders and pairs --------------------------------------------------------------------------


def locate_folders(root: Path, *wanted: str) -> list[Path]:
    """Folders below ``root``, whatever the case of their names; ``a|b`` is a or b.

    Raises:
        UserError: some are missing, or two fit; it lists what was looked for and what was found.
    """
    check_folder(root)
    found = {path: _descend(root, path) for path in wanted}
    missing = [path for path, folders in found.items() if not folders]
    if missing:
        raise UserError(
            f"{root}: looked for the folders {', '.join(wanted)}; {', '.join(missing)} missing; "
            f"found {_below(root)}"
        )
    for path, folders in found.items():
        if len(folders) > 1:
            names = " and ".join(str(folder.relative_to(root)) for folder in folders)
            raise UserError(f"{root}: expected one folder {path}, found {names}; remove one")
    return [folders[0] for folders in found.values()]


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


def has_folder(root: Path, name: str) -> bool:
    check_folder(root)
    return bool(_descend(root, name))


def _below(root: Path) -> str:
    """What a folder holds, and what its folders hold, as far as it fits into a line."""
    entries = []
    for path in sorted(root.iterdir()):
        inner = path.iterdir() if path.is_dir() else ()
        folders = [f"{path.name}/{child.name}" for child in inner if child.is_dir()]
        entries += folders or [path.name]
    return listing(entries, limit=12)


def pair_files(
    images: Path,
    masks: Path,
    origin: str,
    encoding: Encoding = "labels",
    suffix: str = "",
    skip: str | None = None,
    group: str | None = None,
) -> list[Sample]:
    """The images of a folder with their masks, which have the same stem, whatever its case.

    Args:
        images: folder of images.
        masks: folder of masks.
        origin: what to call the place in messages.
        encoding: of the masks.
        suffix: what a mask's stem may have behind its image's.
        skip: regular expression; files whose stem it matches belong to something else.
        group: of the samples.

    Raises:
        UserError: there are no images, or a file has no partner; it is named.
    """
    pictures = _files_by_stem(images, skip)
    labels = _files_by_stem(masks, skip, suffix)
    for have, lack, what in ((pictures, labels, "mask"), (labels, pictures, "image")):
        unpaired = [have[stem].name for stem in have if stem not in lack]
        if unpaired:
            ending = f", a mask's with {suffix} behind it" if suffix else ""
            raise UserError(
                f"{images.parent}: {len(unpaired)} of {len(have)} files without {what}: "
                f"{listing(unpaired)}; an image and its mask share the name before the suffix"
                f"{ending}"
            )
    if not pictures:
        raise UserError(f"{images} holds no images; read are {', '.join(IMAGE_SUFFIXES)}")
    return [Sample(pictures[stem], labels[stem], origin, encoding, group) for stem in pictures]


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
