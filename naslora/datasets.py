"""The data sets: the layouts in which they are distributed, their splits, labels and metrics.

``csv`` and ``folders`` read anyone's images, ``mni152`` is the demo, and the others are the data
sets of the paper's study (its Appendix B), each read as its authors distribute it.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from naslora.data import (
    IMAGE_SUFFIXES,
    Encoding,
    Sample,
    check_folder,
    hold_out,
    list_images,
    listing,
)
from naslora.demo_data import write_mni152
from naslora.errors import UserError

Splits = dict[str, list[Sample]]

REQUIRED_SPLITS = ("train", "val", "test")
OPTIONAL_SPLIT = "arch"
IMAGE_FOLDERS = "images|image"
MASK_FOLDERS = "masks|mask|labels|label"
SPLIT_SEED = 0  # of the splits that the paper draws at random; ours are the same in every run


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


def load_splits(source: str, root: Path) -> Splits:
    """Finds the files of a data set.

    Args:
        source: a key of ``DATASETS``.
        root: the folder of the data set.

    Returns:
        "train", "val", "test" and, where the data set has it, "arch" (the split that the
        architecture is trained on): each a list of at least one sample, all with a mask.

    Raises:
        UserError: the source is unknown; files or folders are missing, which are told with what was
            found instead; images and masks do not pair up, which are named; or an image appears
            twice, in one split or in two.
    """
    splits = find_dataset(source).read(Path(root))
    _check_distinct(splits)
    return splits


def find_dataset(name: str) -> DataSet:
    """An entry of ``DATASETS``.

    Raises:
        UserError: there is none of this name.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; known are: {', '.join(DATASETS)}")
    return DATASETS[name]


def count_differences(source: str, splits: Splits) -> list[str]:
    """Where a data set has another number of images than the paper, in words."""
    found = Counter({split: len(samples) for split, samples in splits.items()})
    found.update(sample.group for sample in splits["test"] if sample.group)
    return [
        f"{found[name]} {name} images instead of {count}"
        for name, count in find_dataset(source).counts.items()
        if found[name] != count
    ]


# ---- Anyone's images ----------------------------------------------------------------------------


def _read_csv_splits(root: Path) -> Splits:
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


def _read_folder_splits(root: Path) -> Splits:
    names = list(REQUIRED_SPLITS)
    if (root / OPTIONAL_SPLIT).is_dir():
        names.append(OPTIONAL_SPLIT)
    wanted = [f"{name}/{kind}" for name in names for kind in (IMAGE_FOLDERS, MASK_FOLDERS)]
    folders = _locate(root, *wanted)
    return {
        name: _pair(images, masks, f"folder {name}")
        for name, images, masks in zip(names, folders[::2], folders[1::2], strict=True)
    }


def _read_mni152(root: Path) -> Splits:
    write_mni152(root)
    return _read_csv_splits(root)


# ---- The paper's data sets ----------------------------------------------------------------------


def _read_isic2017(root: Path) -> Splits:
    parts = {"train": "Training", "val": "Validation", "test": "Test_v2"}
    wanted = [
        f"ISIC-2017_{part}_{kind}"
        for part in parts.values()
        for kind in ("Data", "Part1_GroundTruth")
    ]
    folders = _locate(root, *wanted)
    return {
        # The data folders also hold a picture of superpixels for every image.
        split: _pair(images, masks, images.name, suffix="_segmentation", skip="_superpixels$")
        for split, images, masks in zip(parts, folders[::2], folders[1::2], strict=True)
    }


def _read_kvasir(root: Path) -> Splits:
    if _has_folder(root, "TrainDataset"):
        return _read_polyps(root, "Kvasir", skip=r"^\d+$")
    images, masks = _locate(root, "images", "masks")
    return _split_polyps(_pair(images, masks, "images", "threshold"), share=100 / 1000)


def _read_cvc_clinicdb(root: Path) -> Splits:
    if _has_folder(root, "TrainDataset"):
        return _read_polyps(root, "CVC-ClinicDB", skip=r"\D")
    images, masks = _locate(root, "Original", "Ground Truth")
    return _split_polyps(_pair(images, masks, "Original", "threshold"), share=62 / 612)


def _read_polyps(root: Path, name: str, skip: str) -> Splits:
    """PraNet's folders: one for training that both data sets share, where CVC-ClinicDB's images are
    numbered and Kvasir's are not, and one for testing each."""
    folders = _locate(
        root,
        f"TrainDataset/{IMAGE_FOLDERS}",
        f"TrainDataset/{MASK_FOLDERS}",
        f"TestDataset/{name}/{IMAGE_FOLDERS}",
        f"TestDataset/{name}/{MASK_FOLDERS}",
    )
    train = _pair(*folders[:2], "TrainDataset", "threshold", skip=skip)
    test = _pair(*folders[2:], f"TestDataset/{name}", "threshold")
    return _with_validation(train, test, share=0.2)


def _split_polyps(samples: list[Sample], share: float) -> Splits:
    train, test = hold_out(samples, share, SPLIT_SEED)
    return _with_validation(train, test, share=0.2)


def _read_camouflage(root: Path) -> Splits:
    names = ("CAMO", "CHAMELEON", "COD10K")
    tests = [f"TestDataset/{name}/{kind}" for name in names for kind in ("Imgs", "GT")]
    folders = _locate(root, "TrainDataset/Imgs", "TrainDataset/GT", *tests)
    train = _pair(*folders[:2], "TrainDataset", "threshold")
    test = [
        sample
        for name, images, masks in zip(names, folders[2::2], folders[3::2], strict=True)
        for sample in _pair(images, masks, f"TestDataset/{name}", "threshold", group=name)
    ]
    return _with_validation(train, test, share=0.1)


def _read_sbu(root: Path) -> Splits:
    parts = ("SBUTrain4KRecoveredSmall", "SBU-Test")
    wanted = [f"{part}/{kind}" for part in parts for kind in ("ShadowImages", "ShadowMasks")]
    folders = _locate(root, *wanted)
    train = _pair(*folders[:2], parts[0], "threshold")
    return _with_validation(train, _pair(*folders[2:], parts[1], "threshold"), share=0.1)


def _read_leaf(root: Path) -> Splits:
    if _has_folder(root, "train"):
        parts = ("train", "test")
        folders = _locate(
            root, *(f"{part}/{kind}" for part in parts for kind in (IMAGE_FOLDERS, MASK_FOLDERS))
        )
        train, test = (
            _pair(*folders[:2], "train", "nonzero"),
            _pair(*folders[2:], "test", "nonzero"),
        )
    else:
        folders = _locate(root, IMAGE_FOLDERS, MASK_FOLDERS)
        train, test = hold_out(_pair(*folders, "images", "nonzero"), 90 / 588, SPLIT_SEED)
    # The paper names no images to validate on; a tenth of the training images is ours.
    return _with_validation(train, test, share=0.1)


def _read_roads(root: Path) -> Splits:
    wanted = [f"tiff/{split}{kind}" for split in REQUIRED_SPLITS for kind in ("", "_labels")]
    folders = _locate(root, *wanted)
    return {
        split: _pair(images, masks, f"tiff/{split}", "threshold")
        for split, images, masks in zip(REQUIRED_SPLITS, folders[::2], folders[1::2], strict=True)
    }


def _read_trans10k_v1(root: Path) -> Splits:
    parts = {"train": ("train",)}
    for split in ("validation", "test"):
        parts[split] = tuple(f"{split}/{group}" for group in ("easy", "hard"))
    wanted = [
        f"{p}/{kind}" for part in parts.values() for p in part for kind in ("images", "masks")
    ]
    folders = iter(_locate(root, *wanted))
    pairs = {
        split: [
            sample
            for part in group
            for sample in _pair(
                next(folders),
                next(folders),
                part,
                "thirds",
                suffix="_mask",
                group=part.partition("/")[2] or None,
            )
        ]
        for split, group in parts.items()
    }
    return {"train": pairs["train"], "val": pairs["validation"], "test": pairs["test"]}


def _read_trans10k_v2(root: Path) -> Splits:
    parts = {"train": "train", "val": "validation", "test": "test"}
    wanted = [f"{part}/{kind}" for part in parts.values() for kind in ("images", "masks_12")]
    folders = _locate(root, *wanted)
    return {
        split: _pair(images, masks, parts[split], suffix="_mask")
        for split, images, masks in zip(parts, folders[::2], folders[1::2], strict=True)
    }


def _with_validation(train: list[Sample], test: list[Sample], share: float) -> Splits:
    """Draws the validation images from the training images, as the paper does."""
    train, val = hold_out(train, share, SPLIT_SEED)
    return {"train": train, "val": val, "test": test}


# ---- Folders and pairs --------------------------------------------------------------------------


def _locate(root: Path, *wanted: str) -> list[Path]:
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


def _has_folder(root: Path, name: str) -> bool:
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


def _pair(
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


SALIENCY = ("s_alpha", "e_phi")
TRANS10K = {"train": 5000, "val": 1000, "test": 4428}

DATASETS: dict[str, DataSet] = {
    "csv": DataSet(_read_csv_splits),
    "folders": DataSet(_read_folder_splits),
    "mni152": DataSet(_read_mni152),
    "isic2017": DataSet(
        _read_isic2017,
        metrics=("iou", "t_iou", "dice", "accuracy"),
        counts={"train": 2000, "val": 150, "test": 600},
        class_names=("background", "lesion"),
    ),
    "kvasir": DataSet(
        _read_kvasir,
        metrics=SALIENCY,
        counts={"train": 720, "val": 180, "test": 100},
        class_names=("background", "polyp"),
    ),
    "cvc-clinicdb": DataSet(
        _read_cvc_clinicdb,
        metrics=SALIENCY,
        counts={"train": 440, "val": 110, "test": 62},
        class_names=("background", "polyp"),
    ),
    "camouflage": DataSet(
        _read_camouflage,
        metrics=(*SALIENCY, "f_w_beta", "f_w_beta_0.3", "mae"),
        counts={"train": 3636, "val": 404, "CAMO": 250, "CHAMELEON": 76, "COD10K": 2026},
        class_names=("background", "camouflaged"),
    ),
    "sbu": DataSet(
        _read_sbu,
        metrics=("ber", "ber_pooled"),
        counts={"train": 3677, "val": 408, "test": 638},
        class_names=("background", "shadow"),
    ),
    "leaf": DataSet(
        _read_leaf,
        metrics=("iou", "dice", "accuracy"),
        counts={"train": 448, "val": 50, "test": 90},
        class_names=("background", "disease"),
    ),
    "roads": DataSet(
        _read_roads,
        metrics=("iou", "dice"),
        counts={"train": 1107, "val": 13, "test": 48},
        class_names=("background", "road"),
    ),
    "trans10k-v1": DataSet(
        _read_trans10k_v1,
        metrics=("foreground_accuracy", "foreground_miou", "index_mae", "mber"),
        counts=TRANS10K,
        class_names=("background", "things", "stuff"),
    ),
    "trans10k-v2": DataSet(
        _read_trans10k_v2,
        metrics=("pixel_accuracy", "miou", "class_iou"),
        counts=TRANS10K,
        class_names=(
            "background",
            "shelf",
            "jar",
            "freezer",
            "window",
            "door",
            "eyeglass",
            "cup",
            "wall",
            "bowl",
            "bottle",
            "box",
        ),
    ),
}
